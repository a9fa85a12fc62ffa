"""``report.html``: a run, or several side by side, as one page that opens offline.

The page holds its data as JSON, which its script draws with ``textContent`` and SVG only, so no text of a corpus or a
model becomes markup. A content security policy by hashes lets nothing else run or load. The charts are drawn in the
browser and not by matplotlib, because they show values under the pointer, switch between scales, axes and themes, and
take a few kilobytes each.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit import __version__
from toolkit.files import write_text_atomically
from toolkit.reporting.run_files import RunFiles, flatten, read_run, score_tables, thin_curves
from toolkit.reporting.samples import (
    corpus_warnings,
    describe_corpus,
    describe_split,
    embed_clips,
    find_corpus_of_run,
    predictions_of,
)
from toolkit.scoring.metrics import SCORE_NAMES, higher_is_better
from toolkit.scoring.table import HEADINGS

REPORT = "report.html"
COMPARISON = "comparison.html"
ASSETS = Path(__file__).parent / "assets"
MOST_EVENTS = 200
MOST_EVALUATIONS = 8  # columns of the table that shows how the same outputs change
# Settings that differ between any two runs, so their difference is no information.
_OWN_TO_A_RUN = ("run.dir", "name", "description")


def write_report(run_dir: str | Path, corpus: str | Path | None = None) -> Path:
    """Write ``report.html`` into a run directory, with whatever of the run is there, and return its path.

    The run may have ended, been interrupted, crashed or still be running. Its corpus is found through the run when it
    is not given.

    Raises:
        UserError: there is no run, no such corpus, or the page cannot be written.
    """
    run = read_run(Path(run_dir))
    path = run.folder / REPORT
    write_text_atomically(path, render_page(f"{run.name}: report", _run_content(run, Path(corpus) if corpus else None)))
    return path


def write_comparison(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page that compares several runs: curves, scores, and the settings that differ.

    Raises:
        UserError: one of them is no run, or the page cannot be written.
    """
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    title = " · ".join(run.name for run in runs)
    write_text_atomically(Path(path), render_page(title, _comparison_content(runs)))
    return Path(path)


def render_page(title: str, content: dict[str, Any], script: str = "report.js") -> str:
    """A whole HTML page around ``content``, which ``script`` draws."""
    style = _asset("report.css")
    code = f"{_asset('skeleton.js')}\n{_asset(script)}"
    parts = {
        "title": html.escape(title.encode("utf-8", "replace").decode("utf-8")),
        "policy": f"default-src 'none'; img-src data:; script-src {_csp_hash(code)}; style-src {_csp_hash(style)}",
        "style": style,
        "data": json_for_html(content),
        "script": code,
    }
    # One pass: what looks like a placeholder within a part is not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("report.html"))


def json_for_html(content: Any) -> str:
    """JSON in which no text can end the HTML element that holds it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").strip()


def _csp_hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def _run_content(run: RunFiles, given_corpus: Path | None) -> dict[str, Any]:
    rows = predictions_of(run)
    seed = run.setting("training.seed")
    splits = [describe_split(name, found, seed if isinstance(seed, int) else 0) for name, found in rows.items()]
    corpus = find_corpus_of_run(run, rows, given_corpus) if rows or given_corpus else None
    drawn = embed_clips(splits, corpus) if corpus else {"skeleton": None, "clips": []}
    described = describe_corpus(corpus) if corpus else None
    if corpus:
        run.warnings += corpus_warnings(corpus)
    return {
        "kind": "run",
        **_overview(run),
        "train": thin_curves(run.train),
        "evaluations": thin_curves(run.evaluations),
        "splits": splits,
        **drawn,
        "corpus": described,
        "history": _history(run),
        "memory": memory_rows(run.memory),
        "events": [{"step": event.pop("step"), "what": flatten(event)} for event in run.events[:MOST_EVENTS]],
        "texts": run.texts,
        "environment": flatten(run.environment),
    }


def _comparison_content(runs: list[RunFiles]) -> dict[str, Any]:
    settings = [
        {key: value for key, value in flatten(run.recipe).items() if key not in _OWN_TO_A_RUN}
        | {f"deepspeed.json: {key}": value for key, value in flatten(run.deepspeed).items()}
        for run in runs
    ]
    surroundings = [flatten(run.environment) for run in runs]
    return {
        "kind": "comparison",
        "runs": [
            {
                **_overview(run),
                "train": thin_curves(run.train),
                "evaluations": thin_curves(run.evaluations),
                "epochs_per_step": _epochs_per_step(run),
            }
            for run in runs
        ],
        "settings": differences(settings),
        "surroundings": differences(surroundings),
    }


def differences(settings: list[dict[str, str]]) -> list[list[Any]]:
    """Rows of key and one value a run (None where it has none), of the keys whose values are not the same in all."""
    keys = sorted(set().union(*settings))
    rows = [[key, *(values.get(key) for values in settings)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _overview(run: RunFiles) -> dict[str, Any]:
    """The part of the content that a report and a comparison have in common, for one run."""
    signature = run.scores.get("signature")
    return {
        "name": run.name,
        "folder": str(run.folder),
        "recipe": str(run.recipe.get("name") or ""),
        "description": str(run.recipe.get("description") or ""),
        "status": str(run.status.get("status") or "unknown"),
        "time": str(run.status.get("time") or ""),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "toolkit": __version__,
        "headings": HEADINGS,
        "lower_is_better": [name for name in SCORE_NAMES if not higher_is_better(name)],
        "select_by": run.setting("evaluation.select_by"),
        "facts": _facts(run),
        "scores": score_tables(run),
        "signature": flatten(signature) if isinstance(signature, dict) else {},
        "warnings": run.warnings,
    }


def _facts(run: RunFiles) -> dict[str, Any]:
    """The main figures of a run; those that are unknown are left out."""
    steps = run.scores.get("steps") or run.status.get("step") or _last_step(run)
    gpus = run.environment.get("gpus")
    names = [str(gpu.get("name")) for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    facts = {
        "steps": steps,
        "best step": run.scores.get("best_step"),
        "training seconds": run.scores.get("training_seconds"),
        "clips per second": run.scores.get("clips_per_second"),
        "peak memory (GiB)": run.scores.get("peak_memory_gib"),
        "ranks": run.scores.get("world_size"),
        "ZeRO stage": run.scores.get("zero_stage"),
        "backbone": run.setting("model.backbone"),
        "device": ", ".join(dict.fromkeys(names)) or run.environment.get("cpu"),
    }
    return {name: value for name, value in facts.items() if value not in (None, "", [])}


def memory_rows(figures: dict[str, float]) -> list[dict[str, Any]]:
    """Of each phase that was measured GiB ``measured``, ``reserved``, of the ``process`` and ``planned``, and the
    ``difference`` from the plan, as a share of it; None where a figure is not known.

    Measured is what torch has allocated on the fullest GPU, and without one what the fullest process has had.
    """
    rows = []
    for phase in ("start", "step", "evaluation", "save"):
        process, allocated, reserved, planned = (
            figures.get(f"{phase}_{kind}_gib") for kind in ("process", "allocated", "reserved", "planned")
        )
        measured = process if allocated is None else allocated
        if measured is None:
            continue
        difference = (measured - planned) / planned if planned else None
        found = {"measured": measured, "reserved": reserved, "process": process, "planned": planned}
        rows.append({"phase": phase, **found, "difference": difference})
    return rows


def _last_step(run: RunFiles) -> int | None:
    return max((steps[-1] for steps, _ in run.train.values()), default=None)


def _epochs_per_step(run: RunFiles) -> float | None:
    steps, epochs = run.train.get("epoch", ([], []))
    return epochs[-1] / steps[-1] if steps and steps[-1] else None


def _history(run: RunFiles) -> dict[str, Any] | None:
    """How the outputs for the same clips changed: ``steps``, and of each clip ``uid``, ``reference``, ``outputs``."""
    if len(run.samples) < 2:
        return None
    tables = run.samples
    if len(tables) > MOST_EVALUATIONS:
        last = len(tables) - 1
        tables = [tables[round(number * last / (MOST_EVALUATIONS - 1))] for number in range(MOST_EVALUATIONS)]
    outputs = [{str(row.get("uid")): str(row.get("hypothesis", "")) for row in rows} for _, _, rows in tables]
    return {
        "steps": [step for step, _, _ in tables],
        "rows": [
            {
                "uid": (uid := str(row.get("uid"))),
                "reference": str(row.get("reference", "")),
                "outputs": [found.get(uid) for found in outputs],
            }
            for row in tables[-1][2]
        ],
    }
