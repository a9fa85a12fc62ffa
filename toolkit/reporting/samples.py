"""What a report shows of a run's outputs: scores by sentence length, histograms of lengths, and single clips."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.corpus.mixture.leakage import leakage_notes
from toolkit.corpus.mixture.opening import mix
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.schema import MixPart
from toolkit.reporting.run_files import RunFiles
from toolkit.reporting.skeletons import pack_clip, skeleton_layout
from toolkit.scoring.metrics import rouge_tokens, sentence_chrf
from toolkit.scoring.predictions import Prediction, read_predictions

SAMPLES_PER_KIND = 6  # best, worst and random samples of a split
LENGTH_GROUPS = 8
BINS = 24
LONGEST_TEXT = 2_000  # characters of a sample
MOST_ROWS = 20_000  # predictions and training texts that histograms look at
CLIPS_BYTES = 1_500_000  # of all embedded landmarks together, before base64 makes them a third larger
CLIP_BYTES = 100_000  # of one clip


def predictions_of(run: RunFiles) -> dict[str, list[Prediction]]:
    """The predictions of a run by split: those that were scored, else those of the last evaluation."""
    folder = run.folder / "predictions"
    splits = run.scores.get("splits")
    names = [name for name in (splits if isinstance(splits, dict) else {}) if (folder / f"{name}.csv").is_file()]
    files = {name: folder / f"{name}.csv" for name in names}
    if not files and (evaluations := sorted(folder.glob("predictions_epoch_*.csv"))):
        files = {"dev": evaluations[-1]}
    found = {}
    for name, path in files.items():
        try:
            rows = read_predictions(path)
        except UserError as error:
            run.warnings.append(f"left out: {error}")
            continue
        if rows:
            found[name] = rows
    return found


def describe_split(name: str, rows: Sequence[Prediction], seed: int) -> dict[str, Any]:
    """One split's outputs in figures and samples, without skeletons."""
    considered = list(rows)
    if len(considered) > MOST_ROWS:
        considered = random.Random(seed).sample(considered, MOST_ROWS)
    chrf = _chrf(considered)
    lengths = [len(rouge_tokens(row.reference)) for row in considered]
    written = [len(rouge_tokens(row.hypothesis)) for row in considered]
    return {
        "name": name,
        "clips": len(rows),
        "by_length": chrf_by_length(lengths, chrf),
        "words": histogram({"reference": lengths, "hypothesis": written}),
        "samples": pick_samples(considered, chrf, lengths, seed),
    }


def _chrf(rows: Sequence[Prediction]) -> list[float]:
    """Each row's own chrF++, computed where its file lacks it."""
    lacking = [row for row in rows if row.chrf is None]
    computed = iter(sentence_chrf([row.hypothesis for row in lacking], [row.reference for row in lacking]))
    return [next(computed) if row.chrf is None else row.chrf for row in rows]


def chrf_by_length(lengths: Sequence[int], chrf: Sequence[float]) -> list[dict[str, Any]]:
    """Mean sentence chrF++ of references of similar length, in groups of about equal size.

    Returns:
        ``label`` (words of the reference), ``value`` (0..100) and ``clips`` of each group, short sentences first.
    """
    words, scores = np.asarray(lengths), np.asarray(chrf, np.float64)
    different = np.unique(words)
    if len(different) > LENGTH_GROUPS:
        limits = np.quantile(words, np.linspace(0, 1, LENGTH_GROUPS + 1)[1:], method="higher")
        different = np.unique(limits)
    groups, above = [], -1
    for limit in different.tolist():
        inside = (words > above) & (words <= limit)
        if inside.any():
            least = int(words[inside].min())
            label = str(limit) if least == limit else f"{least}–{limit}"
            groups.append({"label": label, "value": round(float(scores[inside].mean()), 2), "clips": int(inside.sum())})
        above = limit
    return groups


def histogram(series: Mapping[str, Sequence[float] | npt.NDArray[Any]]) -> dict[str, Any]:
    """Histograms of several sets of lengths over the same bins.

    Returns:
        ``edges`` of the bins (one more than bins) and ``series``: name -> share (0..1) in each bin.
    """
    filled = {name: np.asarray(values, np.float64) for name, values in series.items() if len(values)}
    if not filled:
        return {"edges": [], "series": {}}
    everything = np.concatenate(list(filled.values()))
    low = float(everything.min())
    # One very long sentence is counted in the last bin, else all others would be in the first one. Bins have a width,
    # also where all lengths are the same.
    high = max(float(np.percentile(everything, 99.5)), low + 0.1)
    whole = bool(np.all(everything == np.round(everything)))
    if whole and high - low < BINS:
        edges = np.arange(low, np.ceil(high) + 2) - 0.5
    elif whole:
        edges = np.arange(BINS + 1) * np.ceil((high - low + 1) / BINS) + low - 0.5
    else:
        edges = np.linspace(low, high, BINS + 1)
    shares = {
        name: (np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)).round(5).tolist()
        for name, values in filled.items()
    }
    return {"edges": edges.round(4).tolist(), "series": shares}


def pick_samples(
    rows: Sequence[Prediction], chrf: Sequence[float], lengths: Sequence[int], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """The best, the worst and some random rows; among equals the longest sentences."""
    order = sorted(range(len(rows)), key=lambda index: (-chrf[index], -lengths[index], index))
    best = order[:SAMPLES_PER_KIND]
    worst = sorted(order[SAMPLES_PER_KIND:], key=lambda index: (chrf[index], -lengths[index], index))[:SAMPLES_PER_KIND]
    rest = sorted(set(range(len(rows))) - set(best) - set(worst))
    drawn = sorted(random.Random(seed).sample(rest, min(SAMPLES_PER_KIND, len(rest))))
    return {
        kind: [
            {
                "uid": rows[index].uid,
                "reference": _shortened(rows[index].reference),
                "hypothesis": _shortened(rows[index].hypothesis),
                "score": rows[index].score,
                "chrf": round(chrf[index], 2),
            }
            for index in indices
        ]
        for kind, indices in (("best", best), ("worst", worst), ("random", drawn))
    }


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def find_corpus_of_run(run: RunFiles, rows: dict[str, list[Prediction]], given: Path | None = None) -> Corpus | None:
    """The corpus of a run: where it was, or, for a run that was copied from elsewhere, one in the cache with its clips.

    It must have the clips of all ``rows``; ``given`` is looked at alone. A warning is added to the run when nothing is
    found.

    Raises:
        UserError: ``given`` is no corpus.
    """
    if given is not None:
        return Corpus.open(given)
    for parts in _candidates(run):
        try:
            corpus = mix(parts, [Corpus.open(part.corpus or "") for part in parts])
            firsts = {name: {split[0].uid: split[0].reference} for name, split in rows.items()}
            if all(_indices(corpus, name, first) for name, first in firsts.items()):
                return corpus
        except (UserError, OSError, ValueError, KeyError, TypeError):
            continue  # another folder may be the one
    run.warnings.append("the run's corpus is not here, so there are no skeletons; launch/report.py takes --corpus")
    return None


def _candidates(run: RunFiles) -> Iterator[list[MixPart]]:
    """The corpora of the run, or a folder that may hold its one, the most likely first."""
    places = run.environment.get("corpora")
    if isinstance(places, dict):
        yield [MixPart(name=name, corpus=place) for name, place in places.items()]
    named = [run.environment.get("corpus"), run.setting("data.corpus")]
    yield from ([MixPart(corpus=name)] for name in named if isinstance(name, str))
    cache = run.setting("data.cache")
    if isinstance(cache, str):
        roots = [Path.cwd(), *run.folder.parents[:3]]
        for root in dict.fromkeys(roots):
            found = sorted(path.parent for path in (root / cache).glob("*/corpus.json"))
            yield from ([MixPart(corpus=str(path))] for path in found)


def _indices(corpus: Corpus, name: str, wanted: dict[str, str]) -> dict[str, tuple[str, int]]:
    """Split and index of clips by uid. The split ``name`` comes first; the text must be the same."""
    found: dict[str, tuple[str, int]] = {}
    for split_name in sorted(corpus.splits, key=lambda other: other != name.partition("@")[0]):
        split = corpus.splits[split_name]
        for index, uid in enumerate(split.uids):
            if uid in wanted and uid not in found and _same_text(split.texts[index], wanted[uid]):
                found[uid] = (split_name, index)
        if len(found) == len(wanted):
            break
    return found


def _same_text(text: str, shown: str) -> bool:
    return text == shown or (shown.endswith("…") and text.startswith(shown[:-1]))


def embed_clips(splits: list[dict[str, Any]], corpus: Corpus) -> dict[str, Any]:
    """Give each sample of ``splits`` the number of its clip, ``clip``, where the corpus has it.

    Returns:
        ``skeleton`` and ``clips``, as ``skeleton.js`` draws them.
    """
    landmark_set, fps = corpus.landmark_set, corpus.metadata.fps
    if not landmark_set.num_points:  # features alone: nothing to draw
        return {"skeleton": skeleton_layout(landmark_set), "clips": []}
    clips: list[dict[str, Any]] = []
    count = sum(len(group) for split in splits for group in split["samples"].values())
    most_bytes = min(CLIP_BYTES, CLIPS_BYTES // max(count, 1))
    for split in splits:
        samples = [sample for group in split["samples"].values() for sample in group]
        found = _indices(corpus, split["name"], {sample["uid"]: sample["reference"] for sample in samples})
        for sample in samples:
            if sample["uid"] in found:
                name, index = found[sample["uid"]]
                sample["clip"] = len(clips)
                clips.append(pack_clip(corpus.splits[name].clip(index).features, landmark_set, fps, most_bytes))
    return {"skeleton": skeleton_layout(landmark_set), "clips": clips}


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """A corpus in figures: ``seconds`` and ``words`` (histograms by split), and its summary."""
    seconds = {name: split.frames / corpus.metadata.fps for name, split in corpus.splits.items() if len(split)}
    words = {}
    for name, split in corpus.splits.items():
        step = max(1, len(split) // MOST_ROWS)
        words[name] = [len(rouge_tokens(split.texts[index])) for index in range(0, len(split), step)]
    metadata = corpus.metadata
    return {
        "seconds": histogram(seconds),
        "words": histogram(words),
        "facts": {
            "folder": ", ".join(str(member.path) for member in corpus.members.values()) or str(corpus.path),
            "landmark set": f"{corpus.landmark_set.name}, {corpus.landmark_set.num_points} points",
            **({"features": f"{metadata.num_features} numbers a frame"} if metadata.num_features else {}),
            "frames per second": f"{metadata.fps:g}",
            "splits": ", ".join(f"{name} {len(split):,}" for name, split in corpus.splits.items()),
            "hours": f"{sum(float(values.sum()) for values in seconds.values()) / 3600:,.2f}",
            **{name.replace("_", " "): f"{count:,}" for name, count in metadata.counts.items()},
        },
    }


def corpus_warnings(corpus: Corpus) -> list[str]:
    """Warnings about a corpus that make its scores doubtful."""
    warnings = leakage_notes(corpus)
    if corpus.metadata.lacking:
        warnings.append(f"{len(corpus.metadata.lacking)} landmarks of the set are missing in files of the corpus")
    if rejects := corpus.metadata.counts.get("rejects"):
        warnings.append(f"{rejects:,} clips were rejected at preparation; rejects.csv in the corpus says why")
    return warnings
