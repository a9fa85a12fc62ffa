"""The files of a run directory, read for a report.

A file that is missing is left out, and so is a broken one, with a warning: a crashed run needs a report, too.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from toolkit.errors import UserError
from toolkit.recipe.tree import leaves, value_at
from toolkit.scoring.groups import GROUPED_BY
from toolkit.scoring.metrics import SCORE_NAMES, higher_is_better
from toolkit.scoring.table import SOMETIMES

# Points that a curve is drawn with; more cannot be distinguished on a screen.
CURVE_POINTS = 200
LONGEST_TEXT = 200_000  # characters of a recipe or JSON that a report shows
MOST_WARNINGS = 40
# What every entry of metrics.jsonl has besides its figures.
_NOT_FIGURES = {"kind", "step", "time", "name", "rows"}
_LOG_LINE = re.compile(r"^[\d\- :,.]+\s*(?P<source>\S+) (?P<level>WARNING|ERROR|CRITICAL) (?P<message>.*)$")


@dataclass
class RunFiles:
    """A run directory, read.

    ``status`` to ``scores`` are the files of these names, empty where there is none. Figures are those of the training
    loop and of evaluations, each a list in the order of logging; ``samples`` are tables of sample outputs.
    """

    folder: Path  # where it is
    status: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # recipe and DeepSpeed JSON as written
    train: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)  # figure -> (steps, values)
    evaluations: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)  # the same
    events: list[dict[str, Any]] = field(default_factory=list)  # entries of kind ``event``
    memory: dict[str, float] = field(default_factory=dict)  # figures of the last entry of kind ``memory``
    samples: list[tuple[int, str, list[dict[str, Any]]]] = field(default_factory=list)  # step, name, rows
    warnings: list[str] = field(default_factory=list)  # what a reader should know, in words

    @property
    def name(self) -> str:
        return self.folder.name or str(self.folder)

    def setting(self, dotted: str) -> Any:
        """A value of the recipe by its dotted name; None where the recipe lacks it."""
        return value_at(self.recipe, dotted)


def read_run(folder: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        UserError: the folder is not one.
    """
    folder = folder.resolve()
    if not (folder / "status.json").is_file() and not (folder / "metrics.jsonl").is_file():
        what = "is not a run directory" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}", "give the folder that holds a run's status.json and metrics.jsonl")
    run = RunFiles(folder)
    run.status = _read_tree(run, "status.json")
    run.recipe = _read_tree(run, "recipe.yaml")
    run.deepspeed = _read_tree(run, "deepspeed.json")
    run.environment = _read_tree(run, "environment.json")
    run.scores = _read_tree(run, "scores.json")
    _read_metrics(run)
    _add_warnings(run)
    return run


def _read_tree(run: RunFiles, name: str) -> dict[str, Any]:
    """The mapping in a JSON or YAML file."""
    path = run.folder / name
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        run.warnings.append(f"{name} is not readable and left out: {_one_line(str(error))}")
        return {}
    if not isinstance(tree, dict):
        run.warnings.append(f"{name} holds no settings and is left out")
        return {}
    run.texts[name] = text[:LONGEST_TEXT]
    return tree


def _read_metrics(run: RunFiles) -> None:
    """Sort the entries of ``metrics.jsonl`` by their kind."""
    train: defaultdict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    evaluations: defaultdict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    not_finite: dict[str, int] = {}
    for entry in _entries(run):
        kind, step = entry.get("kind"), entry["step"]
        if kind == "event":
            run.events.append({"step": step, **{key: entry[key] for key in entry if key not in ("kind", "step")}})
        elif kind == "table" and isinstance(entry.get("rows"), list):
            rows = [row for row in entry["rows"] if isinstance(row, dict)]
            run.samples.append((step, str(entry.get("name", "")), rows))
        elif kind == "memory":
            run.memory = {name: float(entry[name]) for name in entry.keys() - _NOT_FIGURES if is_number(entry[name])}
        elif kind in ("train", "eval"):
            figures = train if kind == "train" else evaluations
            for name, value in entry.items():
                if name in _NOT_FIGURES:
                    continue
                if is_number(value):
                    figures[name][0].append(step)
                    figures[name][1].append(float(value))
                elif value is None:
                    not_finite.setdefault(name, step)
    run.train, run.evaluations = dict(train), dict(evaluations)
    run.warnings += [f"{name} was not finite for the first time at step {step:,}" for name, step in not_finite.items()]


def _entries(run: RunFiles) -> Iterator[dict[str, Any]]:
    """The complete entries of ``metrics.jsonl``, read line by line: a long run's file may be large."""
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        return
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                broken += 1
                continue
            if isinstance(entry, dict) and is_number(entry.get("step")):
                yield entry | {"step": int(entry["step"])}
    if broken:
        run.warnings.append(f"lines of metrics.jsonl that cannot be read, as a crash leaves them: {broken}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number (true and false are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _add_warnings(run: RunFiles) -> None:
    """Add warnings about the run as a whole: its end, its scores, its log."""
    state, reason = run.status.get("status"), run.status.get("reason")
    if state in ("failed", "interrupted"):
        what = "the run failed" if state == "failed" else "the run was interrupted"
        run.warnings.insert(0, f"{what}: {_one_line(str(reason))}" if reason else what)
    elif state == "running":
        run.warnings.insert(0, "the run had not ended when this report was written, or was killed")
    run.warnings += not_above_floors(run)
    run.warnings += _log_warnings(run.folder / "log.txt")


def not_above_floors(run: RunFiles) -> list[str]:
    """A warning for each split on which the score that picks the model is no better than guessing."""
    name = run.setting("evaluation.select_by")
    if name not in SCORE_NAMES:
        return []
    warnings = []
    for split, result in _splits(run.scores).items():
        value = result["scores"].get(name)
        for kind, floor in result["floors"].items():
            limit = floor.get(name)
            if (
                is_number(value)
                and is_number(limit)
                and not (value > limit if higher_is_better(name) else value < limit)
            ):
                warnings.append(f"{name} on {split} ({value:.4g}) is no better than its floor '{kind}' ({limit:.4g})")
    return warnings


def _splits(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The well-formed splits of a ``scores.json``: each with ``scores`` and ``floors``."""
    splits = scores.get("splits")
    if not isinstance(splits, dict):
        return {}
    found = {}
    for name, result in splits.items():
        if isinstance(result, dict) and isinstance(result.get("scores"), dict):
            floors = result.get("floors")
            floors = floors if isinstance(floors, dict) else {}
            found[name] = result | {"floors": {kind: item for kind, item in floors.items() if isinstance(item, dict)}}
    return found


def score_tables(run: RunFiles) -> list[dict[str, Any]]:
    """Of each split ``name``, ``clips``, ``rows``: (label, score by name), the model's first, then its floors, and the
    ``intervals`` of the model's scores: (lowest, highest) by name; ``groups`` of clips: what they are grouped by, and
    rows of name, clips and score by name."""
    return [
        {
            "name": name,
            "clips": result.get("clips"),
            "rows": [["model", _scores(result["scores"])]]
            + [[f"floor: {kind}", _scores(floor)] for kind, floor in result["floors"].items()],
            "intervals": _intervals(result.get("intervals")),
            "groups": _groups(result.get("groups")),
        }
        for name, result in _splits(run.scores).items()
    ]


def _scores(values: dict[str, Any]) -> dict[str, float | None]:
    """Scores of one set of translations; those that few runs have are left out where there is none."""
    found = {name: values[name] if is_number(values.get(name)) else None for name in SCORE_NAMES if name in values}
    return {name: value for name, value in found.items() if value is not None or name not in SOMETIMES}


def _groups(values: Any) -> list[dict[str, Any]]:
    """The well-formed groups of clips."""
    found = []
    for kind, groups in values.items() if isinstance(values, dict) else ():
        rows = [
            [name, scores.get("clips"), _scores(scores)]
            for name, scores in (groups.items() if isinstance(groups, dict) else ())
            if isinstance(scores, dict) and is_number(scores.get("clips"))
        ]
        if rows:
            found.append({"by": GROUPED_BY.get(kind, kind), "rows": rows})
    return found


def _intervals(values: Any) -> dict[str, list[float]]:
    """The well-formed ones: two numbers each."""
    if not isinstance(values, dict):
        return {}
    pairs = {name: pair for name, pair in values.items() if isinstance(pair, list) and len(pair) == 2}
    return {name: pairs[name] for name in SCORE_NAMES if name in pairs and all(map(is_number, pairs[name]))}


def _log_warnings(path: Path) -> list[str]:
    """Distinct warnings and errors of the log file with their number."""
    if not path.is_file():
        return []
    counts: Counter[str] = Counter()
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if found := _LOG_LINE.match(line):
                counts[_one_line(f"{found['source']}: {found['message']}")] += 1
    lines = [text if count == 1 else f"{text} ({count} times)" for text, count in counts.items()]
    more = len(lines) - MOST_WARNINGS
    return [*lines[:MOST_WARNINGS], *([f"and {more} more in log.txt"] if more > 0 else [])]


def thin_curves(figures: dict[str, tuple[list[int], list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Figures thinned to what can be drawn: of each the mean, lowest and highest value of up to 200 stretches.

    Returns:
        name -> ``x`` (last step of each stretch), ``y`` (mean), and ``low``, ``high`` where stretches hold several.
    """
    thinned = {}
    for name, (steps, values) in figures.items():
        y = np.asarray(values, np.float64)
        starts = np.unique(np.linspace(0, len(y), min(len(y), CURVE_POINTS), endpoint=False).astype(np.intp))
        ends = np.append(starts[1:], len(y))
        curve = {
            "x": np.asarray(steps)[ends - 1].tolist(),
            "y": _rounded(np.add.reduceat(y, starts) / (ends - starts)),
        }
        if len(starts) < len(y):
            curve["low"], curve["high"] = (_rounded(f.reduceat(y, starts)) for f in (np.minimum, np.maximum))
        thinned[name] = curve
    return thinned


def _rounded(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Five digits draw any curve and keep the page small."""
    return [float(f"{value:.5g}") for value in values]


def flatten(tree: dict[str, Any]) -> dict[str, str]:
    """A tree of settings as dotted name -> value in words."""
    return {
        ".".join(str(key) for key in path): value if isinstance(value, str) else json.dumps(value, default=str)
        for path, value in leaves(tree)
    }


def _one_line(text: str, longest: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
