"""Tensor parallelism, by DeepSpeed's AutoTP: consecutive ranks hold the layers of one copy of a model together.

``tensor_parallel: {autotp_size: N}`` splits the matrices of each layer of a language model into N parts. The N ranks of
a copy read the same clips, so that a step is shared out over copies (data-parallel ranks) and not over ranks. Pose
encoder, token table, output matrix and norms are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.cells import offload_of, training_precision
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

KEY = "tensor_parallel.autotp_size"


def tensor_parallel_size(config: Tree) -> int:
    """Ranks that hold one copy of the model together; 1 where each has a whole one, or its ZeRO partition."""
    size = value_at(config, KEY)
    return size if isinstance(size, int) and size > 1 else 1


def tensor_parallel_problems(
    recipe: Recipe, config: Tree, *, world_size: int, architecture: str | None
) -> Iterator[UserError]:
    """What AutoTP is refused with: what does not divide, and what is not known to train as one rank does.

    ``architecture`` is None where it is not known yet.
    """
    given = value_at(config, KEY)
    if isinstance(given, int) and given < 0:
        yield UserError(f"{KEY}={given} is negative", f"set ds.{KEY}=2, or ds.tensor_parallel=null")
    size = tensor_parallel_size(config)
    if size == 1:
        return
    here = f"{KEY}={size}"
    if world_size % size:
        yield UserError(
            f"{here} does not divide {world_size} rank{'s' if world_size > 1 else ''}",
            f"start {-(-world_size // size) * size} ranks, or set ds.{KEY} to a divisor",
        )
    if architecture is not None and architecture not in LANGUAGE_MODELS:
        yield UserError(
            f"{here} splits layers of language models; model.backbone={recipe.model.backbone} is a {architecture}",
            f"use --ds zero3, which divides any model, or a backbone of {', '.join(LANGUAGE_MODELS)}",
        )
    for key, remedy in _not_with(recipe, config):
        yield UserError(f"{here} does not go with {key}", f"{remedy}, or use --ds zero3 and ds.tensor_parallel=null")


def _not_with(recipe: Recipe, config: Tree) -> Iterator[tuple[str, str]]:
    """Settings that were not shown to train as one rank does: each with its remedy."""
    model, training = recipe.model, recipe.training
    stage, offload = value_at(config, "zero_optimization.stage") or 0, offload_of(config)
    settings: tuple[tuple[Any, str, str], ...] = (
        (stage == 3, "ZeRO stage 3", "use --ds zero2"),
        (offload != "none", f"offload ({offload})", "take zero_optimization.offload_* out"),
        (training_precision(config) == "fp16", "fp16", "set ds.bf16.enabled=true in place of fp16"),
        (model.lora, "model.lora", "set model.lora=null"),
        (model.quantization, "model.quantization", "set model.quantization=null"),
        (
            training.optimizer != "adamw",
            f"training.optimizer={training.optimizer}",
            "set training.optimizer=adamw",
        ),
        (value_at(config, "compile.deepcompile"), "compile.deepcompile", "set ds.compile=null"),
        (
            training.micro_batch_size == "auto",
            "training.micro_batch_size=auto, which rehearses on one rank",
            "set training.micro_batch_size=8, say",
        ),
    )
    yield from ((key, remedy) for holds, key, remedy in settings if holds)
