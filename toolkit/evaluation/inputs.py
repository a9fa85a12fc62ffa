"""What to evaluate: the run that a model came from, its corpus and splits, the search, and whether they fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.batching.languages import language_id
from toolkit.cluster.rendezvous import on_rank_0
from toolkit.corpus.mixture.opening import open_corpora
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.evaluation.splits import splits_to_test
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.loading.load import find_model
from toolkit.models.processor import PoseProcessor
from toolkit.poses.landmarks import LandmarkSet
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import read_choice
from toolkit.recipe.schema import Data, Evaluation, MixPart, Recipe

RECIPE, ENVIRONMENT = "recipe.yaml", "environment.json"
SEARCH_SETTINGS = ("num_beams", "length_penalty", "no_repeat_ngram_size", "max_new_tokens")


def recipe_of(model: str | Path, overrides: Sequence[str] = ()) -> Recipe | None:
    """The recipe of the run that a model came from, or None for a model that lies elsewhere.

    A run's ``best/`` knows its run.

    Raises:
        UserError: a key is unknown, or a value out of bounds.
    """
    run = run_of(model)
    return load_recipe(str(run / RECIPE), overrides) if run else None


def run_of(model: str | Path) -> Path | None:
    """The run directory of a model, if it lies in one."""
    path = Path(model)
    return next((place for place in (path, path.parent) if (place / RECIPE).is_file()), None)


def kept_batch_frames(model: str | Path) -> int | None:
    """What ``evaluation.batch_frames: auto`` became in the run that a model came from; None without one."""
    run = run_of(model)
    choice = read_choice(run) if run else None
    return choice.batch_frames if choice else None


def evaluation_settings(recipe: Recipe | None, overrides: Sequence[str]) -> Evaluation:
    """How to evaluate: as the run did, else the defaults; ``evaluation.key=value`` changes either.

    Raises:
        UserError: an override is not one of ``evaluation.``.
    """
    others = [item for item in overrides if not item.startswith("evaluation.")]
    if others:
        raise UserError(
            f"{others[0]} cannot change in a trained model", "leave it out, or change a setting of evaluation.*"
        )
    if recipe is not None:
        return recipe.evaluation
    return load_recipe(
        "demo", [f"evaluation.{key}={json.dumps(value)}" for key, value in Evaluation()] + list(overrides)
    ).evaluation


def open_corpus(model: str | Path, recipe: Recipe | None, corpus: str | None, *, is_local_main: bool) -> Corpus:
    """The corpus that ``--corpus`` names, else the one that the model was trained on; all ranks call this.

    Raises:
        UserError: there is none.
    """
    parts = recipe.data.corpora if recipe else []
    if recipe and corpus and (part := next((part for part in parts if _is_at(part, corpus)), None)):
        own = recipe.data.model_copy(update={"corpora": [part]})  # with the conditions that the run gave it
        return open_corpora(own, is_local_main=is_local_main)
    if corpus:
        return Corpus.open(corpus)
    run = run_of(model)
    if recipe is None or run is None:
        raise UserError(f"{model} lies in no run directory, so its corpus is not known", "add --corpus FOLDER")
    data = recipe.data
    return open_corpora(on_rank_0(lambda: _data_of(run, data)), is_local_main=is_local_main)


def _is_at(part: MixPart, folder: str) -> bool:
    return part.corpus is not None and Path(part.corpus).resolve() == Path(folder).resolve()


def _data_of(run: Path, data: Data) -> Data:
    """The settings of a run with the folders of the corpora that it was trained on, where they are still there."""
    try:
        environment = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    if data.corpora:
        trained_on = environment.get("corpora") or {}
        parts = [
            part.model_copy(update={"name": part.label, "corpus": place})
            if (place := trained_on.get(part.label)) and Path(place).is_dir()
            else part
            for part in data.corpora
        ]
        return data.model_copy(update={"corpora": parts})
    place = next((path for path in (environment.get("corpus"), data.corpus) if path and Path(path).is_dir()), None)
    return data.model_copy(update={"corpus": place})


def check_fit(corpus: Corpus, processor: PoseProcessor) -> None:
    """Raise UserError where a corpus has other landmarks, frame rate or normalisation than the model has learnt."""
    extractor, metadata = processor.feature_extractor, corpus.metadata
    model_set, corpus_set = LandmarkSet.from_dict(extractor.landmark_set), corpus.landmark_set
    differences = []
    if model_set.meaning != corpus_set.meaning:
        differences.append(f"landmarks {model_set.in_words} and {corpus_set.in_words}")
    for name in ("fps", "normalisation", "num_features"):
        ours, theirs = getattr(extractor, name), getattr(metadata, name)
        if ours != theirs:
            differences.append(f"{name.removeprefix('num_')} {ours} and {theirs}")
    if differences:
        raise UserError(
            f"the model and the corpus {corpus.path} do not fit each other: {'; '.join(differences)}",
            "prepare the corpus again with the model's settings",
        )


def choose_splits(corpus: Corpus, names: str | None) -> list[str]:
    """The splits that ``--split`` names, comma-separated, else every test split.

    Raises:
        UserError: the corpus lacks one, or it is empty.
    """
    chosen = names.split(",") if names else splits_to_test(corpus)
    missing = [name for name in chosen if not len(corpus.splits.get(name, ()))]
    if missing or not chosen:
        has = ", ".join(f"{name} ({len(split)} clips)" for name, split in corpus.splits.items()) or "none"
        raise UserError(
            f"the corpus {corpus.path} has no clips in split {', '.join(missing)}", f"give --split one of: {has}"
        )
    return chosen


def search_settings(
    settings: Evaluation, recipe: Recipe | None, overrides: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What ``generate`` is given: the settings of the run, or for a model without one those of the command line alone.

    Raises:
        UserError: the tokenizer does not know the forced language.
    """
    search = {name: getattr(settings, name) for name in SEARCH_SETTINGS}
    if recipe is None:  # the folder's generation_config.json holds the rest
        given = {item.split("=")[0].removeprefix("evaluation.") for item in overrides}
        search = {name: value for name, value in search.items() if name in given}
    if settings.forced_language:
        search["forced_bos_token_id"] = language_id(tokenizer, settings.forced_language)
    return search


def search_ctc_weight(model: str | Path, settings: Evaluation, overrides: Sequence[str]) -> float | None:
    """Share of the CTC head in the search, where the command line gives one; None leaves that of the model.

    Raises:
        UserError: there is no CTC head, or it reads glosses.
    """
    if not any(item.startswith("evaluation.ctc_weight=") for item in overrides):
        return None
    config = PoseTranslatorConfig.from_pretrained(find_model(model))
    if settings.ctc_weight > 0 and (not config.ctc or config.ctc_vocabulary):
        lacks = "its CTC head reads glosses" if config.ctc else "the model has none"
        raise UserError(
            f"evaluation.ctc_weight={settings.ctc_weight} needs a CTC head that reads texts, and {lacks}",
            "leave it out",
        )
    return settings.ctc_weight


def default_out_folder(model: str | Path, corpus: Corpus) -> Path:
    """The folder of the results without ``--out``: in the run, for a model without one in the working directory."""
    run = run_of(model)
    return (run / "evaluation" if run else Path("evaluation") / Path(model).name) / corpus.path.name
