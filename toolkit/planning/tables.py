"""The tables of docs/models.md, drawn from model cards, recipes, arithmetic and the compatibility table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from toolkit.planning.costs.counts import Counts, count
from toolkit.planning.costs.zero import zero_memory
from toolkit.planning.hardware import GIB
from toolkit.recipe.catalogue import catalogue, millions
from toolkit.recipe.deepspeed.cells import cell_of
from toolkit.recipe.deepspeed.compatibility import (
    ADAPTERS,
    ARCHITECTURES,
    OFFLOADS,
    PRECISIONS,
    QUANTIZATIONS,
    ZERO_STAGES,
    Cell,
    needs_gpu,
    reasons,
    refusal,
)
from toolkit.recipe.deepspeed.json_file import load_deepspeed
from toolkit.recipe.model_cards import architecture_of, load_model_yaml, model_names
from toolkit.recipe.schema import Recipe

MEMORY_JSONS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def write_tables(path: Path) -> None:
    """Update the tables between the marks of a document."""
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    """``text`` with every table between ``<!-- NAME -->`` and ``<!-- /NAME -->`` drawn again."""
    for name, draw in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{draw()}\n\n{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


def cards_table() -> str:
    """All model cards."""
    cards = [load_model_yaml(name) for name in model_names()]
    rows = [
        (
            f"`{card.name}`",
            f"`{card.hub_id}`" if card.hub_id else "from scratch only",
            card.architecture,
            millions(card.parameters),
            card.license,
            card.notes,
        )
        for card in sorted(cards, key=lambda card: (ARCHITECTURES.index(card.architecture), card.parameters))
    ]
    return _table(("card", "published weights", "architecture", "parameters", "licence", "good to know"), rows)


def recipes_table() -> str:
    """All recipes, with what trains and the model states on one GPU."""
    rows = []
    for recipe, counts in _recipes():
        states = zero_memory(counts.weights, recipe, load_deepspeed(recipe.deepspeed, recipe.ds), world_size=1)
        host = f" + {states.host / GIB:.1f} of host memory" if states.host else ""
        size = f"{states.device / GIB:.1f} GiB{host}"
        name, trained = f"`{recipe.name}`", millions(counts.trainable)
        rows.append((name, recipe.description, trained, f"`{recipe.deepspeed}`", size))
    return _table(("recipe", "what it is", "trained", "DeepSpeed JSON", "model states on one GPU"), rows)


def memory_table() -> str:
    """Model states of every recipe under the shipped JSONs, on one GPU and on eight."""
    rows = []
    for recipe, counts in _recipes():
        cells = []
        for name in MEMORY_JSONS:
            config = load_deepspeed(name, recipe.ds)
            if refusal(cell_of(recipe, config, architecture_of(recipe.model))):
                cells.append("refused")
                continue
            sizes = [zero_memory(counts.weights, recipe, config, ranks).device / GIB for ranks in (1, 8)]
            cells.append(" → ".join(f"{size:.1f}" for size in sizes))
        rows.append((f"`{recipe.name}`", *cells))
    return _table(("recipe", *(f"`{name}`, 1 → 8 GPUs" for name in MEMORY_JSONS)), rows)


@cache
def _recipes() -> list[tuple[Recipe, Counts]]:
    return [(recipe, count(recipe)) for recipe in catalogue()[0]]


def placements_table() -> str:
    """Quantisation and adapter × ZeRO stage and offload; ✓ where every architecture and precision but fp16 works."""
    placements = [
        (stage, offload)
        for stage in ZERO_STAGES
        for offload in OFFLOADS
        if refusal(Cell("t5", zero_stage=stage, offload=offload)) is None
    ]
    notes: list[str] = []
    rows = []
    for quantization in QUANTIZATIONS:
        for adapter in ADAPTERS:
            row = [f"{quantization}, {adapter}"]
            for stage, offload in placements:
                row.append(_verdict(quantization, adapter, stage, offload, notes))
            rows.append(tuple(row))
    heading = (
        "quantisation, adapter",
        *(f"{stage}{f' + {offload}' if offload != 'none' else ''}" for stage, offload in placements),
    )
    listed = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1))
    return f"{_table(heading, rows)}\n\n{listed}"


def _verdict(quantization: str, adapter: str, stage: int, offload: str, notes: list[str]) -> str:
    """✓, or the numbers of the reasons; where architectures or precisions differ, the reason names them."""
    found: dict[str, list[str]] = {}
    cells = [
        Cell(architecture, precision, adapter, quantization, stage, offload)
        for architecture in ARCHITECTURES
        for precision in PRECISIONS
        if precision != "fp16"
    ]
    for cell in cells:
        for reason in reasons(cell):
            found.setdefault(reason, []).append(f"{cell.architecture} in {cell.precision}")
    numbers: dict[bool, list[str]] = {True: [], False: []}  # of reasons against all of them, against some
    for reason, where in found.items():
        against_all = len(where) == len(cells)
        note = reason if against_all else f"{reason} ({', '.join(where)})"
        if note not in notes:
            notes.append(note)
        numbers[against_all].append(str(notes.index(note) + 1))
    if numbers[True]:
        return "no: " + ", ".join(numbers[True])
    return "✓ but " + ", ".join(numbers[False]) if numbers[False] else "✓"


def precisions_table() -> str:
    """Architecture × precision, at the ZeRO stages that have all of them."""
    rows = []
    for architecture in ARCHITECTURES:
        row = [architecture]
        for precision in PRECISIONS:
            cell = Cell(architecture, precision, zero_stage=1)
            row.append("no" if refusal(cell) else "on a GPU" if needs_gpu(cell) else "✓")
        rows.append(tuple(row))
    return _table(("architecture", *PRECISIONS), rows)


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {
    "cards": cards_table,
    "recipes": recipes_table,
    "memory": memory_table,
    "placements": placements_table,
    "precisions": precisions_table,
}
