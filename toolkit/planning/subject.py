"""A recipe's model without memory: its weights, and what its passes and searches hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from toolkit.errors import UserError
from toolkit.models.backbone import halves, layer_list
from toolkit.models.backbone_config import fit_dropout, fit_rows
from toolkit.models.compiled import WORTH, flops_of_vector
from toolkit.models.dtypes import TORCH_DTYPES
from toolkit.models.tokenizers import TRAINED_VOCABULARY
from toolkit.planning.costs.counts import Weight, adapted_translator, planned_config
from toolkit.planning.costs.storages import Peak
from toolkit.planning.costs.tracing import UNTRACEABLE, Trace, TracedModel, shorten, trace
from toolkit.planning.costs.vocabulary import planned_vocabulary
from toolkit.planning.memory import TranslationMemory, translation_memory
from toolkit.planning.workload import Workload
from toolkit.recipe.compilation import compilation
from toolkit.recipe.deepspeed.cells import parameter_precision
from toolkit.recipe.model_cards import reads_published, tokenizer_of
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

BYTE_VOCABULARY = 384  # rows of ByT5's table
TRACED_CLIPS = (2, 8, 32, 128, 512)  # of micro-batches; with one clip tensors have dimensions that vanish


@dataclass
class Subject:
    """A recipe's model without memory, whose passes are traced when a plan asks for them.

    Attributes:
        recipe: decides the model.
        weights: each parameter once.
        vocabulary: how a trimmed one is counted, in words; empty where it is not trimmed.
    """

    recipe: Recipe
    weights: list[Weight]
    _traced: TracedModel
    vocabulary: str = ""
    _traces: dict[tuple[object, ...], Trace] = field(default_factory=dict)
    _translations: dict[tuple[object, ...], TranslationMemory] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, rows: int | None = None) -> Subject:
        """Build the model's shapes.

        Args:
            recipe: the recipe.
            rows: tokens of a vocabulary that is made or trimmed for the run; None = the most that it may have.

        Raises:
            UserError: neither a model card nor a configuration of the backbone is here.
        """
        vocabulary = planned_vocabulary(recipe)
        rows = rows or vocabulary.rows
        config = planned_config(recipe, rows)
        fit_dropout(config, recipe.model)
        rows = rows or {"train": TRAINED_VOCABULARY, "bytes": BYTE_VOCABULARY}.get(tokenizer_of(recipe.model))
        if rows and not reads_published(recipe.model):
            fit_rows(config, rows)
        translator, weights = adapted_translator(config, recipe)
        return cls(recipe, weights, shorten(translator), vocabulary.what)

    def trace(
        self, clips: int, frames: int, tokens: int, config: Tree, checkpointing: bool, on_cpu: bool = False
    ) -> Trace:
        """A forward and backward pass over a micro-batch under a DeepSpeed JSON, on a GPU or a CPU.

        Some sizes of micro-batch are traced; figures of others lie on the line through the two beside them. It is never
        below the peak, which is the largest of several figures that grow evenly.
        """
        compiled = () if on_cpu else self._compiled(clips, frames, tokens, config)
        fewer, more = next((pair for pair in pairwise(TRACED_CLIPS) if clips <= pair[1]), TRACED_CLIPS[-2:])
        small, large = (
            self.traced(number, frames, tokens, config, checkpointing, on_cpu, compiled) for number in (fewer, more)
        )

        def at(few: float, many: float) -> float:
            return max(0.0, few + (clips - fewer) / (more - fewer) * (many - few))

        return Trace(
            **{name: at(getattr(small, name), getattr(large, name)) for name in ("saved", "kernels", "flops")},
            peaks={part: Peak(*map(at, small.peaks[part], peak)) for part, peak in large.peaks.items()},
            bf16_products=large.bf16_products,
        )

    def _compiled(self, clips: int, frames: int, tokens: int, config: Tree) -> tuple[str, ...]:
        """Of encoder and decoder those whose layers run compiled on a GPU, with so large a micro-batch."""
        if not compilation(self.recipe, config, has_gpu=True).compiles:
            return ()
        model, worth = self._traced.model, WORTH if self.recipe.training.compile == "auto" else 0.0
        read = model.pose_encoder.length(frames) + model.config.longest_prefix
        encoder, decoder = halves(model.backbone)
        stacks = (("encoder", encoder, read), ("decoder", decoder, tokens if encoder is not None else read + tokens))
        return tuple(
            name
            for name, stack, vectors in stacks
            if stack is not None and clips * vectors * flops_of_vector(layer_list(stack)[0]) >= worth
        )

    def bf16_products(
        self, shapes: Iterable[tuple[int, int, int]], config: Tree, checkpointing: bool
    ) -> frozenset[object]:
        """The different matrix products in bf16 of passes over micro-batches (clips, frames, tokens) on a CPU."""
        traces = [self.traced(*shape, config, checkpointing, on_cpu=True) for shape in shapes]
        return frozenset[object]().union(*(one.bf16_products for one in traces))

    def traced(
        self,
        clips: int,
        frames: int,
        tokens: int,
        config: Tree,
        checkpointing: bool,
        on_cpu: bool = False,
        compiled: tuple[str, ...] = (),
    ) -> Trace:
        """The same of exactly so many clips, traced where it was not yet.

        Args:
            clips, frames, tokens, config, checkpointing, on_cpu: as for :meth:`trace`.
            compiled: the stacks whose layers run compiled.

        Raises:
            UserError: the model cannot be traced.
        """
        dtype = TORCH_DTYPES[parameter_precision(config)]
        dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # as many bytes, and no second trace
        autocast = bool(value_at(config, "torch_autocast.enabled"))
        gathers = value_at(config, "zero_optimization.stage") == 3 and not on_cpu
        key = (clips, frames, tokens, dtype, autocast, checkpointing, gathers, on_cpu, compiled)
        if key not in self._traces:
            try:
                self._traces[key] = trace(
                    self._traced,
                    clips=clips,
                    frames=frames,
                    tokens=tokens,
                    dtype=dtype,
                    autocast=autocast,
                    checkpointing=checkpointing,
                    ctc_weight=self.recipe.training.ctc_weight,
                    gathers=gathers,
                    compiled=compiled,
                    on_cpu=on_cpu,
                )
            except UNTRACEABLE as error:
                # A model that decides by the values of tensors, which the meta device does not have.
                raise UserError(
                    f"model.backbone={self.recipe.model.backbone}: its passes cannot be traced without memory: "
                    f"{(str(error) or type(error).__name__).splitlines()[0][:120]}",
                    "plan a recipe with a similar backbone, or try small micro-batches",
                ) from error
        return self._traces[key]

    def translation(self, config: Tree, workload: Workload, *, graphs: bool = False) -> TranslationMemory:
        """The largest generation batch of an evaluation, whose steps may be CUDA graphs."""
        dtype = TORCH_DTYPES[parameter_precision(config)]
        key = (dtype, workload.evaluated, graphs)
        if key not in self._translations:
            settings = self.recipe.evaluation
            model = self._traced.model.to(dtype)  # its configuration has all layers
            self._translations[key] = max(
                (
                    translation_memory(
                        model,
                        clips=clips,
                        frames=frames,
                        beams=settings.num_beams,
                        max_new_tokens=settings.max_new_tokens,
                        graphs=graphs,
                    )
                    for clips, frames in workload.evaluated
                ),
                key=lambda memory: memory.working,
            )
        return self._translations[key]
