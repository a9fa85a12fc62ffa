"""What ``training.compile`` becomes with a model, a DeepSpeed JSON and a device.

Layers are compiled one by one; ``toolkit/models/compiled.py`` does it. Whole passes of them can be CUDA graphs, which
``toolkit/training/pass_graphs.py`` captures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.tensor_parallel import tensor_parallel_size
from toolkit.recipe.model_cards import architecture_of
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

BREAKING = frozenset({"led"})  # architectures whose layers have no graph of their own
ASKING = frozenset({"led", "longt5"})  # those whose passes ask the GPU for values of a mask
SPLIT = "ranks that hold a layer together (tensor_parallel.autotp_size) sum its outputs in the middle of it"


@dataclass(frozen=True)
class Compilation:
    """Whether the layers of a run are compiled, and why."""

    compiles: bool
    reason: str
    graphs: bool = False  # passes are CUDA graphs

    def in_words(self) -> str:
        layers = "compiled" if self.compiles else "not compiled"
        return f"{layers}{', passes as CUDA graphs' if self.graphs else ''} ({self.reason})"


def compilation(recipe: Recipe, config: Tree, *, has_gpu: bool) -> Compilation:
    """Whether the layers of the recipe's model are compiled with a resolved DeepSpeed JSON."""
    wanted = recipe.training.compile
    if wanted is False:
        return Compilation(False, "training.compile=false")
    if wanted == "graphs":
        where = "" if has_gpu else "; on CPUs there are none, and passes run as they are written"
        works = graphs_obstacle(recipe, config) is None
        return Compilation(works and has_gpu, f"training.compile=graphs{where}", graphs=works)
    if value_at(config, "compile.deepcompile"):
        return Compilation(False, "compile.deepcompile compiles the whole model")
    if reason := _obstacle(recipe, config):
        return Compilation(False, f"training.compile={wanted}: {reason}")
    if wanted is True:
        return Compilation(True, "training.compile=true")
    if not has_gpu:
        return Compilation(False, "training.compile=auto: layers made for CPUs are faster")
    return Compilation(True, "training.compile=auto: where a batch is large enough")


def compilation_problems(recipe: Recipe, config: Tree) -> Iterator[UserError]:
    """The refusal of ``training.compile=true`` where layers cannot be compiled, and of ``graphs`` without them."""
    if recipe.training.compile == "graphs" and (reason := graphs_obstacle(recipe, config)):
        yield UserError(f"training.compile=graphs: {reason}", "set training.compile=auto, which has no such limits")
    if recipe.training.compile is not True or value_at(config, "compile.deepcompile"):
        return
    if reason := _obstacle(recipe, config):
        yield UserError(
            f"training.compile=true: {reason}", "set training.compile=auto, which compiles layers where they can be"
        )


def graphs_obstacle(recipe: Recipe, config: Tree) -> str | None:
    """Why the passes of a run cannot be CUDA graphs; None where they can."""
    training, stage = recipe.training, value_at(config, "zero_optimization.stage") or 0
    autocast = "ds.torch_autocast.enabled=true in place of ds.bf16.enabled=true"
    obstacles: list[tuple[Any, str]] = [
        (tensor_parallel_size(config) > 1, SPLIT),
        (stage > 1, f"ZeRO stage {stage} sums gradients over ranks while they are computed; stages 0 and 1 do not"),
        (
            value_at(config, "zero_optimization.offload_optimizer.device") not in (None, "none"),
            "zero_optimization.offload_optimizer moves gradients to the host as they come",
        ),
        (value_at(config, "fp16.enabled"), "the loss scale of fp16 is read for each step"),
        (
            value_at(config, "bf16.enabled") and not stage,
            f"bf16 weights at stage 0 have an optimizer that is not supported; stage 1 is, and {autocast}",
        ),
        (value_at(config, "compile.deepcompile"), "compile.deepcompile has graphs of its own"),
        (
            value_at(config, "timers.throughput.enabled") or value_at(config, "wall_clock_breakdown"),
            "DeepSpeed's timers (timers.throughput, wall_clock_breakdown) wait for the GPU in every pass",
        ),
        (
            training.gradient_checkpointing is True,  # auto keeps activations then
            "training.gradient_checkpointing reads the state of random numbers, which waits for the GPU",
        ),
        (
            training.freeze_backbone_steps,
            "training.freeze_backbone_steps changes which weights train, and a graph belongs to these",
        ),
        (training.ctc_weight, "the CTC loss (training.ctc_weight) needs lengths on the host"),
        (recipe.model.quantization, "bitsandbytes launches kernels of quantised layers by itself (model.quantization)"),
        (training.padding == "longest", "training.padding=longest has too many shapes, and a graph belongs to one"),
    ]
    reason = next((reason for holds, reason in obstacles if holds), None)
    with contextlib.suppress(UserError):  # an unknown model is listed elsewhere
        if reason is None and (architecture := architecture_of(recipe.model)) in ASKING:
            return f"the passes of a {architecture} ask for the values of a mask, which waits for the GPU"
    return reason


def _obstacle(recipe: Recipe, config: Tree) -> str | None:
    """Why layers cannot be compiled one by one; None where they can."""
    if tensor_parallel_size(config) > 1:
        return SPLIT
    if value_at(config, "zero_optimization.stage") == 3:
        return "ZeRO stage 3 gathers weights between the parts of a layer, which breaks its graph"
    if recipe.model.quantization:
        return f"layers quantised by bitsandbytes ({recipe.model.quantization.kind}) are not compiled"
    with contextlib.suppress(UserError):  # an unknown model is listed elsewhere
        if (architecture := architecture_of(recipe.model)) in BREAKING:
            return f"the layers of a {architecture} branch on the values of a mask, which breaks their graphs"
    return None
