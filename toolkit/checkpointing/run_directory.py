"""The run directory: which run is in it, its status, and whether this command may resume it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import xxhash

from toolkit.cluster.environment import describe_environment
from toolkit.cluster.secrets import redact
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.files import next_free, write_text_atomically
from toolkit.recipe.corpora import PLACES
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import RECIPE_FILE, ResolvedRun
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import leaves

Status = Literal["running", "interrupted", "finished", "failed"]
STATUS = "status.json"
CORPUS_FILE = "corpus.json"
PROCESSOR = "processor"  # folder of the run's processor
FROZEN = "base"  # folder of frozen weights that come from another translator (model.init_from)
CHECKPOINTS = "checkpoints"

# Settings that may change when a run resumes: where it runs, how fast, how often it saves and evaluates; not what is
# learnt, and not how the best model is chosen. The DeepSpeed JSON may change, because a run that did not fit in memory
# resumes with one that fits. A key that is not listed here may not change.
MAY_CHANGE = (
    "name",
    "description",
    "deepspeed",
    "ds",
    "run",
    "tracking",
    "evaluation.samples",
    "evaluation.graphs",
    "evaluation.batch_frames",
    # Where the clips are; check_same_corpus compares the clips themselves.
    "data.source",
    "data.corpus",
    "data.table",
    "data.poses",
    "data.features",
    "data.cache",
    "data.workers",
    "data.max_rejects",
    "training.micro_batch_size",
    "training.micro_batch_frames",
    "training.padding",
    "training.gradient_checkpointing",
    "training.compile",
    "training.save_every",
    "training.keep_last",
    "training.keep_best",
    "training.eval_every",
    "training.log_every",
    "training.early_stopping",
    "training.workers",
    "training.rank_timeout",
    "training.data_timeout",
    "training.time_limit",
)
# The length of a run, which --extend increases.
LENGTH = ("training.epochs", "training.max_steps")
# How clips are prepared. A prepared corpus (data.corpus) has its own settings, and these have no effect.
OF_PREPARATION = (
    "data.landmarks",
    "data.fps",
    "data.features_fps",
    "data.min_frames",
    "data.too_long",
    "data.no_hands",
    "data.shared_texts",
    "data.columns",
    "data.time_unit",
    "data.split_by",
    "data.dev_share",
    "data.test_share",
    "data.split_seed",
)


def read_status(run_dir: Path) -> Status | None:
    """Status of the run in ``run_dir``; None where there is no run."""
    try:
        return json.loads((run_dir / STATUS).read_text(encoding="utf-8"))["status"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run_dir / STATUS} is not readable", "start again with --new, or set another run.dir"
        ) from error


def details_of(run_dir: Path, status: Status) -> dict[str, Any]:
    """What ``write_status`` wrote beside a status; empty where the run has another one, or none that is readable."""
    try:
        content = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
        return dict(content) if content["status"] == status else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_status(run_dir: Path, status: Status, **details: Any) -> None:
    """Write the status of the run, for users and schedulers that do not see its exit code."""
    content = {"status": status, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details}
    write_text_atomically(run_dir / STATUS, redact(json.dumps(content, indent=2)) + "\n")


def archive_run(run_dir: Path) -> Path | None:
    """Rename the run directory to the next free ``NAME.1``, ``NAME.2``, ...; None where there is none."""
    if not run_dir.exists():
        return None
    return run_dir.rename(next_free(run_dir, "."))


def check_archiving(resolved: ResolvedRun) -> None:
    """Raise UserError where the folder that ``--new`` would rename is no run, or holds what the new run reads."""
    run_dir, data = resolved.run_dir, resolved.recipe.data
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    if not any((run_dir / name).exists() for name in (STATUS, RECIPE_FILE)):
        raise UserError(f"run.dir={run_dir} holds files and no run: it is not archived", "set run.dir=ANOTHER_FOLDER")
    read = {"model.init_from": resolved.recipe.model.init_from} | {
        f"data.{name}": getattr(data, name) for name in PLACES
    }
    for key, place in read.items():
        if place and Path(place).exists() and Path(place).resolve().is_relative_to(run_dir.resolve()):
            raise UserError(
                f"{key}={place} is in run.dir={run_dir}, which would be archived",
                "set run.dir=ANOTHER_FOLDER for the new run",
            )


def forget_failed_start(run_dir: Path) -> None:
    """Remove the settings of a run that ended before it logged a step or saved a checkpoint.

    Nothing was trained by them, so that the next start may have others: after a download that broke, or a first step
    that ran out of memory. Its log stays.
    """
    if read_status(run_dir) not in ("failed", "interrupted") or any((run_dir / CHECKPOINTS).glob("*")):
        return
    metrics = run_dir / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        return
    for name in (RECIPE_FILE, CORPUS_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for folder in (PROCESSOR, FROZEN):
        shutil.rmtree(run_dir / folder, ignore_errors=True)


def check_same_run(resolved: ResolvedRun, *, extend: bool = False) -> None:
    """Raise UserError where the run in the directory has other settings; with ``extend`` it may become longer."""
    stored = resolved.run_dir / RECIPE_FILE
    if stored.is_file() and (differences := changed_settings(load_recipe(str(stored)), resolved.recipe, extend=extend)):
        longer = "add --extend to make that run longer, " if differences.keys() <= set(LENGTH) else ""
        of_search = all(key.startswith("evaluation.") for key in differences)
        search = "score a model with another search by launch/evaluate.py, " if of_search else ""
        raise UserError(
            f"{resolved.run_dir} holds a run with other settings ({_listed(differences)})",
            f"{longer}{search}restore those settings, add --new to archive that run, or set run.dir=ANOTHER_FOLDER",
        )


def check_same_corpus(corpus: Corpus, run_dir: Path) -> None:
    """Raise UserError for a corpus with other clips than those of the run in ``run_dir``, wherever it is."""
    path = run_dir / CORPUS_FILE
    if not path.is_file():
        return
    if not (run_dir / RECIPE_FILE).exists():  # a corpus has such a file, too, which a run would overwrite
        raise UserError(f"run.dir={run_dir} holds {CORPUS_FILE} and no run", "set run.dir=ANOTHER_FOLDER")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable", "start again with --new, or set another run.dir") from error
    if not is_same_corpus(stored, corpus):
        raise UserError(
            f"{run_dir} holds a run that was trained on other clips than those of {corpus.path}",
            "use the corpus of that run, add --new to archive it, or set run.dir=ANOTHER_FOLDER",
        )


def is_to_be_extended(resolved: ResolvedRun) -> bool:
    """Whether the recipe now ends the run in the directory by other rules than when it started."""
    stored = resolved.run_dir / RECIPE_FILE
    if not stored.is_file():
        return False
    before, now = load_recipe(str(stored)).training, resolved.recipe.training
    return any(getattr(before, key) != getattr(now, key) for key in ("epochs", "max_steps", "early_stopping"))


def check_same_experiment(
    resolved: ResolvedRun, recipe: dict[str, Any], checkpoint: Path, *, extend: bool = False
) -> None:
    """Raise UserError where a checkpoint has other settings; with ``extend`` the run may become longer."""
    if differences := changed_settings(Recipe.model_validate(recipe), resolved.recipe, extend=extend):
        raise UserError(
            f"{checkpoint} was saved with other settings ({_listed(differences)})",
            "restore those settings, or start again without --resume in another run.dir",
        )


def _listed(differences: dict[str, tuple[Any, Any]]) -> str:
    listed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in list(differences.items())[:5])
    return listed + (f" and {len(differences) - 5} more" if len(differences) > 5 else "")


def changed_settings(old: Recipe, new: Recipe, *, extend: bool = False) -> dict[str, tuple[Any, Any]]:
    """Settings that differ and that a run may not change, unless it is to ``extend``: key -> (old value, new value)."""
    before, after = _settings(old), _settings(new)
    is_prepared = any(data.corpus or any(part.corpus for part in data.corpora) for data in (old.data, new.data))
    free = (*MAY_CHANGE, *(OF_PREPARATION if is_prepared else ()), *(LENGTH if extend else ()))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    }


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted key; of several corpora those that say where each is are left out."""
    values = recipe.model_dump(mode="json")
    parts = values["data"]["corpora"]
    values["data"]["corpora"] = {
        str(number): {key: value for key, value in part.items() if key not in PLACES} | {"name": known.label}
        for number, (part, known) in enumerate(zip(parts, recipe.data.corpora, strict=True))
    }
    return {".".join(path): value for path, value in leaves(values)}


def layout_of(resolved: ResolvedRun) -> dict[str, Any]:
    """How the state of a run is partitioned; a run that resumes with another layout converts its checkpoint."""
    layout = {"world_size": resolved.world_size, "zero_stage": resolved.zero_stage, "precision": resolved.precision}
    # Checkpoints of earlier versions have no such key.
    size = resolved.tensor_parallel_size
    return layout | {"tensor_parallel_size": size} if size > 1 else layout


def corpus_identity(corpus: Corpus) -> dict[str, Any]:
    """What makes two corpora the same, wherever they are: a position in the order of clips needs the same clips."""
    if corpus.members:  # in the order of the recipe, which says what is used of each
        return {"corpora": [corpus_identity(member) for member in corpus.members.values()]}
    metadata = corpus.metadata
    texts = xxhash.xxh3_64()
    for split in corpus.splits.values():
        for uid, text in zip(split.uids, split.texts, strict=True):
            texts.update(f"{uid}\0{text}\0".encode())
    return {
        "splits": metadata.splits,
        # Of table and files. They do not say which column holds the texts, nor how poses became features; landmark
        # set and frame rate belong to the processor, which is compared, too.
        "checksums": metadata.checksums,
        "texts": texts.hexdigest(),
        "lengths": {"max_frames": metadata.max_frames, "too_long": metadata.too_long},
    }


def is_same_corpus(identity: dict[str, Any], corpus: Corpus) -> bool:
    """Whether ``identity``, from :func:`corpus_identity`, is that of ``corpus``."""
    found = corpus_identity(corpus)
    return all(found.get(key) == value for key, value in identity.items())


def start(resolved: ResolvedRun, corpus: Corpus, **details: Any) -> None:
    """Write what is about to run to the run directory: recipe, DeepSpeed JSON, environment and corpus; and details of
    its status, which stand there until the run ends.
    """
    try:
        resolved.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{resolved.run_dir}: cannot be created ({error.strerror})", "set run.dir=ANOTHER_FOLDER"
        ) from error
    resolved.save(resolved.run_dir)
    write_text_atomically(resolved.run_dir / CORPUS_FILE, json.dumps(corpus_identity(corpus), indent=2) + "\n")
    places = {name: str(member.path.resolve()) for name, member in corpus.members.items()}
    environment = describe_environment() | ({"corpora": places} if places else {"corpus": str(corpus.path.resolve())})
    write_text_atomically(resolved.run_dir / "environment.json", json.dumps(environment, indent=2, default=str) + "\n")
    write_status(resolved.run_dir, "running", **details)
