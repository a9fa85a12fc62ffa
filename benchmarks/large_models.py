#!/usr/bin/env python
"""T5-3B and Qwen2.5 on a CPU: do large recipes train here, how long is a step, how much memory does a rank need?

python benchmarks/large_models.py                     every case: 20 GiB of free memory and about an hour and a half
python benchmarks/large_models.py --only t5_3b_qlora  one of them: 6 GiB are enough, 9 for qwen2_5_7b_qlora

Writes benchmarks/results/large_models.json, a row per case; with --only the other rows stay as they were. The backbone
has its published size and random weights, the clips are real motion of 64 frames, and every step sees the same few of
them, so that the loss must fall. A rank's peak is the largest resident set of its process (VmHWM), the interpreter and
its libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.cluster.ops import use_extensions_dir

use_extensions_dir()  # before anything imports DeepSpeed

RESULTS = ROOT / "benchmarks" / "results" / "large_models.json"
STEPS = 5
FRAMES = 64
CLIPS_PER_RANK = 1


@dataclass(frozen=True)
class Case:
    """One row: a recipe on so many ranks.

    Attributes:
        name: of the row, and for ``--only``.
        recipe: in recipes/.
        ds: DeepSpeed JSON.
        ranks: processes on this machine.
        target: GiB that the peak of a rank must not exceed; None where no figure is asked.
        overrides: settings of this case.
    """

    name: str
    recipe: str
    ds: str
    ranks: int
    target: float | None
    overrides: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the published backbone."""
        from toolkit.recipe.load import load_recipe
        from toolkit.recipe.model_cards import load_model_yaml

        return int(load_model_yaml(load_recipe(self.recipe).model.backbone).config["vocab_size"])


# Gathered weights that may stay for later layers: those of some two layers of T5-3B, which trades time for memory.
FEW_LIVE = (
    "ds.zero_optimization.stage3_max_live_parameters=200000000",
    "ds.zero_optimization.stage3_max_reuse_distance=200000000",
)
CASES = [
    Case("t5_3b_lora", "t5_3b_lora", "zero3", ranks=2, target=6.0, overrides=FEW_LIVE),
    Case("t5_3b_qlora", "t5_3b_qlora", "zero2", ranks=1, target=4.0),
    Case("qwen2_5_0_5b_lora", "qwen2_5_0_5b", "zero3", ranks=2, target=None, overrides=("model.lora.r=16",)),
    Case("qwen2_5_7b_qlora", "qwen2_5_7b_qlora", "zero2", ranks=1, target=7.5),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[case.name for case in CASES], help="run this case alone")
    parser.add_argument("--rank-of", metavar="PLAN", help=argparse.SUPPRESS)  # how this script starts its own ranks
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipes")
    arguments = parser.parse_intermixed_args()
    if arguments.rank_of:
        train_as_rank(json.loads(Path(arguments.rank_of).read_text(encoding="utf-8")))
        sys.stdout.flush()
        os._exit(0)  # threads of gloo may linger
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))} if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder))
        for case in CASES:
            if arguments.only in (None, case.name):
                rows[case.name] = run(case, data, arguments.overrides, Path(folder))
                RESULTS.parent.mkdir(exist_ok=True)
                ordered = [rows[known.name] for known in CASES if known.name in rows]
                RESULTS.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
                print(f"wrote {RESULTS.relative_to(ROOT)}", flush=True)


def prepare(folder: Path) -> list[str]:
    """Make clips; the overrides that name them."""
    from toolkit.corpus.demo import DemoSizes, make_demo

    clips = make_demo(folder / "clips", DemoSizes(train=8, dev=1, test=1, test_unseen_languages=1), seed=1)
    return [
        f"data.table={clips / 'table.csv'}",
        f"data.poses={clips / 'poses'}",
        f"data.cache={folder / 'corpora'}",
        f"data.max_frames={FRAMES}",
    ]


def make_letters(size: int) -> Any:
    """A tokenizer of letters with so many tokens, so that the model has its published size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    tokens += [f"<unused_{number}>" for number in range(size - len(tokens))]
    tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in tokens], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def case_settings(case: Case) -> list[str]:
    """The recipe keys of a case, without those of its folders."""
    return [
        "model.from_scratch=true",
        f"training.global_batch_size={CLIPS_PER_RANK * case.ranks}",
        f"training.micro_batch_size={CLIPS_PER_RANK}",
        "training.micro_batch_frames=null",
        f"training.epochs={STEPS}",
        "training.warmup_ratio=0",
        "training.schedule=constant",
        "training.learning_rate=1e-3",
        "training.label_smoothing=0",
        "training.workers=0",
        "training.log_every=1",
        *case.overrides,
    ]


def run(case: Case, data: list[str], overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train a case in processes of its own and say how it went."""
    print(f"{case.name}: {case.ranks} rank(s), {case.ds}", flush=True)
    tokenizer = folder / f"{case.name}.tokenizer"
    make_letters(case.tokens).save_pretrained(tokenizer)
    plan = {
        "recipe": case.recipe,
        "ds": case.ds,
        "overrides": [
            *data,
            f"model.tokenizer={tokenizer}",
            f"run.dir={folder / case.name}",
            *case_settings(case),
            *overrides,
        ],
        "results": str(folder / f"{case.name}.json"),
    }
    path = folder / f"{case.name}.plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    with socket.socket() as listener:  # a run beside this one may hold DeepSpeed's usual port
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [launcher, "--num_gpus", str(case.ranks), "--master_port", str(port)]
    command = [*ranks, str(Path(__file__).resolve()), "--rank-of", str(path)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // case.ranks)), **os.environ}
    subprocess.run(command, check=True, env=environment)
    measured = json.loads(Path(plan["results"]).read_text(encoding="utf-8"))
    peak = measured["peak_gib_per_rank"]
    asked = {"target_gib_per_rank": case.target} if case.target else {}
    print(f"{case.name}: peak {peak} GiB a rank{f' (at most {case.target})' if asked else ''}", flush=True)
    return {"name": case.name, "ds": case.ds, "ranks": case.ranks, **asked, **measured}


def train_as_rank(plan: dict[str, Any]) -> None:
    """Build, train and measure, on one rank; the first one writes the result."""
    import torch

    from toolkit.batching.loader import train_batches
    from toolkit.cluster.ranks import read_ranks
    from toolkit.corpus.packed import Corpus
    from toolkit.corpus.prepare import ensure_corpus
    from toolkit.cpu.allocator import return_freed_memory
    from toolkit.cpu.linear import has_fast_bf16
    from toolkit.models.loading.weights import count_weights
    from toolkit.recipe.resolve import resolve_named
    from toolkit.training import run as training_run
    from toolkit.training.overfit import few_clips
    from toolkit.training.start import Start

    return_freed_memory()
    ranks = read_ranks()
    resolved = resolve_named(
        plan["recipe"], plan["overrides"], ranks.world_size, has_gpu=torch.cuda.is_available(), ds=plan["ds"]
    )
    whole = Corpus.open(ensure_corpus(resolved.recipe.data, is_local_main=ranks.is_local_main))
    corpus = few_clips(whole, resolved.recipe.training.global_batch_size)
    built: dict[str, float] = {}
    build = training_run.build_translator

    def measured_build(*arguments: Any) -> Any:
        before, started = resident_gib("VmRSS"), time.monotonic()
        model = build(*arguments)
        built.update(seconds=time.monotonic() - started, grown=resident_gib("VmHWM") - before)
        return model

    training_run.build_translator = measured_build

    def echo(text: str) -> None:
        if ranks.is_main:
            print(text, flush=True)

    losses, seconds = [], []
    with (
        training_run.open_run(resolved, ranks, corpus) as interruptions,
        training_run.open_trainer(resolved, ranks, corpus, Start(), interruptions, echo) as trainer,
    ):
        parameters = list(trainer.engine.module.parameters())
        with trainer.line:
            for epoch in range(STEPS):
                for batches in train_batches(
                    trainer.train_split,
                    trainer.processor.tokenizer,
                    resolved,
                    landmark_set=corpus.landmark_set,
                    epoch=epoch,
                    start_step=0,
                    rank=ranks.rank,
                ):
                    started = time.monotonic()
                    trainer.step(batches)
                    seconds.append(time.monotonic() - started)
                    losses.append(trainer.loss)
        device = trainer.engine.device
        figures = torch.tensor([resident_gib("VmHWM"), built["grown"]], dtype=torch.float64, device=device)
        largest, total = figures.clone(), figures.clone()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(total)
        result = {
            "model": resolved.recipe.model.backbone,
            "precision": resolved.precision,
            "fast_bf16": has_fast_bf16(),
            "quantization": resolved.recipe.model.quantization and resolved.recipe.model.quantization.kind,
            "parameters": count_weights(parameters),
            "trainable": count_weights(parameter for parameter in parameters if parameter.requires_grad),
            "frames": FRAMES,
            "steps": len(losses),
            # The first step also fills caches.
            "seconds_per_step": round(sum(seconds[1:]) / len(seconds[1:]), 1),
            "peak_gib_per_rank": round(largest[0].item(), 2),
            "build_seconds": round(built["seconds"], 1),
            "build_gib_all_ranks": round(total[1].item(), 2),
            "one_copy_gib": round(sum(whole_bytes(parameter) for parameter in parameters) / 2**30, 2),
            "first_loss": round(losses[0], 4),
            "last_loss": round(losses[-1], 4),
            "losses": [round(loss, 4) for loss in losses],
        }
    if ranks.is_main:
        Path(plan["results"]).write_text(json.dumps(result), encoding="utf-8")


def resident_gib(key: str) -> float:
    """A figure of this process's memory in /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**20


def whole_bytes(parameter: Any) -> int:
    """Bytes of a parameter, whole, as the run holds it."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


if __name__ == "__main__":
    main()
