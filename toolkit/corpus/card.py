"""Write the corpus card: the contents and the defects of a corpus, as text and as one picture."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.corpus.packed import Corpus

_INK, _WARNING = "#3b6ea5", "#c0504d"


def write_card(corpus: Corpus) -> None:
    """Write ``README.md`` and ``card.png`` into the folder of a corpus."""
    (corpus.path / "README.md").write_text(_text(corpus), encoding="utf-8")
    _draw(corpus, corpus.path / "card.png")


def _text(corpus: Corpus) -> str:
    metadata, summary = corpus.metadata, corpus.summary()
    landmarks = corpus.landmark_set
    parts = ", ".join(f"{part} {len(indices)}" for part, indices in landmarks.parts.items())
    lines = [
        "# Corpus card",
        "",
        f"{summary['clips']:,} clips, {summary['frames']:,} frames at {metadata.fps:g} fps "
        f"({summary['frames'] / metadata.fps / 3600:.2f} hours).",
        "",
        "![what the corpus holds](card.png)",
        "",
        "| split | clips | frames | median frames | median words | without hands |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, split in corpus.splits.items():
        words = [len(text.split()) for text in split.texts]
        hands = float((split.hands_visible == 0).mean()) if len(split) else 0.0
        cells = [
            name,
            f"{len(split):,}",
            f"{int(split.frames.sum()):,}",
            _median(split.frames),
            _median(words),
            f"{hands:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## How the features were made", ""]
    lines += [
        f"- Landmarks: {landmarks.name}, {landmarks.num_points} points ({parts}).",
        f"- Features of another network: {metadata.num_features or 'none'}"
        + (" numbers a frame, float16, sampled at the frames of the clips." if metadata.num_features else "."),
        f"- Values: {', '.join(landmarks.channels)} in float16, NaN = missing.",
        f"- Normalisation: {metadata.normalisation}.",
        f"- Lengths: {metadata.min_frames} to {metadata.max_frames} frames; longer clips: {metadata.too_long}.",
        "- Checksums (xxh3): " + ", ".join(f"{name} {value}" for name, value in metadata.checksums.items()) + ".",
    ]
    if metadata.lacking:
        lines.append(
            f"- Landmarks that files lack: {len(metadata.lacking)}, for instance {next(iter(metadata.lacking))}."
        )
    lines += ["", "## What to know before training", ""]
    for name, value in {**metadata.counts, **metadata.leakage}.items():
        lines.append(f"- {name.replace('_', ' ')}: {value:,}")
    rejects = _reject_reasons(corpus.path)
    if rejects:
        lines += ["", "Rejected clips by reason (each is named in rejects.csv):", ""]
        lines += [f"- {reason}: {number:,}" for reason, number in rejects.most_common(20)]
    return "\n".join(lines) + "\n"


def _median(values: Any) -> str:
    return f"{np.median(values):g}" if len(values) else "-"


def _reject_reasons(folder: Path) -> Counter[str]:
    with open(folder / "rejects.csv", newline="", encoding="utf-8") as file:
        return Counter(row["reason"] for row in csv.DictReader(file))


def _draw(corpus: Corpus, path: Path) -> None:
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(20, 8))
    axes = figure.subplots(2, 4).ravel()
    # Fixed margins for the names beside the bars: matplotlib's own layouts draw the figure several times.
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.05, top=0.95, wspace=0.75, hspace=0.2)
    splits = corpus.splits.values()
    texts = [text for split in splits for text in split.texts]
    frames = np.concatenate([split.frames for split in splits])
    _histogram(axes[0], frames, "frames of a clip")
    _histogram(axes[1], np.array([len(text.split()) for text in texts]), "words of a text")
    words = Counter(word for text in texts for word in text.split())
    _bars(axes[2], dict(words.most_common(15)), f"most frequent of {len(words):,} words")
    hands = np.concatenate([split.hands_visible for split in splits])
    _histogram(axes[3], 1 - hands, "share of a clip's frames without hands")
    _bars(axes[4], {name: len(split) for name, split in corpus.splits.items()}, "clips of a split")
    _bars(axes[5], dict(_reject_reasons(corpus.path).most_common(8)), "rejected clips by reason", _WARNING)
    leaks = {name.replace("_", " "): value for name, value in corpus.metadata.leakage.items()}
    _bars(axes[6], leaks, "clips that share a text or video with train", _WARNING)
    notes = {name.replace("_", " "): value for name, value in corpus.metadata.counts.items()}
    _bars(axes[7], notes, "clips that needed special care", _WARNING)
    figure.savefig(path, dpi=80)


def _histogram(axis: Any, values: Any, title: str) -> None:
    whole = values.dtype.kind in "iu" and len(values) and np.ptp(values) < 40
    axis.hist(values, bins=np.arange(values.min(), values.max() + 2) - 0.5 if whole else 40, color=_INK)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("clips")


def _bars(axis: Any, values: dict[str, int], title: str, color: str = _INK) -> None:
    axis.set_title(title, fontsize=10)
    if not any(values.values()):
        axis.text(0.5, 0.5, "none", ha="center", va="center")
        axis.set_axis_off()
        return
    # Texts may be in scripts that the font lacks, and `$` would start a formula.
    names = [name.encode("ascii", "replace").decode().replace("$", r"\$")[:36] for name in values]
    positions = np.arange(len(names))
    bars = axis.barh(positions, list(values.values()), color=color)
    axis.set_yticks(positions, names, fontsize=8)
    axis.bar_label(bars, fontsize=8, padding=2)
    axis.margins(x=0.2)
    axis.invert_yaxis()
