#!/usr/bin/env python
"""Draw docs/pictures/pipeline.png: the way from pose to text, from real frames of the demo's motion.

python docs/pictures/draw_pipeline.py [PNG]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from pose_format import Pose

from toolkit.corpus.demo import find_lexicon

WORD = "love"
INK, MUTED, LINE, PAPER = "#1f2937", "#64748b", "#dbe2ea", "#ffffff"
BODY, LEFT, RIGHT, FACE = "#475569", "#2f7fc1", "#e4572e", "#c3ccd8"
ENGINE, ENGINE_LINE = "#eef1fd", "#c3cbf3"
PREPARED, PREPARED_LINE = "#f0f7f2", "#c4dfcc"
UPPER_BODY = {
    "LEFT_SHOULDER": "RIGHT_SHOULDER LEFT_ELBOW LEFT_HIP",
    "RIGHT_SHOULDER": "RIGHT_ELBOW RIGHT_HIP",
    "LEFT_ELBOW": "LEFT_WRIST",
    "RIGHT_ELBOW": "RIGHT_WRIST",
}


Component = tuple[np.ndarray, list[str], list[tuple[int, int]]]


def read_letter(letter: str) -> dict[str, Component]:
    """An ASL letter: each component's points ``[frames, points, 2]`` (pixels; NaN = missing), their names, limbs."""
    lexicon = find_lexicon()
    with (lexicon / "index.csv").open(encoding="utf-8") as file:
        path = next(
            row["path"]
            for row in csv.DictReader(file)
            if row["signed_language"] == "ase" and row["words"].lower() == letter
        )
    pose = Pose.read((lexicon / path).read_bytes())
    points = pose.body.data[:, 0, :, :2].astype(float).filled(np.nan)
    points = np.where(pose.body.confidence[:, 0, :, None] > 0, points, np.nan)
    start, components = 0, {}
    for component in pose.header.components:
        part = points[:, start : start + len(component.points)]
        components[component.name] = (part, list(component.points), list(component.limbs))
        start += len(component.points)
    return components


def clearest_frame(components: dict[str, Component]) -> dict[str, Component]:
    """The frame in which the right hand is highest: there the handshape is clearest."""
    hand = components["RIGHT_HAND_LANDMARKS"][0][..., 1]
    height = np.where(np.isnan(hand), np.inf, hand).mean(axis=1)
    frame = int(height.argmin())
    return {name: (part[frame], names, limbs) for name, (part, names, limbs) in components.items()}


def hand_over_time(letters: list[dict[str, Component]]) -> np.ndarray:
    """The right hand's coordinates, letter after letter, ``[frames, values]``, centred and scaled for the eye."""
    values = np.concatenate([letter["RIGHT_HAND_LANDMARKS"][0] for letter in letters])
    values = values[~np.isnan(values).any(axis=(1, 2))]
    shape = values - values[:, :1]
    flat = np.concatenate([shape[..., 0], shape[..., 1]], axis=1)[:, 1:]
    return (flat - flat.mean(axis=0)) / (2 * flat.std() + 1e-9)


def draw_signer(
    axes: Axes, components: dict[str, Component], box: tuple[float, float, float, float], *, selected: bool
) -> None:
    """Draw one frame into ``box`` (x, y, width, height): all landmarks, or only those that a landmark set selects."""
    body, names, _ = components["POSE_LANDMARKS"]
    index = {name: i for i, name in enumerate(names)}
    middle = (body[index["LEFT_SHOULDER"]] + body[index["RIGHT_SHOULDER"]]) / 2
    unit = np.linalg.norm(body[index["LEFT_SHOULDER"]] - body[index["RIGHT_SHOULDER"]])
    x, y, width, height = box
    scale = width / 2.25

    def place(points: np.ndarray) -> np.ndarray:
        normalised = (points - middle) / unit * [1, -1]
        return normalised * scale + [x + width / 2, y + height * (0.56 if selected else 0.46)]

    size = scale / 10
    clip = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0", transform=axes.transData)
    artists = []
    if not selected:
        face = place(components["FACE_LANDMARKS"][0])
        artists += axes.plot(face[:, 0], face[:, 1], ".", color=FACE, markersize=1.1 * size, zorder=3)
    ends_at_hip = () if selected else ("LEFT_HIP", "RIGHT_HIP")
    for start, ends in UPPER_BODY.items():
        for end in ends.split():
            if end.endswith("HIP") and end not in ends_at_hip:
                continue
            line = place(body[[index[start], index[end]]])
            artists += axes.plot(line[:, 0], line[:, 1], color=BODY, lw=1.7 * size, solid_capstyle="round", zorder=4)
    dots = ["LEFT_SHOULDER", "RIGHT_SHOULDER", "LEFT_ELBOW", "RIGHT_ELBOW", "LEFT_WRIST", "RIGHT_WRIST"]
    if selected:
        dots += ["LEFT_EYE", "RIGHT_EYE"]
        eyes = place(body[[index["LEFT_EYE"], index["RIGHT_EYE"]]])
        artists += axes.plot(eyes[:, 0], eyes[:, 1], color=BODY, lw=1.4 * size, zorder=4)
    spots = place(body[[index[name] for name in dots]])
    artists += axes.plot(spots[:, 0], spots[:, 1], "o", color=BODY, markersize=3.6 * size, zorder=5)
    for name, colour in (("LEFT_HAND_LANDMARKS", LEFT), ("RIGHT_HAND_LANDMARKS", RIGHT)):
        points, _, limbs = components[name]
        if np.isnan(points).all():
            continue
        hand = place(points)
        for start, end in limbs:
            artists += axes.plot(*hand[[start, end]].T, color=colour, lw=1.15 * size, solid_capstyle="round", zorder=6)
        artists += axes.plot(hand[:, 0], hand[:, 1], "o", color=colour, markersize=1.9 * size, zorder=7)
    if selected and np.isnan(components["LEFT_HAND_LANDMARKS"][0]).all():
        where = place(body[index["LEFT_ELBOW"]]) - [0.4, 2.6]
        axes.plot(
            *where, "o", markersize=11, markerfacecolor="none", markeredgecolor=LEFT, markeredgewidth=1.8, zorder=6
        )
        axes.text(where[0], where[1] - 1.5, "not seen", ha="center", va="top", fontsize=11.5, color=LEFT)
    axes.add_patch(clip).set_visible(False)
    for artist in artists:
        artist.set_clip_path(clip)


def card(axes: Axes, x: float, y: float, width: float, height: float, *, face=PAPER, edge=LINE, zorder=1) -> None:
    """A rounded box."""
    axes.add_patch(
        FancyBboxPatch(
            (x + 1, y + 1),
            width - 2,
            height - 2,
            boxstyle="round,pad=1,rounding_size=1.6",
            facecolor=face,
            edgecolor=edge,
            lw=1.6,
            zorder=zorder,
        )
    )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from one stage to the next."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=22, lw=2.4, color=MUTED, shrinkA=0, shrinkB=0, zorder=8
        )
    )


def title(axes: Axes, x: float, name: str, below: str) -> None:
    """Name of a stage above its card, and a line below the card."""
    axes.text(x, 60.0, name, ha="center", va="center", fontsize=19, fontweight="bold", color=INK)
    axes.text(x, 18.6, below, ha="center", va="top", fontsize=13.5, color=MUTED, linespacing=1.35)


def draw_encoder(axes: Axes, x: float, y: float, width: float, height: float, features: np.ndarray) -> None:
    """Real features over time above; below them convolutions that halve the number of frames, then positions."""
    left, right, strip = x + 2.6, x + width - 2.6, 11.5
    axes.imshow(
        features.T,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        interpolation="nearest",
        extent=(left, right, y + height - strip - 2.6, y + height - 2.6),
        zorder=3,
    )
    axes.text(
        x + width / 2,
        y + height - strip - 3.4,
        "landmarks over time",
        ha="center",
        va="top",
        fontsize=12.5,
        color=MUTED,
    )
    rows = ((16, "#a9b6f3", "convolutions"), (8, "#5b6fd8", "positions"))
    for row, (count, colour, label) in enumerate(rows):
        base = y + 12.3 - row * 7.9
        step = (right - left) / count
        for i in range(count):
            axes.add_patch(
                FancyBboxPatch(
                    (left + (i + 0.16) * step, base),
                    step * 0.68,
                    3.2,
                    boxstyle="round,pad=0,rounding_size=0.35",
                    facecolor=colour,
                    edgecolor="none",
                    zorder=3,
                )
            )
        axes.text(x + width / 2, base - 0.7, label, ha="center", va="top", fontsize=12.5, color=MUTED)


def draw_backbone(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    """Encoder and decoder of the pretrained model, joined by cross-attention."""
    box_width = (width - 9.4) / 2
    for i, name in enumerate(("encoder", "decoder")):
        left = x + 2.2 + i * (box_width + 5)
        for layer in range(4):
            card(axes, left, y + 10.4 + layer * 5.2, box_width, 4.4, face="#f5f6ff", edge=ENGINE_LINE, zorder=3)
        axes.text(left + box_width / 2, y + 8.6, name, ha="center", va="top", fontsize=13.5, color=INK)
    arrow(axes, (x + 2.4 + box_width, y + 20.6), (x + 6.9 + box_width, y + 20.6))
    axes.text(x + width / 2, y + 3.9, "a HuggingFace model", ha="center", va="center", fontsize=12.5, color=MUTED)


def draw_ranks(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    """DeepSpeed under encoder and backbone: the ranks that share the work."""
    card(axes, x, y, width, height, face=ENGINE, edge=ENGINE_LINE)
    axes.text(
        x + 3,
        y + height / 2 + 1.9,
        "DeepSpeed",
        ha="left",
        va="center",
        fontsize=17,
        fontweight="bold",
        color="#3b4cb8",
    )
    axes.text(
        x + 3, y + height / 2 - 2.3, "ZeRO 0–3 · offload · bf16", ha="left", va="center", fontsize=13, color=MUTED
    )
    for i, name in enumerate(("rank 0", "rank 1", "…", "rank N")):
        left = x + width - 32.4 + i * 7.8
        card(axes, left, y + 2.2, 7.1, height - 4.4, edge=ENGINE_LINE, zorder=2)
        axes.text(left + 3.55, y + height / 2, name, ha="center", va="center", fontsize=12.5, color=INK, zorder=3)


def main(picture: Path) -> None:
    letters = [read_letter(letter) for letter in WORD]
    frames = [clearest_frame(letter) for letter in letters]
    figure = plt.figure(figsize=(16.4, 6.5), dpi=125, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 164), ylim=(0, 65))
    axes.axis("off")
    top, low = 56, 21
    height = top - low

    # .pose frames: a fan that shows the signing hand of every frame, the last in front.
    for i, frame in enumerate(frames):
        x, y = 3 + i * 6, top - 23 - i * 4
        card(axes, x, y, 21, 23, zorder=10 + i)
        inner = axes.inset_axes((x, y, 21, 23), transform=axes.transData, zorder=10 + i + 0.5)
        inner.set(xlim=(0, 21), ylim=(0, 23))
        inner.axis("off")
        draw_signer(inner, frame, (0.8, 0.8, 19.4, 21.4), selected=False)
    title(axes, 21.8, ".pose frames", "every landmark that\nthe estimator found")
    arrow(axes, (42.4, 38.5), (46.4, 38.5))

    # Landmarks: those of the set, by name; the hand that was not seen is marked, not zero.
    x, width = 48, 27
    card(axes, x, low, width, height)
    draw_signer(axes, frames[-2], (x + 1, low + 6.4, width - 2, height - 7.4), selected=True)
    for i, (name, colour) in enumerate((("body", BODY), ("left", LEFT), ("right", RIGHT))):
        axes.plot(x + 4.0 + i * 7.4, low + 3.0, "o", color=colour, markersize=8)
        axes.text(x + 5.1 + i * 7.4, low + 2.9, name, va="center", fontsize=12.5, color=INK)
    title(axes, x + width / 2, "landmarks", "by name, in shoulder widths;\nmissing is not zero")
    arrow(axes, (76.2, 38.5), (80.2, 38.5))

    # Pose encoder.
    x, width = 81.8, 25
    card(axes, x, low, width, height)
    draw_encoder(axes, x, low, width, height, hand_over_time(letters))
    axes.text(x + width / 2, 60, "pose encoder", ha="center", va="center", fontsize=19, fontweight="bold", color=INK)
    arrow(axes, (108.0, 38.5), (112.0, 38.5))

    # Backbone.
    x, width = 113.6, 29
    card(axes, x, low, width, height)
    draw_backbone(axes, x, low, width, height)
    axes.text(x + width / 2, 60, "seq2seq", ha="center", va="center", fontsize=19, fontweight="bold", color=INK)
    arrow(axes, (143.8, 38.5), (147.8, 38.5))

    # Text.
    card(axes, 149.4, 32.5, 12.6, 12, face="#fff7f4", edge="#f4c4b5")
    axes.text(155.7, 38.5, WORD, ha="center", va="center", fontsize=22, fontweight="bold", color=RIGHT)
    axes.text(155.7, 60, "text", ha="center", va="center", fontsize=19, fontweight="bold", color=INK)

    card(axes, 3, 3, 72, 9.4, face=PREPARED, edge=PREPARED_LINE)
    axes.text(
        39, 7.7, "prepared once, then read through a memory map", ha="center", va="center", fontsize=14, color="#3d6b4c"
    )
    draw_ranks(axes, 81.8, 3, 60.8, 13.6)

    figure.savefig(picture)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "pipeline.png")
