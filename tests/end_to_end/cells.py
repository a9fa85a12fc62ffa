"""Which cells the tests train, and the overrides by which a recipe trains in a cell."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import fields

from toolkit.recipe.deepspeed.compatibility import Cell
from toolkit.recipe.model_cards import load_model_yaml, model_names

AXES = tuple(field.name for field in fields(Cell))
PRECISION = {
    "fp32": ["ds.bf16=null", "ds.torch_autocast=null", "ds.data_types=null"],
    "bf16": ["ds.bf16={enabled: true}", "ds.torch_autocast=null"],
    "autocast": ["ds.bf16=null", "ds.data_types=null", "ds.torch_autocast={enabled: true, dtype: bfloat16}"],
    # With DeepSpeed's first scale, 2**16, all three steps of a test may overflow and change nothing.
    "fp16": [
        *("ds.bf16=null", "ds.data_types=null", "ds.torch_autocast=null"),
        "ds.fp16={enabled: true, initial_scale_power: 8}",
    ],
}
ADAPTER = {
    "none": ["model.lora=null"],
    "lora": ["model.lora={r: 4, dropout: 0}"],
    "dora": ["model.lora={r: 4, dropout: 0, dora: true}"],
    "rslora": ["model.lora={r: 4, dropout: 0, rslora: true}"],
}
QUANTIZATION = {
    name: [f"model.quantization={value}"] for name, value in (("none", "null"), ("int8", "int8"), ("nf4", "nf4"))
}
CPU = "{device: cpu}"
OFFLOAD: dict[str, list[str]] = {
    "none": [],
    "nvme": [],  # a JSON of its own
    "optimizer": [f"ds.zero_optimization.offload_optimizer={CPU}"],
    "param": [f"ds.zero_optimization.offload_param={CPU}"],
    "optimizer+param": [
        f"ds.zero_optimization.offload_optimizer={CPU}",
        f"ds.zero_optimization.offload_param={CPU}",
    ],
}


def overrides_of(cell: Cell) -> list[str]:
    """What makes recipe ``t5_small`` train in ``cell``, with a tiny model."""
    return [
        f"model.backbone={card_of_architecture(cell.architecture or '')}",
        f"deepspeed=zero{cell.zero_stage}{'_nvme' if cell.offload == 'nvme' else ''}",
        *PRECISION[cell.precision],
        *(["ds.data_types=null"] if cell.zero_stage == 0 else []),
        *ADAPTER[cell.adapter],
        *QUANTIZATION[cell.quantization],
        *OFFLOAD[cell.offload],
        # Smaller parameters than this would never be divided.
        *(["ds.zero_optimization.stage3_param_persistence_threshold=0"] if cell.zero_stage == 3 else []),
    ]


@functools.cache
def card_of_architecture(architecture: str) -> str:
    """The first model card of an architecture."""
    return next(name for name in model_names() if load_model_yaml(name).architecture == architecture)


def small_cover(cells: Sequence[Cell]) -> list[Cell]:
    """Few cells among which each architecture stands once, and any two of the other settings that go together.

    Greedy: always the cell that brings the most combinations that are still missing (Cohen et al. 1997, "AETG").
    """
    left = list(cells)
    random.Random(0).shuffle(left)  # otherwise ties always fall to the first values of each axis
    missing = set().union(*(combinations(cell) for cell in left))
    chosen = []
    while missing:
        best = max(left, key=lambda cell: len(combinations(cell) & missing))
        chosen.append(best)
        missing -= combinations(best)
    return chosen


def combinations(cell: Cell) -> set[tuple[object, ...]]:
    """A cell's architecture, and every two of its other settings."""
    settings = [(axis, getattr(cell, axis)) for axis in AXES if axis != "architecture"]
    return {(cell.architecture,), *itertools.combinations(settings, 2)}
