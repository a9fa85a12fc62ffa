#!/usr/bin/env python
"""One way of training in ``training.py``, which starts a process for each and lets them take turns.

A side says ``ready``, then answers every number of optimizer steps on its standard input, or of ``--turns``, with one
line of JSON: ``clips``, ``seconds`` and, of our own side, ``mfu``, the micro-batch and what it has compiled, captured
and warned of so far. ``count`` orders one step, whose answer also has its operator calls and the times that its host
waits for a GPU.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch
from operator_calls import calls_of_a_gpu
from torch.nn import functional
from training_corpus import MAX_FRAMES
from training_hf import train_by_hf
from turn_figures import made_so_far, padded_frames, planned_step, utilisation
from turns import answer, elapsed, is_profiled, orders

from toolkit.batching.collate import Batch, collate
from toolkit.batching.loader import train_batches
from toolkit.checkpointing.random_states import seed_everything
from toolkit.cluster.devices import own_device, use_device
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.ops import use_compile_cache
from toolkit.cluster.process_group import join_process_group, leave_process_group
from toolkit.cluster.ranks import read_ranks
from toolkit.corpus.packed import Clips, Corpus
from toolkit.cpu import layers
from toolkit.cpu.allocator import keep_freed_memory
from toolkit.fitting.micro_batches import fit_micro_batches
from toolkit.models import backbone
from toolkit.models.build import build_processor, build_translator
from toolkit.models.compiled import WORTH, compile_layers
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.models.loss import batch_losses
from toolkit.models.tokenizers import special_ids
from toolkit.recipe.compilation import compilation
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import ResolvedRun, resolve
from toolkit.training import engine
from toolkit.training.engine import make_engine
from toolkit.training.monitoring.metering import product_type
from toolkit.training.run import open_run, open_trainer, start_loader
from toolkit.training.start import Start
from toolkit.training.trainer import Trainer

MAX_TOKENS = 128
READY = 64  # steps of a loop whose batches are loaded once


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, on which overrides may come after options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "bare", "plain", "fastest", "hf", "padded"))
    parser.add_argument("folder", type=Path, help="holds corpus/ and backbone/")
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    parser.add_argument("--recipe", default="t5_small", help="default t5_small")
    parser.add_argument("--as-on-gpu", action="store_true", help="single calls for what is one kernel on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each rank")
    parser.add_argument("--turns", type=int, nargs="+", metavar="STEPS", help="instead of orders on standard input")
    parser.add_argument("--same-batches", action="store_true", help="each turn begins with the first batches again")
    parser.add_argument("--without", nargs="+", choices=WITHOUT, default=[], help="what makes our own side fast")
    parser.add_argument("--local_rank", type=int)
    return parser.parse_intermixed_args(words)


def main() -> None:
    sides = {"ours": ours, "bare": bare, "plain": plain, "fastest": fastest, "hf": hf, "padded": padded}
    arguments = read_arguments()
    if arguments.same_batches:
        sides |= {side: partial(sides[side], same=True) for side in ("ours", "bare", "plain", "fastest")}
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    if arguments.turns:
        sys.stdin = io.StringIO("\n".join(map(str, arguments.turns)))
    for name in arguments.without:
        WITHOUT[name]()
    corpus = Corpus.open(arguments.folder / "corpus")
    with tempfile.TemporaryDirectory() as own:
        # Ranks share the run directory of their launcher, which goes with the folder.
        run_dir = arguments.folder / f"ranks_of_{os.getppid()}" if read_ranks().world_size > 1 else Path(own)
        (run_dir / "run").mkdir(parents=True, exist_ok=True)
        settings = [
            f"data.corpus={corpus.path}",
            *([f"model.backbone={path}"] if (path := arguments.folder / "backbone").exists() else []),
            f"run.dir={run_dir}/run",
            *arguments.overrides,
        ]
        recipe = load_recipe(arguments.recipe, settings)
        resolved = resolve(recipe, read_ranks().world_size, has_gpu=torch.cuda.is_available())
        if arguments.side != "ours":  # at stage 0 our own loop clips
            resolved.deepspeed["gradient_clipping"] = recipe.training.gradient_clipping
        with calls_of_a_gpu() if arguments.as_on_gpu else nullcontext():
            sides[arguments.side](resolved, corpus)


def ours(resolved: ResolvedRun, corpus: Corpus, *, same: bool = False) -> None:
    """The toolkit's own loop, with the micro-batches that it chooses where the recipe leaves them to it."""
    resolved = fit_micro_batches(resolved, read_ranks(), corpus, lambda _: None)
    for trainer, taken, clips, seconds in turns_of_ours(resolved, corpus, same=same):
        if trainer.ranks.is_main:
            batches = [batch for step in taken for batch in step]
            planned = planned_step(trainer) if is_profiled() else {}
            figures = {
                **utilisation(trainer, batches, seconds),
                "padded_frames": padded_frames(batches),
                **made_so_far(trainer),
                **planned,
            }
            answer(clips, seconds, micro_batch=resolved.micro_batch_size, **figures)


def turns_of_ours(
    resolved: ResolvedRun, corpus: Corpus, *, loaded: bool = True, same: bool = False
) -> Iterator[tuple[Trainer, list[list[Batch]], int, float]]:
    """Take each turn that is ordered by the toolkit's own loop; its trainer, steps, clips and seconds.

    The clips of a turn are loaded before its clock starts, or else in its steps, by the workers of a whole run: after
    each fork, as of workers for an epoch, the process copies every page that it writes to. With ``same`` each turn has
    the batches of the first again, and no shape that is new.
    """
    keep_freed_memory()
    ranks, start = read_ranks(), Start()
    ahead: list[list[Batch]] = []
    with (
        closing(start_loader(resolved, ranks, corpus, start.progress)) as batches,
        open_run(resolved, ranks, corpus) as interruptions,
        open_trainer(resolved, ranks, corpus, start, interruptions, lambda _: None) as trainer,
    ):
        trainer.engine.train()
        trainer.memory.enter("step")
        batches.set_tokenizer(trainer.processor.tokenizer)
        for steps in orders():
            ahead = ahead if same else []
            ahead += [next(batches) for _ in range(steps - len(ahead) if loaded else 0)]
            started, clips, taken = time.perf_counter(), trainer.progress.clips, []
            for number in range(steps):
                taken.append(ahead[number] if loaded else next(batches))
                trainer.step(taken[-1])
            seconds = elapsed(started)
            yield trainer, taken, trainer.progress.clips - clips, seconds


def score_padding() -> None:
    Trainer._losses = losses_of_all_logits


def losses_of_all_logits(trainer: Trainer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What :meth:`Trainer._losses` was when it scored padding, too, in fp32 and all at once."""
    inputs = {key: getattr(batch, key) for key in ("poses", "visible", "frame_mask", "labels")}
    loss = functional.cross_entropy(
        trainer.engine(**inputs).logits.flatten(0, 1).float(),
        batch.labels.flatten(),
        label_smoothing=trainer.recipe.training.label_smoothing,
        reduction="sum",
    )
    return loss, torch.zeros_like(loss)


def torch_dropout() -> None:
    layers.use_cpu_dropout = lambda model: None


def torch_attention() -> None:
    layers.use_cpu_attention = lambda model: None


def transformers_norm() -> None:
    layers.use_cpu_rms_norm = lambda model: None


def transformers_layers() -> None:
    engine.use_gpu_layers = lambda model: None
    backbone.TAKES_WHOLE_MASK = backbone.WANTS_OWN_MASK = frozenset()


def deepspeeds_own_calls() -> None:
    engine.skip_sums_of_one_rank = engine.count_no_hooks = engine.join_gradients = engine.join_sums = lambda *_: None
    engine.forget_gradients_at_once = lambda _: None


def freed_memory_goes() -> None:
    global keep_freed_memory
    keep_freed_memory = bool


WITHOUT = {
    "label_scores": score_padding,
    "quick_dropout": torch_dropout,
    "quick_attention": torch_attention,
    "quick_norm": transformers_norm,
    "kept_memory": freed_memory_goes,
    "gpu_layers": transformers_layers,
    "fewer_calls": deepspeeds_own_calls,
}


def endless(resolved: ResolvedRun, corpus: Corpus, tokenizer: Any) -> Iterator[list[Batch]]:
    """Steps of epoch after epoch."""
    epoch = 0
    while True:
        yield from train_batches(
            corpus.splits["train"], tokenizer, resolved, landmark_set=corpus.landmark_set, epoch=epoch
        )
        epoch += 1


def bare(resolved: ResolvedRun, corpus: Corpus, *, same: bool = False) -> None:
    """A DeepSpeed engine fed with ready batches that were sorted by length, and nothing else.

    The process and the model are made as fast as ours, so that what is left is what the loops cost.
    """
    keep_freed_memory()
    log_to_file(None)
    join_process_group(read_ranks())
    processor, model = build(resolved, corpus)
    ready = ready_steps(resolved, corpus, processor.tokenizer)
    deepspeeds_own_calls()
    trained, _ = make_engine(model, resolved)
    trained.train()

    def step(batches: list[Batch]) -> None:
        for batch in batches:
            trained.backward(mean_loss(trained, batch))
            trained.step()

    take_ready_turns(step, ready, same)
    leave_process_group()


def take_ready_turns(step: Callable[[list[Batch]], None], ready: list[list[Batch]], same: bool) -> None:
    """Take each turn that is ordered, over steps of batches that are where the model is."""
    done = 0
    for steps in orders():
        done = 0 if same else done
        taken = [ready[(done + number) % len(ready)] for number in range(steps)]
        started = time.perf_counter()
        for batches in taken:
            step(batches)
        seconds = elapsed(started)
        done += steps
        answer(sum(batch.num_clips for batches in taken for batch in batches), seconds)


def ready_steps(resolved: ResolvedRun, corpus: Corpus, tokenizer: Any) -> list[list[Batch]]:
    """Some steps whose batches are where the model is."""
    steps = itertools.islice(endless(resolved, corpus, tokenizer), READY)
    return [[batch.to(own_device()) for batch in step] for step in steps]


def plain(resolved: ResolvedRun, corpus: Corpus, *, same: bool = False) -> None:
    """torch alone: transformers' own layers, ready batches, autocast where the run computes in bf16, no DeepSpeed."""
    transformers_layers()
    processor, model = build(resolved, corpus)
    loop_of_torch(resolved, corpus, processor, model, mean_loss, same)


def fastest(resolved: ResolvedRun, corpus: Corpus, *, same: bool = False) -> None:
    """The same loop with our kernels: our layers, compiled where ours are, and our loss, which scores labels alone."""
    log_to_file(None)
    use_device(read_ranks())
    processor, model = build(resolved, corpus)
    use_gpu_layers(model)
    if compilation(resolved.recipe, resolved.deepspeed, has_gpu=torch.cuda.is_available()).compiles:
        use_compile_cache()
        compile_layers(model, worth=WORTH if resolved.recipe.training.compile == "auto" else 0.0)
    special = torch.tensor(special_ids(processor.tokenizer), device=own_device())
    smoothing = resolved.recipe.training.label_smoothing

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        nll, _ = batch_losses(model, batch, special, label_smoothing=smoothing)
        return nll / batch.num_target_tokens

    loop_of_torch(resolved, corpus, processor, model, loss, same)


def loop_of_torch(
    resolved: ResolvedRun,
    corpus: Corpus,
    processor: Any,
    model: Any,
    loss_of: Callable[[Any, Batch], torch.Tensor],
    same: bool,
) -> None:
    """Take turns by torch's fused AdamW over ready batches; the host waits for the GPU at the end of a turn alone."""
    ready = ready_steps(resolved, corpus, processor.tokenizer)
    device, training = own_device(), resolved.recipe.training
    in_bf16 = product_type(resolved) == torch.bfloat16
    model.to(device).float().train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, fused=True)

    def step(batches: list[Batch]) -> None:
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                loss = loss_of(model, batch) / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    take_ready_turns(step, ready, same)


def build(resolved: ResolvedRun, corpus: Corpus) -> tuple[Any, Any]:
    seed_everything(resolved.recipe.training.seed)
    processor = build_processor(resolved.recipe, corpus)
    return processor, build_translator(resolved, corpus, processor.tokenizer)


def mean_loss(model: Any, batch: Batch) -> torch.Tensor:
    """What a plain loop takes for its loss: the mean over the micro-batch."""
    logits = model(poses=batch.poses, visible=batch.visible, frame_mask=batch.frame_mask, labels=batch.labels).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


def padded(resolved: ResolvedRun, corpus: Corpus) -> None:
    """The original way: every clip padded to 300 frames, every text to 128 tokens, autocast, one plain loop."""
    processor, model = build(resolved, corpus)
    model.train()
    training = resolved.recipe.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, fused=True)
    loader = iter(random_order(corpus, partial(pad_to_maximum, tokenizer=processor.tokenizer), resolved))
    for steps in orders():
        started, clips = time.perf_counter(), 0
        for _ in range(steps):
            for _ in range(resolved.accumulation_steps):
                batch = next(loader).to(own_device())
                with torch.autocast(batch.poses.device.type, torch.bfloat16):
                    loss = mean_loss(model, batch) / resolved.accumulation_steps
                loss.backward()
                clips += batch.num_clips
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
        answer(clips, elapsed(started))


def random_order(corpus: Corpus, collator: Any, resolved: ResolvedRun) -> Any:
    """torch's own loader over shuffled clips, with as many workers as ours."""
    split = corpus.splits["train"]
    return torch.utils.data.DataLoader(
        [*range(len(split))] * 50,  # type: ignore[arg-type]
        batch_size=resolved.micro_batch_size,
        shuffle=True,
        collate_fn=lambda indices: collator(split.read(indices), indices),
        num_workers=resolved.recipe.training.workers,
    )


def pad_to_maximum(clips: Clips, indices: list[int], tokenizer: Any) -> Batch:
    batch = collate(clips, indices, tokenizer, max_target_tokens=MAX_TOKENS)
    more = MAX_FRAMES - batch.poses.shape[1]
    batch.poses = functional.pad(batch.poses, (0, 0, 0, 0, 0, more))
    batch.visible = functional.pad(batch.visible, (0, 0, 0, more))
    batch.frame_mask = functional.pad(batch.frame_mask, (0, more))
    # Padding was a target like any other token.
    batch.labels = functional.pad(batch.labels, (0, MAX_TOKENS - batch.labels.shape[1]), value=-100)
    batch.labels = batch.labels.masked_fill(batch.labels == -100, tokenizer.pad_token_id)
    return batch


def hf(resolved: ResolvedRun, corpus: Corpus) -> None:
    """HuggingFace's ``Seq2SeqTrainer`` with the same DeepSpeed JSON and its default sampling."""
    log_to_file(None)
    join_process_group(read_ranks())  # without one, accelerate looks for MPI
    train_by_hf(resolved, corpus, *build(resolved, corpus), MAX_TOKENS)


if __name__ == "__main__":
    main()
