"""Open the corpus of a recipe, or its several corpora as one, and see that these fit each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.corpus.mixture.split import MixedSplit, Share
from toolkit.corpus.packed import METADATA_FILE, Corpus, Metadata
from toolkit.corpus.plan import landmarks_of, width_of_features
from toolkit.corpus.splits import SHARED
from toolkit.errors import UserError
from toolkit.poses.landmarks import LandmarkSet
from toolkit.recipe.corpora import PLACES
from toolkit.recipe.schema import Data, MixPart

MOST_NAMES = 4  # of corpora that the name of a mix lists


def open_corpora(data: Data, *, is_local_main: bool = True) -> Corpus:
    """The corpora of a recipe as one, those that are missing prepared first; all ranks call this.

    Raises:
        UserError: there is none, it cannot be prepared, or they do not fit each other.
    """
    from toolkit.corpus.prepare import ensure_corpus  # what reads tables and poses takes long to import

    folders = [one.corpus or ensure_corpus(one, is_local_main=is_local_main) for one in _each(data)]
    return mix(_parts(data), [Corpus.open(folder) for folder in folders])


def open_prepared(data: Data) -> Corpus | None:
    """As :func:`open_corpora` where all corpora are prepared and named by their folders; else None.

    Raises:
        UserError: a folder is no corpus, or they do not fit each other.
    """
    folders = [part.corpus for part in _parts(data) if part.corpus]
    return mix(_parts(data), [*map(Corpus.open, folders)]) if len(folders) == len(_parts(data)) else None


def frame_of(data: Data) -> tuple[LandmarkSet, int]:
    """What a frame of these clips holds, prepared or not: landmarks, and how many numbers of another network.

    Corpora of a mix hold the same, so the first is looked at; a corpus that is not there holds what the settings say.

    Raises:
        UserError: there is no such set of landmarks, or no features can be read.
    """
    first = _each(data)[0]
    if first.corpus and (Path(first.corpus) / METADATA_FILE).exists():
        corpus = Corpus.open(first.corpus)
        return corpus.landmark_set, corpus.metadata.num_features
    if not first.features or first.source == "demo":
        return landmarks_of(first), 0
    return landmarks_of(first), width_of_features(Path(first.features))


def _parts(data: Data) -> list[MixPart]:
    return data.corpora or [MixPart(**{name: getattr(data, name) for name in PLACES})]


def _each(data: Data) -> list[Data]:
    """What is to be prepared for each of the corpora."""
    if not data.corpora:
        return [data]
    return [
        data.model_copy(
            update={name: getattr(part, name) for name in PLACES}
            | {"corpora": [], "columns": {**data.columns, **part.columns}}
        )
        for part in data.corpora
    ]


def mix(parts: Sequence[MixPart], corpora: Sequence[Corpus]) -> Corpus:
    """Several corpora as one; one without settings of its own is itself.

    Raises:
        UserError: their features mean different things; a corpus lacks a split that is to be used, or the training
            clips that it has a weight for.
    """
    if len(parts) == 1 and not parts[0].model_fields_set - set(PLACES):
        return corpora[0]
    used = [_used(part, corpus) for part, corpus in zip(parts, corpora, strict=True)]
    for part, corpus in zip(parts[1:], corpora[1:], strict=True):
        _check_same_features(parts[0].label, corpora[0], part.label, corpus)
    names = {name for splits in used for name in splits}
    usual = [name for name in ("train", "dev", "test") if name in names]
    splits: dict[str, Any] = {
        name: MixedSplit(
            name, [Share(splits[name], part) for part, splits in zip(parts, used, strict=True) if name in splits]
        )
        for name in [*usual, *sorted(names - set(usual))]
    }
    members = {part.label: corpus for part, corpus in zip(parts, corpora, strict=True)}
    metadata = replace(_metadata(corpora, splits), leakage=_sum(map(_leakage_within, corpora, used)))
    return Corpus(_name(list(members)), metadata, splits, members)


def _used(part: MixPart, corpus: Corpus) -> dict[str, Any]:
    """The splits of a corpus that a run uses; those whose clips were all rejected would have no scores, nor a share."""
    if missing := [name for name in part.splits or () if name not in corpus.splits]:
        raise UserError(
            f"data.corpora: {part.label} ({corpus.path}) has no split {', '.join(missing)}",
            f"name some of its splits: {', '.join(corpus.splits)}",
        )
    wanted = corpus.splits if part.splits is None else part.splits
    splits = {name: split for name, split in corpus.splits.items() if name in wanted and len(split)}
    if part.weight is not None and not splits.get("train"):
        raise UserError(
            f"data.corpora: {part.label} has a weight, and no training clips are used of it",
            "leave out its weight, or let its splits name train",
        )
    return splits


def _check_same_features(first_name: str, first: Corpus, name: str, corpus: Corpus) -> None:
    differences = []
    if first.landmark_set.meaning != corpus.landmark_set.meaning:
        differences.append(f"landmarks {first.landmark_set.in_words} and {corpus.landmark_set.in_words}")
    for what in ("fps", "normalisation", "num_features"):
        ours, theirs = getattr(first.metadata, what), getattr(corpus.metadata, what)
        if ours != theirs:
            differences.append(f"{what.removeprefix('num_')} {ours} and {theirs}")
    if differences:
        raise UserError(
            f"the corpora {first_name} and {name} do not fit each other: {'; '.join(differences)}",
            f"prepare {name} again: python launch/prepare.py --table TABLE.csv --poses POSES --landmarks "
            f"{first.landmark_set.name} --fps {first.metadata.fps:g} --out {corpus.path}_{first.landmark_set.name}",
        )


def _metadata(corpora: Sequence[Corpus], splits: dict[str, Any]) -> Metadata:
    """What is true of the mix as a whole; how each corpus was prepared is in its own metadata."""
    each = [corpus.metadata for corpus in corpora]
    longest = [metadata.max_frames for metadata in each if metadata.max_frames is not None]
    return replace(
        each[0],
        max_frames=max(longest) if len(longest) == len(each) else None,
        min_frames=min(metadata.min_frames for metadata in each),
        splits={name: {"clips": len(split), "frames": int(split.frames.sum())} for name, split in splits.items()},
        counts=_sum(metadata.counts for metadata in each),
        lacking=_sum(metadata.lacking for metadata in each),
        checksums={},
    )


def _leakage_within(corpus: Corpus, used: dict[str, Any]) -> dict[str, int]:
    """What its splits share with its own training clips, of the splits that are used, where train is among them."""
    counted = {f"{name}_{kind}_in_train" for name in used for kind in SHARED if "train" in used}
    return {name: count for name, count in corpus.metadata.leakage.items() if name in counted}


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def _name(names: list[str]) -> Path:
    """A mix lies in no folder; messages and folders of results name it after its corpora."""
    more = len(names) - MOST_NAMES
    return Path("+".join([*names[:MOST_NAMES], *([f"{more}_more"] if more > 0 else [])]))
