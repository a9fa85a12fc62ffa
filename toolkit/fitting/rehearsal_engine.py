"""What a rehearsal does with its engine: passes, steps and searches over made-up micro-batches of a shape."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from toolkit.batching.collate import Batch
from toolkit.batching.lengths import rung_above
from toolkit.cluster.devices import use_device
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.cpu.allocator import keeps_memory
from toolkit.decoding.search import search
from toolkit.decoding.step_graphs import graphs_of_search
from toolkit.errors import UserError
from toolkit.evaluation.splits import ready_to_translate
from toolkit.fitting.bounds import SPREAD, UNKNOWN, Passes, Size, states_of_a_step
from toolkit.fitting.hardware import leave_reserve
from toolkit.fitting.memory_limits import held, peaks, reset_peak
from toolkit.models.backbone import recomputes as is_recomputed
from toolkit.models.backbone import set_checkpointing
from toolkit.models.build import build_processor, build_translator
from toolkit.models.compiled import uncompiled
from toolkit.models.language_models.prefixes import recomputation
from toolkit.models.loss import batch_losses
from toolkit.models.processor import PoseProcessor
from toolkit.models.tokenizers import special_ids
from toolkit.planning.cpu_plan import HEAP_LOSS
from toolkit.planning.memory import translation_memory
from toolkit.planning.sizes.shapes import Lengths, Shape
from toolkit.planning.subject import Subject
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.engine import gradient_norm, make_engine
from toolkit.training.optimization.averaging import update_average
from toolkit.training.optimization.gradient_reduction import backward, reduced_once, when_reduced
from toolkit.training.pass_graphs import pass_graphs


@dataclass(frozen=True)
class Measured:
    """What the rehearsal of some micro-batches found.

    Attributes:
        problem: why it did not fit; None where it did.
        seconds: that it took.
        resident, address_space: the most that the process has had until now, in bytes; of a GPU what torch reserved.
        room: bytes that torch may reserve on its GPU, what it has included; 0 on CPUs.
        error: what else stopped it, as the kind of an error and its arguments.
    """

    problem: str | None = None
    seconds: float = 0.0
    resident: int = 0
    address_space: int = 0
    room: int = 0
    error: tuple[type[Exception], tuple[str, ...]] | None = None


@dataclass
class RehearsalEngine:
    """The engine of a rehearsal."""

    engine: Any
    resolved: ResolvedRun
    processor: PoseProcessor
    vocabulary: int
    special: torch.Tensor
    tokens: dict[bool, int]  # of the longest texts, and of typical ones
    room: int = 0  # bytes that torch may reserve on its GPU
    steps: int = 0
    passed: Passes = field(init=False)

    def __post_init__(self) -> None:
        self.graphs = pass_graphs(self.engine, self.resolved, self._losses)
        self.built = peaks()  # before the mark is set back
        # Stages 2 and 3 reduce gradients in a pass, whose peak may then be another moment than that of activations.
        resets = reset_peak() and self.resolved.zero_stage <= 1
        spread = 1 + HEAP_LOSS["activations"] if keeps_memory() else SPREAD
        self.passed = Passes(held(), states_of_a_step(self.engine.module, self.resolved), resets, spread)

    @classmethod
    def build(
        cls, resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, lengths: Lengths, threads: int
    ) -> RehearsalEngine:
        _join_fake_group(ranks)
        room = 0
        if torch.cuda.is_available():
            room = leave_reserve(ranks)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        processor = build_processor(resolved.recipe, corpus)
        tokenizer = processor.tokenizer
        engine, _ = make_engine(build_translator(resolved, corpus, tokenizer), resolved)
        engine.train()
        limit = resolved.recipe.training.max_target_tokens

        def counts(texts: list[str]) -> list[int]:
            found = (min(limit, len(ids)) for ids in tokenizer(text_target=texts)["input_ids"])
            return sorted(rung_above(lengths.token_rungs, tokens) for tokens in found)

        typical = counts(lengths.typical_texts)
        tokens = {True: counts(lengths.long_texts)[-1], False: typical[len(typical) // 2]}
        special = torch.tensor(special_ids(tokenizer), device=engine.device)
        return cls(engine, resolved, processor, len(tokenizer), special, tokens, room)

    def start(self, _: Sequence[Shape]) -> Measured:
        return self._measured(0.0)

    def passes(self, shapes: Sequence[Shape]) -> Measured:
        """Of one shape; its peak counts in what a step takes at most."""
        reset_peak()
        seconds = self._backward(shapes, ends_step=False)
        self.passed.add(self._size(shapes[0]), peaks()[0])
        return self._measured(seconds)

    def at_most(self, shapes: Sequence[Shape]) -> Measured:
        resident = self.passed.at_most([self._size(shape) for shape in shapes])
        return Measured(resident=resident, address_space=UNKNOWN)

    def traced(self, shapes: Sequence[Shape]) -> Measured:
        recipe, config = self.resolved.recipe, self.resolved.deepspeed
        subject = Subject.of(recipe, self.vocabulary)

        def activations(size: Size) -> float:
            shape = (size.clips, size.frames, size.tokens)
            return subject.traced(*shape, config, self.resolved.recomputes, on_cpu=True).peak

        with contextlib.suppress(UserError):  # a model that cannot be traced
            resident = self.passed.at_most_by([self._size(shape) for shape in shapes], activations)
            return Measured(resident=resident, address_space=UNKNOWN)
        return Measured(resident=UNKNOWN, address_space=UNKNOWN)

    def _size(self, shape: Shape) -> Size:
        return Size(shape.clips, shape.frames, self.tokens[shape.long_texts])

    def translation(self, shapes: Sequence[Shape]) -> Measured:
        """On a GPU the search itself; on CPUs, where it takes long, its memory by arithmetic beside what trains."""
        settings, module = self.resolved.recipe.evaluation, self.engine.module
        search_of: dict[str, Any] = {"beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}
        search_of["graphs"] = settings.graphs and torch.cuda.is_available()
        memory, shape = max(
            ((translation_memory(module, clips=one.clips, frames=one.frames, **search_of), one) for one in shapes),
            key=lambda pair: pair[0].total,
        )
        if not torch.cuda.is_available():
            gathers = self.resolved.zero_stage == 3
            return self._measured(0.0, more=memory.total - (0 if gathers else memory.weights))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.generate(shape)
        return self._measured(0.0)

    def generate(self, shape: Shape) -> None:
        """Search for the texts of a generation batch, to the last token that they may have.

        Twice where steps are graphs: what these keep stays while the next batch begins.
        """
        settings, batch = self.resolved.recipe.evaluation, self._batch(shape).to(self.engine.device)
        with ready_to_translate(self.engine, np.full(shape.clips, shape.frames), settings) as synced:
            graphs = graphs_of_search(self.engine.module, wanted=settings.graphs and not synced)
            for _ in range(2 if graphs else 1):
                search(
                    self.engine.module,
                    self.processor,
                    **batch.inputs,
                    synced=synced,
                    graphs=graphs,
                    min_new_tokens=settings.max_new_tokens,
                )

    def step(self, shapes: Sequence[Shape], *, recomputes: bool) -> Measured:
        """A step as the trainer takes it; the second one holds what the first one allocated."""
        backbone = self.engine.module.backbone
        if is_recomputed(backbone) != recomputes:
            set_checkpointing(backbone, recomputes, **recomputation(backbone) if recomputes else {})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2 if self.steps == 0 else 1):
            seconds = self._backward(shapes, ends_step=True)
            if not self.resolved.zero_stage:
                gradient_norm(self.engine.module.parameters())
            self.engine.step()
            self.steps += 1
            decay = self.resolved.recipe.training.ema
            if decay and self.engine.was_step_applied():
                update_average(self.engine, decay, self.steps)
        return self._measured(seconds)

    def _backward(self, shapes: Sequence[Shape], *, ends_step: bool) -> float:
        before = time.monotonic()
        batches = (self._batch(shape).to(self.engine.device) for shape in shapes)
        with uncompiled(self.engine.module):  # compiled layers keep less, take long at first, and may fail
            if self.graphs and ends_step:
                self.graphs.backward(
                    batches, torch.ones(()), lambda passes, batch: [passes(batch)], lambda _: contextlib.nullcontext()
                )
                if self.graphs.out_of_memory:
                    raise torch.OutOfMemoryError("the capture of a graph")
            else:
                self._written_backward(batches, len(shapes), ends_step=ends_step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic() - before

    def _written_backward(self, batches: Iterable[Batch], count: int, *, ends_step: bool) -> None:
        # Stage 1 reduces nothing before the step ends.
        when = when_reduced(self.engine) if ends_step or self.resolved.zero_stage > 1 else "as they come"
        with reduced_once(self.engine, when, count):
            for number, batch in enumerate(batches, start=1):
                self.engine.set_gradient_accumulation_boundary(ends_step and number == count)
                nll, ctc = self._losses(batch, self.engine)
                loss = (nll + self.resolved.recipe.training.ctc_weight * ctc) / batch.labels.numel()
                backward(self.engine, loss, when)

    def _losses(self, batch: Batch, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_losses(model, batch, self.special, label_smoothing=self.resolved.recipe.training.label_smoothing)

    def _batch(self, shape: Shape) -> Batch:
        """Random poses and texts; what a pass takes depends on their sizes alone."""
        config, tokens = self.engine.module.config, self.tokens[shape.long_texts]
        labels = torch.randint(0, self.vocabulary, (shape.clips, tokens))
        return Batch(
            uids=[""] * shape.clips,
            texts=[""] * shape.clips,
            clips=torch.zeros(shape.clips, dtype=torch.int64),
            **_made_up(config.input_shapes(shape.clips, shape.frames)),
            labels=labels,
            labelled=torch.arange(labels.numel()),
            is_filler=torch.zeros(shape.clips, dtype=torch.bool),
            num_clips=shape.clips,
            num_frames=shape.clips * shape.frames,
            prefix_ids=torch.zeros(shape.clips, config.max_prefix_tokens).long() if config.prefix_template else None,
            gloss_labels=labels % len(config.ctc_vocabulary) if config.ctc_vocabulary else None,
        )

    def _measured(self, seconds: float, more: int = 0) -> Measured:
        """What was measured; ``more`` bytes would be taken besides on CPUs."""
        if torch.cuda.is_available():
            return Measured(seconds=seconds, resident=torch.cuda.max_memory_reserved(), room=self.room)
        resident, address_space = map(max, zip(peaks(), self.built, strict=True))
        if not self.steps:
            resident = max(resident, self.passed.without_activations)
        resident = self.passed.in_a_long_run(resident)
        return Measured(seconds=seconds, resident=resident + more, address_space=address_space + more)


def _made_up(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Any]:
    """Random numbers, and masks of clips without padding."""
    return {
        name: torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.randn(shape).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }


def _join_fake_group(ranks: Ranks) -> None:
    """Be rank 0 of as many ranks as the run has, without them."""
    import deepspeed
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device = use_device(ranks)
    number = ranks.local_rank if device.index is None else device.index
    os.environ |= {"RANK": "0", "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks.world_size)}
    # DeepSpeed would open the shared memory of all local ranks for its all-reduce on CPUs.
    os.environ.pop("LOCAL_SIZE", None)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "1")
    dist.init_process_group("fake", rank=0, world_size=ranks.world_size, store=FakeStore())
    deepspeed.init_distributed(verbose=False)
