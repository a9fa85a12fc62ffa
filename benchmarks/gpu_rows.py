"""The rows of ``gpu.py``: what each measures, and how long it takes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from gpu_training import TOY, Training
from sides import in_short, output_of, running, started, take_turn

HERE = Path(__file__).resolve().parent
STEPS_AS_TYPED = 96  # six epochs: more than its workers load before the first step
STEPS = 4  # of a short run
STEPS_TO_STOP = 60  # of one that SIGTERM must reach, some seconds
OF_GENERATE = 64  # clips that HuggingFace's `generate` translates, all of them padded alike; ours translates all
STEPS_OF_START = 16  # an epoch of 128 clips a step, and so most of its shapes
AT_ONCE = 6  # short runs of `every_json`, whose losses count and not their time
# T5's family overflows in fp16; one node has no other to keep parameters whole for.
IN_FP16 = ["model.backbone=bart_large", "model.tiny=true"]
FP16_REFERENCE = "zero1_bart"
OF_JSON = {"zero2_fp16": IN_FP16, "zero3_plus_plus": ["ds.zero_optimization.zero_hpz_partition_size=null"]}


PEERS, LOOPS = "hf_16 hf_best", "bare plain"
WHOLE = "training.gradient_checkpointing=false"  # as the recipes say for cards of 80 GiB


class Row(NamedTuple):
    """One row of the results.

    Attributes:
        name: its key.
        seconds: how long it takes by itself, from the start of its processes; it is left for the next call where less
            time is left.
        measure: gives the row, from a folder with what all rows share and whether sizes are those of toys.
    """

    name: str
    seconds: float
    measure: Callable[[Path, bool], dict[str, Any]] | Training


def micro(clips: int | str) -> str:
    return f"training.micro_batch_size={clips}"


def sides_of(clips: int, zero: str, best: int, *more: str) -> dict[str, tuple[str, ...]]:
    """All ways of training: ours at micro-batches of ``best`` clips, also as graphs, and the others at theirs.

    Seq2SeqTrainer gets the DeepSpeed JSON that ours has: under ZeRO-2 it launches twice as many kernels on one GPU.
    """
    return {
        "ours": ("ours", micro(best), f"deepspeed={zero}", *more),
        "ours_graphs": ("ours", micro(best), f"deepspeed={zero}", "training.compile=graphs", *more),
        "hf_16": ("hf", micro(min(16, clips)), f"deepspeed={zero}", *more),
        "hf_best": ("hf", micro(best), f"deepspeed={zero}", *more),
        "bare": ("bare", micro(best), f"deepspeed={zero}", *more),
        "plain": ("plain", micro(best), "deepspeed=zero0", *more),
        "fastest": ("fastest", micro(best), "deepspeed=zero0", *more),
    }


def training(recipe: str, clips: int, gib: float, names: str, zero: str, best: int, *more: str) -> Training:
    """Some of these ways, for all together may not fit beside each other."""
    sides = sides_of(clips, zero, best, *more)
    return Training(recipe, clips, gib, {name: sides[name] for name in names.split()})


def launches() -> dict[str, tuple[str, ...]]:
    """Small micro-batches, where launches take longest: layers as they are written, compiled, and passes as graphs."""
    shared = (micro(16), "deepspeed=zero1", "training.padding=ladder")
    return {
        name: ("ours", *shared, f"training.compile={value}")
        for name, value in {"written": "false", "compiled": "auto", "graphs": "graphs"}.items()
    }


def as_the_peers() -> dict[str, tuple[str, ...]]:
    """Ours in the micro-batches of Seq2SeqTrainer, whose clips are padded less than those of one forward pass."""
    sides = sides_of(128, "zero1", 64, WHOLE)
    return {"ours_64": sides["ours"]} | {name: sides[name] for name in PEERS.split()}


def as_written() -> dict[str, tuple[str, ...]]:
    """One rank's part of eight without compiled layers and graphs."""
    own, others = (micro(16), "training.compile=false"), sides_of(16, "zero0", 16)
    return {
        "ours": ("ours", *own, "deepspeed=zero0"),
        "ours_zero1": ("ours", *own, "deepspeed=zero1"),
        "hf_16": ("hf", micro(16), "deepspeed=zero2"),
        "bare": ("bare", *own, "deepspeed=zero0"),
        "plain": others["plain"],
    }


def every_json(folder: Path, toy: bool) -> dict[str, Any]:
    """Four steps by every DeepSpeed JSON, some at a time, and how far its losses are from those of ZeRO-1."""
    names = [path.stem for path in sorted((HERE.parent / "ds_configs").glob("*.json")) if "nvme" not in path.stem]
    cases = {name: [f"deepspeed={name}", *OF_JSON.get(name, [])] for name in names[: 2 if toy else None]}
    cases |= {"zero1": ["deepspeed=zero1"]} | ({} if toy else {FP16_REFERENCE: ["deepspeed=zero1", *IN_FP16]})

    def losses_of(name: str) -> dict[str, Any]:
        try:
            return {"losses": train(folder, folder / f"run_{name}", cases[name], toy)}
        except (RuntimeError, SystemExit) as error:  # the second where no time is left: the others stay
            return {"error": in_short(error)}

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
    with ThreadPoolExecutor(2) as threads:
        run = threads.submit(train, folder, folder / "run_whole", ["deepspeed=zero1"], toy, steps)
        first = train(folder, folder / "run_stopped", ["deepspeed=zero1"], toy, steps, stop_after=2)
        whole = run.result()
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
        *(str(HERE.parent / "launch" / "train.py"), "--recipe", "t5_small"),
        f"data.corpus={folder / 'corpus'}",
        f"model.tokenizer={folder / 'tokenizer'}",
        f"run.dir={run_dir}",
        *("model.from_scratch=true", f"training.max_steps={steps}", "model.dropout=0", "model.pose_encoder.dropout=0"),
        *("training.global_batch_size=8", "training.micro_batch_size=4"),
        *("evaluation.num_beams=1", "evaluation.max_new_tokens=8"),
        *(TOY if toy else []),
        *settings,
    ]
    if not stop_after:
        output_of(command)
        return losses_of(run_dir)
    with tempfile.TemporaryFile("w+") as output, running(command, stdout=output, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and not has_taken(run_dir, stop_after):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # to none that has ended
        process.wait()
    return losses_of(run_dir)


def has_taken(run_dir: Path, step: int) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and f'"step": {step}' in metrics.read_text(encoding="utf-8")


def losses_of(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [round(row["loss"], 5) for row in rows if row["kind"] == "train"]


def as_typed(folder: Path, toy: bool) -> dict[str, Any]:
    """The command that a user types, on 1, 2, 4 ... ranks of this machine: workers and micro-batches are the recipe's.

    Of each: clips a second, the share of the time that ranks waited for data, and the peak of a step beside the plan;
    or why it failed.
    """
    found: dict[str, dict[str, Any]] = {}
    for ranks in numbers_of_ranks(2 if toy else devices()):
        run_dir = folder / f"ranks_{ranks}"
        command = [
            *("-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())),
            *(str(HERE.parent / "launch" / "train.py"), "--recipe", "t5_base", f"data.corpus={folder / 'corpus'}"),
            *(f"model.tokenizer={folder / 'tokenizer'}", f"run.dir={run_dir}", "model.from_scratch=true"),
            *(f"training.max_steps={4 if toy else STEPS_AS_TYPED}", "training.log_every=1", "training.eval_every=99"),
            *("evaluation.max_new_tokens=16", "training.global_batch_size=128"),
            *(["training.global_batch_size=8", "training.micro_batch_size=4", *TOY] if toy else []),
        ]
        try:
            output_of(command)
            found[str(ranks)] = figures_of_run(run_dir)
        except (RuntimeError, SystemExit) as error:
            found[str(ranks)] = {"error": in_short(error)}
    measured = {ranks: figures for ranks, figures in found.items() if "error" not in figures}
    if "1" not in measured:
        raise RuntimeError(found["1"]["error"])
    for ranks, figures in measured.items():
        figures["efficiency"] = round(figures["clips_per_second"] / measured["1"]["clips_per_second"] / int(ranks), 3)
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
    run_dir, results = folder / "run_evaluated", folder / "evaluation.json"
    train(folder, run_dir, ["deepspeed=zero1", "training.compile=false"], toy)
    command = [str(HERE / "evaluation.py"), "--only", "vs_plain_generate", "--model", str(run_dir)]
    settings = [f"--corpus={folder / 'corpus'}", f"--repeats={1 if toy else 2}", f"--plain-clips={OF_GENERATE}"]
    output_of([*command, *settings, f"--results={results}"])
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))["vs_plain_generate"]
    return {key: value for key, value in found.items() if key != "machine"}


def starts(folder: Path, toy: bool) -> dict[str, Any]:
    """From the start of a process to the end of its first epoch: compiled for the first time, again from the cache, as
    graphs from the cache, and without compiled layers. Of each the seconds that compiling adds."""
    commands = training("t5_base", 128, 0.0, "ours ours_graphs", "zero0", 128).commands(folder, toy)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # compilers may still write to it
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}

        def seconds_of(side: str, *more: str) -> dict[str, Any]:
            began = time.monotonic()
            try:
                with started([*commands[side], *more], environment) as process:
                    turn = take_turn(process, 2 if toy else STEPS_OF_START)
                    seconds = round(time.monotonic() - began, 1)
            except SystemExit as error:
                return {"error": in_short(error)}
            return {"seconds": seconds, **{key: turn[key] for key in ("compile_seconds", "captured") if turn[key]}}

        found: dict[str, dict[str, Any]] = {}
        # Two at a time: each of them has one other beside it.
        for pair in (
            {"first": ("ours",), "written": ("ours", "training.compile=false")},
            {"later": ("ours",), "later_graphs": ("ours_graphs",)},
        ):
            with ThreadPoolExecutor(len(pair)) as threads:
                begun = {name: threads.submit(seconds_of, *side) for name, side in pair.items()}
                found |= {name: start.result() for name, start in begun.items()}
    for start in found.values():
        if "seconds" in start and "seconds" in found["written"]:
            start["added_seconds"] = round(start["seconds"] - found["written"]["seconds"], 1)
    return {"steps": 2 if toy else STEPS_OF_START, "sides": found}


# The most important first. Seconds are those of a bare machine with 16 slow cores, whose compilers have cached nothing.
ROWS = [
    # One rank's part of eight.
    Row("t5_base_16", 130, training("t5_base", 16, 20, "ours ours_graphs hf_16", "zero0", 16)),
    Row("t5_base_128", 155, training("t5_base", 128, 95, f"ours ours_graphs {PEERS} fastest", "zero0", 128)),
    Row("t5_small_128", 135, training("t5_small", 128, 40, f"ours ours_graphs {PEERS} fastest", "zero0", 128)),
    Row("t5_large", 90, training("t5_large", 128, 45, "ours", "zero1", 128, WHOLE)),
    Row("t5_3b_lora", 90, training("t5_3b_lora", 128, 65, "ours", "zero1", 64, WHOLE)),
    Row("evaluation", 100, evaluation),
    Row("t5_base_starts", 110, starts),
    Row("t5_base_as_typed", 130, as_typed),  # and as much for each larger number of ranks
    Row("t5_base_128_loops", 60, training("t5_base", 128, 45, LOOPS, "zero0", 128)),
    Row("t5_small_128_loops", 60, training("t5_small", 128, 25, LOOPS, "zero0", 128)),
    Row("t5_small_launches", 60, Training("t5_small", 16, 8, launches())),
    Row("resume_on_another_stage", 75, resume_elsewhere),
    Row("t5_3b_qlora", 95, training("t5_3b_qlora", 128, 15, "ours", "zero1", 16)),
    Row("every_deepspeed_json", 180, every_json),
    Row("t5_large_peers", 85, Training("t5_large", 128, 100, as_the_peers())),
    Row("t5_large_loops", 70, training("t5_large", 128, 120, LOOPS, "zero1", 64, WHOLE)),
    Row("t5_3b_lora_peers", 110, training("t5_3b_lora", 128, 70, PEERS, "zero1", 32, WHOLE)),
    Row("t5_3b_lora_loops", 110, training("t5_3b_lora", 128, 110, LOOPS, "zero1", 32, WHOLE)),
    Row("t5_base_16_as_written", 60, Training("t5_base", 16, 26, as_written())),
    Row("t5_3b_qlora_peers", 90, training("t5_3b_qlora", 128, 20, "hf_16", "zero1", 16)),
    Row("t5_3b_qlora_loops", 90, training("t5_3b_qlora", 128, 20, "bare", "zero1", 16)),  # packed weights: no fp32
]
