"""What was asked of one GPU beside what ``gpu.py`` has measured, and a picture of it, for docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

NOT_MEASURED = "not measured"
OURS = {"reached": "ours", "as graphs": "ours_graphs"}  # column -> side; the first is what recipes do
LOOPS = ("bare", "plain", "fastest")
NAMES = {
    "ours": "this toolkit",
    "ours_graphs": "as graphs",
    "ours_64": "this toolkit, 64",
    "hf_16": "Seq2SeqTrainer, 16",
    "hf_best": "Seq2SeqTrainer, best",
    "bare": "bare DeepSpeed",
    "plain": "plain PyTorch",
    "fastest": "PyTorch, our kernels",
}
ACROSS = 3  # panels of the picture beside each other
OWN = {words for side, words in NAMES.items() if side.startswith("ours")}
Row = dict[str, Any]


class Aim(NamedTuple):
    """One figure that was asked for.

    Attributes:
        row: of the results.
        what: in words.
        asked: in words.
        figures: column of the table -> figure, from the row; columns without one are left out.
    """

    row: str
    what: str
    asked: str
    figures: Callable[[Row], dict[str, float]]


def speeds(row: Row, sides: Iterable[str]) -> list[float]:
    """Clips a second of those sides that were measured."""
    found = (row.get("sides", {}).get(side, {}).get("clips_per_second") for side in sides)
    return [speed for speed in found if speed]


def by_fastest_of(*peers: str) -> Callable[[Row], dict[str, float]]:
    """Our speed by that of the fastest of some peers."""

    def figures(row: Row) -> dict[str, float]:
        fastest = max(speeds(row, peers), default=0.0)
        if not fastest:
            return {}
        return {column: own / fastest for column, side in OURS.items() for own in speeds(row, [side])}

    return figures


def of_ours(key: str) -> Callable[[Row], dict[str, float]]:
    """A figure of our own sides, where it is a number."""

    def figures(row: Row) -> dict[str, float]:
        sides = row.get("sides", {})
        found = {column: sides.get(side, {}).get(key) for column, side in OURS.items()}
        return {column: value for column, value in found.items() if isinstance(value, int | float)}

    return figures


def of_side(side: str, key: str) -> Callable[[Row], dict[str, float]]:
    return lambda row: {"reached": row["sides"][side][key]} if key in row.get("sides", {}).get(side, {}) else {}


def largest(key: str) -> Callable[[Row], dict[str, float]]:
    """The largest figure of all sides."""

    def figures(row: Row) -> dict[str, float]:
        found = [side[key] for side in row.get("sides", {}).values() if key in side]
        return {"reached": max(found)} if found else {}

    return figures


def of_row(key: str) -> Callable[[Row], dict[str, float]]:
    return lambda row: {"reached": row[key]} if key in row else {}


def of_whole_batch(row: str, name: str) -> list[Aim]:
    """What is asked of a model at 128 clips a step."""
    return [
        Aim(row, f"{name}, 128 clips: by Seq2SeqTrainer with micro-batches of 16", ">= 4", by_fastest_of("hf_16")),
        Aim(row, f"{name}, 128 clips: by Seq2SeqTrainer at its best", ">= 1.5", by_fastest_of("hf_16", "hf_best")),
        Aim(row, f"{name}, 128 clips: by the fastest bare loop", ">= 0.95", by_fastest_of(*LOOPS)),
    ]


def of_chip(row: str, name: str, mfu: str) -> list[Aim]:
    return [
        Aim(row, f"{name}: share of a step in which the chip is busy", ">= 0.85", of_ours("busy")),
        Aim(row, f"{name}: MFU", mfu, of_ours("mfu")),
    ]


AIMS = [
    Aim("t5_base_16", "T5-Base, 16 clips a step: by Seq2SeqTrainer", ">= 2", by_fastest_of("hf_16")),
    Aim("t5_base_16", "T5-Base, 16 clips a step: busy", ">= 0.5", of_ours("busy")),
    *of_whole_batch("t5_base_128", "T5-Base"),
    *of_whole_batch("t5_small_128", "T5-Small"),
    *of_chip("t5_base_128", "T5-Base", ">= 0.35"),
    *of_chip("t5_large", "T5-Large", ">= 0.45"),
    *of_chip("t5_3b_lora", "T5-3B with LoRA", ">= 0.45"),
    Aim("t5_base_starts", "seconds that compiling adds to the first start", "<= 60", of_side("first", "added_seconds")),
    Aim("t5_base_starts", "seconds that it adds to a later start", "<= 15", of_side("later", "added_seconds")),
    Aim("evaluation", "beam search, 5 beams: by HuggingFace's generate", ">= 3", of_row("ratio")),
    Aim("t5_base_as_typed", "share of the time that ranks wait for data", "<= 0.02", largest("data_wait_share")),
    Aim("every_deepspeed_json", "losses of all JSONs, from ZeRO-1's", "equal", largest("farthest_from_zero1")),
    Aim("resume_on_another_stage", "losses of a resumed run", "equal", of_row("farthest_from_whole")),
]


def aims_of(results: dict[str, Row]) -> list[dict[str, Any]]:
    """A table of what was asked and reached; none where nothing of it was measured."""
    rows: list[dict[str, Any]] = []
    for aim in AIMS:
        row = results.get(aim.row, {})
        figures = aim.figures(row)
        columns = figures if figures else {"reached": NOT_MEASURED}
        measured = {"row": aim.row, "device": row.get("device", "")} if figures else {}
        rows.append({"what": aim.what, "asked": aim.asked} | columns | measured)
    columns = ("what", "asked", *OURS, "row", "device")
    is_measured = any(row["reached"] != NOT_MEASURED for row in rows if "reached" in row)
    return [{column: row.get(column, "") for column in columns} for row in rows] if is_measured else []


def panels_of(results: dict[str, Row]) -> dict[str, Row]:
    """Rows with our side and peers; those that measure more sides of the same steps on the same device are one."""
    found: dict[str, Row] = {}
    for name, row in results.items():
        first = found.setdefault(re.sub("_(peers|loops)$", "", name), {})
        if first and any(first.get(key) != row.get(key) for key in ("device", "clips_a_step")):
            continue
        sides = first.get("sides", {}) | row.get("sides", {})
        first |= {key: row[key] for key in ("device", "clips_a_step") if key in row} | {"sides": sides}
    return {name: row for name, row in found.items() if speeds(row, ["ours"]) and speeds(row, ["hf_16", *LOOPS])}


def draw(results: dict[str, Row], path: Path) -> None:
    """Bars of clips a second, a panel for each row with peers; its title names the device. None without such a row."""
    panels = panels_of(results)
    if not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars_of = {
        name: {words: speed for side, words in NAMES.items() for speed in speeds(row, [side])}
        for name, row in panels.items()
    }
    most, columns = max(map(len, bars_of.values())), min(ACROSS, len(panels))
    size = (4.2 * columns, 3.2 * -(-len(panels) // columns))
    figure, axes = pyplot.subplots(-(-len(panels) // columns), columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, row) in zip(axes.flat, panels.items(), strict=False):
        found = bars_of[name]
        colours = ["#2563a8" if words in OWN else "#b8bec6" for words in found]
        bars = axis.barh(list(found), list(found.values()), color=colours, height=0.65)
        axis.bar_label(bars, [f"{speed:,.0f}" for speed in found.values()], padding=2, fontsize=8)
        axis.set_ylim(most - 0.4, -0.6)  # bars of all panels are as thick
        axis.set_xlim(0, max(found.values()) * 1.2)
        axis.set_title(f"{name}, {row['clips_a_step']} clips a step\n{row['device']}, clips/s", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
