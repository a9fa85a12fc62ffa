"""What ``training.compile`` becomes with a model, a DeepSpeed JSON and a device.

Layers are compiled one by one; ``toolkit/models/compiled.py`` does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.errors import UserError
from toolkit.recipe.model_cards import architecture_of
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

BREAKING = frozenset({"led"})  # architectures whose layers have no graph of their own


@dataclass(frozen=True)
class Compilation:
    """Whether the layers of a run are compiled, and why."""

    compiles: bool
    reason: str

    def in_words(self) -> str:
        return f"{'compiled' if self.compiles else 'not compiled'} ({self.reason})"


def compilation(recipe: Recipe, config: Tree, *, has_gpu: bool) -> Compilation:
    """Whether the layers of the recipe's model are compiled with a resolved DeepSpeed JSON."""
    wanted = recipe.training.compile
    if wanted is False:
        return Compilation(False, "training.compile=false")
    if value_at(config, "compile.deepcompile"):
        return Compilation(False, "compile.deepcompile compiles the whole model")
    if reason := _obstacle(recipe, config):
        return Compilation(False, f"training.compile={wanted}: {reason}")
    if wanted is True:
        return Compilation(True, "training.compile=true")
    if not has_gpu:
        return Compilation(False, "training.compile=auto: layers made for CPUs are faster")
    return Compilation(True, "training.compile=auto")


def compilation_problems(recipe: Recipe, config: Tree) -> Iterator[UserError]:
    """The refusal of ``training.compile=true`` where layers cannot be compiled."""
    if recipe.training.compile is not True or value_at(config, "compile.deepcompile"):
        return
    if reason := _obstacle(recipe, config):
        yield UserError(
            f"training.compile=true: {reason}", "set training.compile=auto, which compiles layers where they can be"
        )


def _obstacle(recipe: Recipe, config: Tree) -> str | None:
    """Why layers cannot be compiled one by one; None where they can."""
    if value_at(config, "zero_optimization.stage") == 3:
        return "ZeRO stage 3 gathers weights between the parts of a layer, which breaks its graph"
    if recipe.model.quantization:
        return f"layers quantised by bitsandbytes ({recipe.model.quantization.kind}) are not compiled"
    with contextlib.suppress(UserError):  # an unknown model is listed elsewhere
        if (architecture := architecture_of(recipe.model)) in BREAKING:
            return f"the layers of a {architecture} branch on the values of a mask, which breaks their graphs"
    return None
