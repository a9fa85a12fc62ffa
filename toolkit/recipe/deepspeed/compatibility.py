"""The compatibility table: what can be trained with what, as data.

A cell is one way to train: architecture × precision × adapter × quantisation × ZeRO stage × offload. ``refusal`` gives
the reason why a cell cannot be trained; the tests train every cell that has none. Nothing here reads a file or knows
how a recipe spells its settings; see ``cells.py``.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

# HuggingFace model_type of language models whose masks and caches were compared with HuggingFace's own results; there
# are no others here.
LANGUAGE_MODELS = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2")
# HuggingFace model_type of every backbone family that is promised; any other seq2seq model may work and is not tested.
ARCHITECTURES = (
    "t5",
    "mt5",
    "umt5",
    "longt5",
    "bart",
    "mbart",
    "m2m_100",
    "pegasus",
    "marian",
    "led",
    "encoder-decoder",
    "t5gemma",
    "t5gemma2",
    *LANGUAGE_MODELS,
)
PRECISIONS = ("fp32", "bf16", "autocast", "fp16")  # autocast: fp32 parameters, matrix products in bf16
ADAPTERS = ("none", "lora", "dora", "rslora")
QUANTIZATIONS = ("none", "int8", "nf4")
ZERO_STAGES = (0, 1, 2, 3)
OFFLOADS = ("none", "optimizer", "param", "optimizer+param", "nvme")  # nvme: optimizer states; parameters on the host

# Architectures whose activations leave fp16's range and turn the loss into NaN.
OVERFLOWS_IN_FP16 = frozenset({"t5", "mt5", "umt5", "longt5", "pegasus", "t5gemma", "t5gemma2", "gemma", "gemma2"})

# DeepSpeed settings that only a GPU host can carry out: dotted key -> what it is.
GPU_ONLY = {
    "compile.deepcompile": "DeepCompile",
    "zero_optimization.leaf_module": "modules gathered as a whole",  # their gradients are recorded on a CUDA stream
    "zero_optimization.stage3_module_granularity_threshold": "modules gathered as a whole",
    "zero_optimization.zero_hpz_partition_size": "ZeRO++ parameters kept whole on each node",
    "zero_optimization.zero_quantized_weights": "ZeRO++ quantised weights",
    "zero_optimization.zero_quantized_gradients": "ZeRO++ quantised gradients",
}


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Attributes:
        architecture: HuggingFace ``model_type``; None = not known before the model is read. Rules about an
            architecture then refuse nothing.
        precision, adapter, quantization, zero_stage, offload: one value of each axis above.
    """

    architecture: str | None
    precision: str = "fp32"
    adapter: str = "none"
    quantization: str = "none"
    zero_stage: int = 0
    offload: str = "none"

    def __str__(self) -> str:
        return " ".join(str(value) for value in astuple(self))


def _overflow(cell: Cell) -> str | None:
    if cell.precision == "fp16" and cell.architecture in OVERFLOWS_IN_FP16:
        return f"a {cell.architecture} overflows to NaN in fp16"
    return None


def _unscaled_loss(cell: Cell) -> str | None:
    if cell.precision == "fp16" and cell.zero_stage == 0:
        return (
            "at ZeRO stage 0 DeepSpeed divides the gradients of fp16 by a scale by which it has not multiplied the loss"
        )
    return None


def _quantised_without_adapter(cell: Cell) -> str | None:
    if cell.quantization != "none" and cell.adapter == "none":
        return f"{cell.quantization} weights are frozen, and without an adapter nothing of the backbone trains"
    return None


def _int8_partitioned(cell: Cell) -> str | None:
    if cell.quantization == "int8" and cell.zero_stage == 3:
        return (
            "int8 and ZeRO stage 3 exclude each other: stage 3 partitions parameters, and the scales of an int8 weight "
            "belong to whole rows"
        )
    return None


def _dora_on_quantised(cell: Cell) -> str | None:
    if cell.adapter == "dora" and cell.quantization == "int8":
        return (
            "DoRA reads whole weights, and bitsandbytes' int8 layer loses its scales when peft unpacks it: its forward "
            "pass fails"
        )
    if cell.adapter == "dora" and cell.quantization == "nf4" and cell.zero_stage == 3:
        return (
            "DoRA unpacks NF4 weights into copies that ZeRO stage 3 does not know and fails to gather in the backward "
            "pass"
        )
    return None


def _led_packed_in_autocast(cell: Cell) -> str | None:
    if cell.architecture == "led" and cell.quantization == "nf4" and cell.precision == "autocast":
        return "the first gradients of a led with NF4 layers under autocast are NaN"
    return None


def _offload_without_its_stage(cell: Cell) -> str | None:
    if cell.offload == "optimizer" and cell.zero_stage == 0:
        return "optimizer states are offloaded by ZeRO stages 1, 2 and 3, not by stage 0"
    if cell.offload == "nvme" and cell.zero_stage != 3:
        return f"NVMe is used by ZeRO stage 3 only, not by stage {cell.zero_stage}"
    if cell.offload in ("param", "optimizer+param") and cell.zero_stage != 3:
        return f"parameters are offloaded by ZeRO stage 3, not by stage {cell.zero_stage}"
    return None


RULES: tuple[Callable[[Cell], str | None], ...] = (
    _overflow,
    _unscaled_loss,
    _quantised_without_adapter,
    _int8_partitioned,
    _dora_on_quantised,
    _led_packed_in_autocast,
    _offload_without_its_stage,
)


def refusal(cell: Cell) -> str | None:
    """Why ``cell`` cannot be trained: every reason, in one line; None where it can."""
    return "; ".join(reasons(cell)) or None


def reasons(cell: Cell) -> list[str]:
    """Every reason why ``cell`` cannot be trained."""
    return [reason for rule in RULES if (reason := rule(cell))]


def alternatives(cell: Cell) -> list[Cell]:
    """The nearest cells that can be trained: those that differ in one decision, else in two; nearest values first.

    ZeRO stage and offload are one decision, as one DeepSpeed JSON makes both. The architecture stays, and fp16 is never
    advised.
    """
    decisions: tuple[list[dict[str, Any]], ...] = (
        [
            {"zero_stage": stage, "offload": offload}
            for stage in sorted(ZERO_STAGES, key=lambda stage: abs(stage - cell.zero_stage))
            for offload in sorted(OFFLOADS, key=lambda offload: offload != cell.offload)
            if (stage, offload) != (cell.zero_stage, cell.offload)
        ],
        [{"quantization": kind} for kind in reversed(QUANTIZATIONS) if kind != cell.quantization],
        [{"adapter": adapter} for adapter in ADAPTERS if adapter != cell.adapter],
        [{"precision": precision} for precision in ("bf16", "autocast", "fp32") if precision != cell.precision],
    )
    for number in (1, 2):
        found = [
            changed
            for chosen in itertools.combinations(decisions, number)
            for changes in itertools.product(*chosen)
            if refusal(changed := replace(cell, **dict(ChainMap(*changes)))) is None
        ]
        if found:
            return found
    return []


def cells() -> Iterator[Cell]:
    """The whole table: every combination of the axes, refused or not."""
    for values in itertools.product(ARCHITECTURES, PRECISIONS, ADAPTERS, QUANTIZATIONS, ZERO_STAGES, OFFLOADS):
        yield Cell(*values)


def needs_gpu(cell: Cell) -> bool:
    """Whether the cell trains on GPUs only: CPUs compute fp16 too slowly, and DeepSpeed refuses it there."""
    return cell.precision == "fp16"
