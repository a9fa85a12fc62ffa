"""The start of a run from a trained translator (``model.init_from``): what is taken, logged and remembered.

init_from.json   in the run directory: the source, its step and scores, the table of what was taken
base/            the frozen weights that came out of it, of a run that saves only what it trained
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.batching.glosses import glosses_of
from toolkit.checkpointing import run_directory
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import on_each_node, on_rank_0
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.files import read_text, write_text_atomically
from toolkit.models.build import stands_on_base
from toolkit.models.vocabulary.ids import ID_LISTS, renumbered
from toolkit.models.warm_start.filling import WarmStart
from toolkit.models.warm_start.plan import Plan, make_plan
from toolkit.models.warm_start.source import fetch_source, history_of, read_source
from toolkit.recipe.model_cards import reads_published
from toolkit.recipe.resolve import ResolvedRun

INIT_FILE = "init_from.json"

log = logging.getLogger("toolkit")


@dataclass(frozen=True)
class _Remembered:
    """What a run that resumes needs to know of the source, which may be gone."""

    lineage: dict[str, Any]
    generation: dict[str, Any]


def warm_start(
    resolved: ResolvedRun,
    ranks: Ranks,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    resumes: bool,
    echo: Callable[[str], None],
) -> WarmStart | None:
    """How the run's model gets weights of a trained translator; None without ``model.init_from``. All ranks call this.

    A run that resumes has its weights in a checkpoint, and frozen ones in its own ``base/``: the source is not read.

    Raises:
        UserError: the source cannot be read or does not fit; the run's own files are missing.
    """
    model, run_dir = resolved.recipe.model, resolved.run_dir
    if model.init_from is None:
        return None
    base = run_dir / run_directory.FROZEN if stands_on_base(model) else None
    if resumes:
        remembered: _Remembered = on_rank_0(lambda: _read(run_dir, base))
        return WarmStart(None, base, generation=remembered.generation, lineage=remembered.lineage)
    name = model.init_from
    on_each_node(lambda: fetch_source(name))
    source = read_source(name)
    landmarks, metadata, glosses = corpus.landmark_set, corpus.metadata, glosses_of(resolved.recipe, corpus)
    plan = make_plan(source, resolved.recipe, landmarks, metadata.fps, tokenizer, metadata.num_features, glosses)
    generation = {} if reads_published(model) else _generation(plan)
    history = history_of(source)
    lineage = {**history, "table": {line.part: line.what for line in plan.table}}
    if ranks.is_main:
        text = "\n".join([f"starting from {in_words(history, name)}", *(f"  {line}" for line in plan.lines())])
        echo(text)
        for line in text.splitlines():
            log.info("%s", line)
        content = {"folder": str(source.place), "notes": plan.notes, "generation": generation, "lineage": lineage}
        write_text_atomically(run_dir / INIT_FILE, json.dumps(content, indent=2, default=str) + "\n")
    return WarmStart(plan, base, keeps_base=ranks.is_main, generation=generation, lineage=lineage)


def in_words(history: dict[str, Any], name: str) -> str:
    """A source with its step and scores, as a phrase."""
    facts = [f"step {history['step']}"] if history["step"] is not None else []
    facts += [f"{score} {value:.4g}" for score, value in history["scores"].items() if value is not None]
    return f"{name} ({', '.join(facts[:6])})" if facts else name


def _generation(plan: Plan) -> dict[str, Any]:
    """The source's tokens that must not be written, as the run's tokenizer numbers them; those that it has."""
    tokens, settings = plan.tokens, plan.source.generation
    if tokens is None:
        return {}
    new_ids = {old: new for new, old in enumerate(tokens.places.tolist()) if old >= 0}
    found: dict[str, Any] = {key: renumbered(ids, new_ids) for key in ID_LISTS if (ids := getattr(settings, key, None))}
    end = settings.forced_eos_token_id
    if end is not None:
        found["forced_eos_token_id"] = renumbered(end, new_ids) if isinstance(end, list) else new_ids.get(end)
    return {key: value for key, value in found.items() if value is not None}


def _read(run_dir: Path, base: Path | None) -> _Remembered:
    """What the run's own files say of its source.

    Raises:
        UserError: they are missing or not readable.
    """
    path = run_dir / INIT_FILE
    if base and not base.is_dir():
        raise UserError(f"{base} is missing: it holds the run's frozen weights", "copy it again, or train with --new")
    try:
        content = json.loads(read_text(path, "what a run started from"))
        return _Remembered(content["lineage"], content["generation"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not readable ({error})", "copy it again, or train with --new") from error
