#!/usr/bin/env python
"""How fast a GPU trains here and by other means, on a bare machine that may be there for minutes only.

python benchmarks/gpu.py                     eight minutes, the most important first; nothing is downloaded
python benchmarks/gpu.py --minutes 30        all rows
python benchmarks/gpu.py --only t5_base_128  one of them, even if it is there already
python benchmarks/gpu.py --cpu               toy sizes without a GPU: only to see that the command works

Each row is written to benchmarks/results/gpu.json as soon as it is measured, with the device, torch and the driver. A
later call does the rows that are not there for this device yet, and again those that failed. Weights are random, of
published sizes; clips and sentences are as long as iSign's. Ways of training are processes that build their model once,
those of two rows at the same time, and then take turns: nothing else runs beside a turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_training import TOY, TRAINED, Processes, Training, opened_together

RESULTS = HERE / "results" / "gpu.json"
HELD_OUT = 64  # clips of its dev split, and of its test split
TOGETHER = 2  # rows whose processes start at the same time
STEPS_AS_TYPED = 24
STEPS = 4  # of a short run
STEPS_TO_STOP = 60  # of one that SIGTERM must reach, some seconds
AT_ONCE = 4  # short runs of `every_json`, whose losses count and not their time
# T5's family overflows in fp16; one node has no other to keep parameters whole for.
IN_FP16 = ["model.backbone=bart_large", "model.tiny=true"]
FP16_REFERENCE = "zero1_bart"
OF_JSON = {"zero2_fp16": IN_FP16, "zero3_plus_plus": ["ds.zero_optimization.zero_hpz_partition_size=null"]}


class Row(NamedTuple):
    """One row of the results.

    Attributes:
        name: its key.
        seconds: how long it takes on an H100, with its start; it is left for the next call where less time is left.
        measure: gives the row, from a folder with what all rows share and whether sizes are those of toys.
    """

    name: str
    seconds: float
    measure: Callable[[Path, bool], dict[str, Any]] | Training


class Measuring:
    """Measures rows; training rows open in pairs, as their names follow each other among those that are asked for."""

    def __init__(self, rows: Sequence[Row], folder: Path, toy: bool) -> None:
        self.rows, self.folder, self.toy = [row for row in rows if isinstance(row.measure, Training)], folder, toy
        self.opened: dict[str, Processes] = {}

    def __call__(self, row: Row) -> dict[str, Any]:
        if not isinstance(row.measure, Training):
            return row.measure(self.folder, self.toy)
        if row.name not in self.opened:
            place = self.rows.index(row)
            pair = self.rows[place : place + (1 if self.toy or row.measure.alone else TOGETHER)]
            pair = [each for each in pair if each is row or not each.measure.alone]
            training = [row.measure for row in pair if isinstance(row.measure, Training)]
            opened = opened_together(training, self.folder, self.toy)
            self.opened |= {row.name: processes for row, processes in zip(pair, opened, strict=True)}
        processes = self.opened.pop(row.name)
        with processes.stack:
            return row.measure.measure(processes, self.toy)

    def close(self) -> None:
        """End the processes of rows for which no time was left."""
        for processes in self.opened.values():
            processes.stack.close()


def micro(clips: int | str) -> str:
    return f"training.micro_batch_size={clips}"


def side_by_side(recipe: str, clips: int, zero: str, best: int, *more: str, peers: bool = True) -> Training:
    """Ours at micro-batches of ``best`` clips, with compiled layers and as graphs, and the others at theirs."""
    own = {
        "ours": ("ours", micro(best), f"deepspeed={zero}", *more),
        "ours_graphs": ("ours", micro(best), f"deepspeed={zero}", "training.compile=graphs", *more),
    }
    others: dict[str, tuple[str, ...]] = {
        "hf_16": ("hf", micro(min(16, clips)), "deepspeed=zero2", *more),
        "hf_best": ("hf", micro(best), "deepspeed=zero2", *more),
        "bare": ("bare", micro(best), f"deepspeed={zero}", *more),
        "plain": ("plain", micro(best), "deepspeed=zero0", *more),
    }
    if best == 16:
        del others["hf_best"]
    return Training(recipe, clips, own | (others if peers else {}))


def loops(recipe: str, best: int, *more: str, plain: bool = True) -> Training:
    """The loops without ours, where all ways of training do not fit beside each other."""
    sides = side_by_side(recipe, 128, "zero1", best, *more).sides
    return Training(recipe, 128, {name: sides[name] for name in ("bare", *(["plain"] if plain else []))}, alone=True)


def trainers(recipe: str, best: int, *more: str) -> Training:
    """Seq2SeqTrainer alone, for the same reason."""
    sides = side_by_side(recipe, 128, "zero1", best, *more).sides
    return Training(recipe, 128, {name: side for name, side in sides.items() if side[0] == "hf"}, alone=True)


def launches() -> dict[str, tuple[str, ...]]:
    """Small micro-batches, where launches take longest: layers as they are written, compiled, and passes as graphs."""
    shared = (micro(16), "deepspeed=zero1", "training.padding=ladder")
    return {
        name: ("ours", *shared, f"training.compile={value}")
        for name, value in {"written": "false", "compiled": "auto", "graphs": "graphs"}.items()
    }


def as_written() -> dict[str, tuple[str, ...]]:
    """One rank's part of eight without compiled layers and graphs."""
    own, plain = (micro(16), "training.compile=false"), side_by_side("t5_base", 16, "zero0", 16).sides
    return {
        "ours": ("ours", *own, "deepspeed=zero0"),
        "ours_zero1": ("ours", *own, "deepspeed=zero1"),
        "hf_16": plain["hf_16"],
        "bare": ("bare", *own, "deepspeed=zero0"),
        "plain": plain["plain"],
    }


def every_json(folder: Path, toy: bool) -> dict[str, Any]:
    """Four steps by every DeepSpeed JSON, some at a time, and how far its losses are from those of ZeRO-1."""
    names = [path.stem for path in sorted((HERE.parent / "ds_configs").glob("*.json")) if "nvme" not in path.stem]
    cases = {name: [f"deepspeed={name}", *OF_JSON.get(name, [])] for name in names[: 2 if toy else None]}
    cases |= {"zero1": ["deepspeed=zero1"]} | ({} if toy else {FP16_REFERENCE: ["deepspeed=zero1", *IN_FP16]})

    def losses_of(name: str) -> dict[str, Any]:
        try:
            return {"losses": train(folder, folder / f"run_{name}", cases[name], toy)}
        except RuntimeError as error:
            return {"error": str(error)[-300:]}

    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = dict(zip(cases, threads.map(losses_of, cases), strict=True))
    for name, side in found.items():
        reference = found[FP16_REFERENCE if name in ("zero2_fp16", FP16_REFERENCE) else "zero1"]
        if "losses" in side and "losses" in reference:
            apart = [abs(a - b) / abs(b) for a, b in zip(side["losses"], reference["losses"], strict=True)]
            side["farthest_from_zero1"] = round(max(apart), 5)
    return {"sides": found}


def resume_elsewhere(folder: Path, toy: bool) -> dict[str, Any]:
    """How far losses of a run that SIGTERM stops under ZeRO-1 and ZeRO-2 resumes are from those of one without a stop.

    Raises:
        RuntimeError: the run had ended before the signal reached it.
    """
    steps = 12 if toy else STEPS_TO_STOP
    whole = train(folder, folder / "run_whole", ["deepspeed=zero1"], toy, steps)
    first = train(folder, folder / "run_stopped", ["deepspeed=zero1"], toy, steps, stop_after=2)
    resumed = train(folder, folder / "run_stopped", ["deepspeed=zero2"], toy, steps)
    if len(first) == steps:
        raise RuntimeError(f"all {steps} steps were taken before SIGTERM reached the run")
    apart = [abs(a - b) / abs(b) for a, b in zip(resumed, whole, strict=True)]
    return {"steps": steps, "stopped_after": len(first), "farthest_from_whole": round(max(apart), 5)}


def train(
    folder: Path, run_dir: Path, settings: list[str], toy: bool, steps: int = STEPS, stop_after: int | None = None
) -> list[float]:
    """Losses of a short run of t5_small, from its own start; ``stop_after`` a step it gets SIGTERM.

    Raises:
        RuntimeError: it failed.
    """
    command = [
        *(sys.executable, str(HERE.parent / "launch" / "train.py"), "--recipe", "t5_small"),
        f"data.corpus={folder / 'corpus'}",
        f"model.tokenizer={folder / 'tokenizer'}",
        f"run.dir={run_dir}",
        *("model.from_scratch=true", f"training.max_steps={steps}", "model.dropout=0", "model.pose_encoder.dropout=0"),
        *("training.global_batch_size=8", "training.micro_batch_size=4"),
        *(TOY if toy else []),
        *settings,
    ]
    metrics = run_dir / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while stop_after and process.poll() is None:
        if metrics.exists() and f'"step": {stop_after}' in metrics.read_text(encoding="utf-8"):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    output, _ = process.communicate()
    if process.returncode and not stop_after:
        raise RuntimeError(output)
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [round(row["loss"], 5) for row in rows if row["kind"] == "train"]


def as_typed(folder: Path, toy: bool) -> dict[str, Any]:
    """The command that a user types, on 1, 2, 4 ... ranks of this machine: workers and micro-batches are the recipe's.

    Of each: clips a second, the share of the time that ranks waited for data, and the peak of a step beside the plan.
    """
    found: dict[str, Any] = {}
    for ranks in numbers_of_ranks(2 if toy else devices()):
        run_dir = folder / f"ranks_{ranks}"
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
        command = [
            *(*launcher, "--master_port", str(free_port()), str(HERE.parent / "launch" / "train.py")),
            *("--recipe", "t5_base", f"data.corpus={folder / 'corpus'}", f"model.tokenizer={folder / 'tokenizer'}"),
            *(f"run.dir={run_dir}", "model.from_scratch=true", f"training.max_steps={4 if toy else STEPS_AS_TYPED}"),
            *("training.log_every=1", "evaluation.max_new_tokens=16", "training.global_batch_size=128"),
            "training.eval_every=99",
            *(["training.global_batch_size=8", "training.micro_batch_size=4", *TOY] if toy else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks: {done.stdout}{done.stderr}"[-500:])
        found[str(ranks)] = figures_of_run(run_dir)
    first = found["1"]["clips_per_second"]
    for ranks, figures in found.items():
        figures["efficiency"] = round(figures["clips_per_second"] / first / int(ranks), 3)
    return {"clips_a_step": 8 if toy else 128, "sides": found}


def numbers_of_ranks(most: int) -> list[int]:
    """The powers of two up to ``most``, and ``most``."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


def devices() -> int:
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def figures_of_run(run_dir: Path) -> dict[str, Any]:
    """What a run has logged of itself: the second half of its steps, and its memory beside the plan."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    steps = steps[len(steps) // 2 :]
    memory = next((row for row in reversed(rows) if row["kind"] == "memory"), {})
    wanted = {"step_allocated_gib": "peak_gib", "step_planned_gib": "planned_gib", "step_process_gib": "process_gib"}
    return {
        "clips_per_second": round(median(row["clips_per_second"] for row in steps), 1),
        "data_wait_share": round(median(row["data_wait_share"] for row in steps), 4),
        **{name: round(memory[key], 2) for key, name in wanted.items() if key in memory},
    }


def evaluation(folder: Path, toy: bool) -> dict[str, Any]:
    """Beam search of the model that t5_small's short run has kept, against HuggingFace's ``generate``."""
    run_dir = folder / "run_evaluated"
    train(folder, run_dir, ["deepspeed=zero1", "training.compile=false"], toy)
    from evaluation import vs_plain_generate

    arguments = argparse.Namespace(model=str(run_dir), corpus=str(folder / "corpus"), repeats=1 if toy else 3)
    return vs_plain_generate(arguments)


WHOLE = "training.gradient_checkpointing=false"  # as the recipes say for cards of 80 GiB
# The most important first.
ROWS = [
    Row("t5_base_16", 70, side_by_side("t5_base", 16, "zero0", 16)),  # one rank's part of eight
    Row("t5_base_128", 70, side_by_side("t5_base", 128, "zero0", 128)),
    Row("evaluation", 60, evaluation),
    Row("t5_small_128", 60, side_by_side("t5_small", 128, "zero0", 128)),
    Row("t5_large", 60, side_by_side("t5_large", 128, "zero1", 64, WHOLE, peers=False)),
    Row("t5_3b_lora", 90, side_by_side("t5_3b_lora", 128, "zero1", 64, WHOLE, peers=False)),
    Row("t5_base_as_typed", 75, as_typed),  # and as much for each larger number of ranks
    Row("t5_small_launches", 60, Training("t5_small", 16, launches())),
    Row("resume_on_another_stage", 60, resume_elsewhere),
    Row("t5_3b_qlora", 110, Training("t5_3b_qlora", 128, {"ours": ("ours", micro(16), "deepspeed=zero1")})),
    Row("t5_base_16_as_written", 70, Training("t5_base", 16, as_written())),
    Row("every_deepspeed_json", 180, every_json),
    Row("t5_large_trainers", 80, trainers("t5_large", 64, WHOLE)),
    Row("t5_large_loops", 80, loops("t5_large", 64, WHOLE)),
    Row("t5_3b_lora_trainers", 120, trainers("t5_3b_lora", 32, WHOLE)),
    Row("t5_3b_lora_loops", 120, loops("t5_3b_lora", 32, WHOLE)),
    Row("t5_3b_qlora_trainers", 120, trainers("t5_3b_qlora", 16)),
    Row("t5_3b_qlora_loops", 120, loops("t5_3b_qlora", 16, plain=False)),  # packed weights have no fp32
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="default 8")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="ROW", help="these rows again")
    parser.add_argument("--cpu", action="store_true", help="toy sizes; writes no results unless --results names a file")
    parser.add_argument("--results", type=Path, default=None, help=f"default {RESULTS.relative_to(HERE.parent)}")
    arguments = parser.parse_args()
    device = machine(arguments.cpu)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = arguments.results or (folder / "gpu.json" if arguments.cpu else RESULTS)
        rows = [row for row in ROWS if not arguments.only or row.name in arguments.only]
        prepare(folder, arguments.cpu)
        with closing(Measuring(rows, folder, arguments.cpu)) as measure:
            left = take(rows, path, device, 60 * arguments.minutes, measure, again=bool(arguments.only))
    for name in left:
        print(f"left for the next call: {name}")


def machine(cpu: bool) -> dict[str, str]:
    """What the rows were measured on."""
    import torch

    if cpu:
        return {"device": "a CPU, toy sizes", "torch": torch.__version__, "driver": "none"}
    if not torch.cuda.is_available():
        sys.exit("error: no GPU is visible\nhint: --cpu tries the command at toy sizes")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ""
    driver = answer.split("\n")[0].strip()
    return {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "driver": driver or "unknown"}


def prepare(folder: Path, toy: bool) -> None:
    """The corpus and the tokenizer that all rows share."""
    from training_corpus import make_corpus

    from toolkit.models.tokenizers import make_tokenizer

    held_out = 16 if toy else HELD_OUT
    clips = (64 if toy else TRAINED) + 2 * held_out
    texts = make_corpus(folder / "corpus", clips, held_out=held_out, names=("dev", "test")).splits["train"].texts
    make_tokenizer("train", texts).save_pretrained(folder / "tokenizer")


def take(
    rows: Sequence[Row],
    path: Path,
    device: dict[str, str],
    seconds: float,
    measure: Callable[[Row], dict[str, Any]],
    *,
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Measure rows in their order, as far as the time goes, and write each as it comes.

    Rows that are there for this device are left out, unless ``again``. A row that fails is written with its error.

    Returns:
        names of the rows for which no time was left.
    """
    ends, left = clock() + seconds, []
    for row in rows:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        there = results.get(row.name, {})
        if not again and "error" not in there and there.get("device") == device["device"]:
            continue
        if clock() + row.seconds > ends:
            left.append(row.name)
            continue
        started = clock()
        try:
            found = measure(row)
        except (Exception, SystemExit) as error:
            found = {"error": f"{type(error).__name__}: {error}"[-500:]}
        took = {"took_seconds": round(clock() - started, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results | {row.name: found | took | device}, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        print(row.name, json.dumps(found), flush=True)
    return left


if __name__ == "__main__":
    main()
