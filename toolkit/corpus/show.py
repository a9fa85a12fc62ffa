"""Draw one clip as an animation: its skeleton as a model sees it, beside the recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from toolkit.corpus.archives.files import PoseFiles
from toolkit.corpus.names import Names, escaped
from toolkit.corpus.packed import Clip, Corpus
from toolkit.corpus.table import Row
from toolkit.errors import UserError
from toolkit.poses.features import read_clip, recorded_points
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.pose_file import FloatArray, PoseError

_COLORS = {"body": "#444444", "left_hand": "#c0504d", "right_hand": "#3b6ea5", "face": "#7f9a48"}


def find_clip(corpus: Corpus, uid: str) -> tuple[str, Clip]:
    """The clip of that name and its split.

    Raises:
        UserError: there is no such clip, or the name is ambiguous.
    """
    places = {name: (split, index) for split, clips in corpus.splits.items() for index, name in enumerate(clips.uids)}
    names = Names(places)
    meant = [uid] if uid in places else names.match(uid)
    if not meant:
        near = f"the nearest is '{escaped(names.nearest(uid))}'; " if places else ""
        raise UserError(f"{corpus.path} has no clip '{escaped(uid)}'", f"{near}look for it in rejects.csv")
    if len(meant) > 1:
        raise UserError(f"'{escaped(uid)}' may be any of {', '.join(map(escaped, meant))}", "name one of them")
    split, index = places[meant[0]]
    return split, corpus.splits[split].clip(index)


def animate(corpus: Corpus, uid: str, out: Path, poses: PoseFiles | None = None) -> None:
    """Draw a clip as an animated GIF: its features, and beside them the recording when ``poses`` has it.

    A clip with a start or end is drawn beside the whole file.

    Raises:
        UserError: there is no such clip or no readable recording of it.
    """
    split, clip = find_clip(corpus, uid)
    if not corpus.landmark_set.num_points:
        raise UserError(f"the corpus {corpus.path} has no landmarks to draw", "name a corpus that has poses")
    features = np.asarray(clip.features, np.float32)
    panels = [(f"normalised, {corpus.metadata.fps:g} fps", features, corpus.metadata.fps)]
    if poses is not None:
        row = Row(clip.uid, clip.text, clip.video, start=0.0)
        key = poses.find(row)
        if key is None:
            reason = poses.reason_not_found(row)[0]  # the remedy is for tables
            raise UserError(f"there is no recording of '{escaped(clip.uid)}': {reason}", "check --poses")
        try:
            raw = read_clip(poses.read(key))
            panels.insert(0, (f"recorded, {raw.fps:g} fps", recorded_points(raw, corpus.landmark_set), raw.fps))
        except PoseError as error:
            raise UserError(
                f"the recording of '{uid}' cannot be drawn: {error}", "leave out --poses to draw the features alone"
            ) from error
    _animate(panels, corpus.landmark_set, f"{clip.uid} ({split}): {clip.text}", len(features), corpus.metadata.fps, out)


def _animate(
    drawn: list[tuple[str, FloatArray, float]], landmarks: LandmarkSet, title: str, frames: int, fps: float, out: Path
) -> None:
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(drawn), 4.4))
    figure.suptitle(title[:80].replace("$", r"\$"), fontsize=10)
    panels = []
    for axis, (name, points, rate) in zip(np.atleast_1d(figure.subplots(1, len(drawn))), drawn, strict=True):
        flat = points[..., :2].reshape(-1, 2)
        low, high = np.nanpercentile(flat, 1, axis=0), np.nanpercentile(flat, 99, axis=0)
        margin = 0.15 * (high - low).max() + 1e-6
        axis.set(xlim=(low[0] - margin, high[0] + margin), ylim=(high[1] + margin, low[1] - margin), aspect="equal")
        axis.set_title(name, fontsize=9)
        dots = {
            part: axis.plot([], [], ".", markersize=3, color=_COLORS.get(part, "#888888"))[0]
            for part in landmarks.parts
        }
        bones = axis.plot([], [], "-", linewidth=0.8, color="#999999")[0]
        panels.append((points, rate, dots, bones))

    def draw(frame: int) -> list[Any]:
        for points, rate, dots, bones in panels:
            now = points[min(round(frame / fps * rate), len(points) - 1)]
            for part, indices in landmarks.parts.items():
                dots[part].set_data(now[list(indices), 0], now[list(indices), 1])
            ends = now[np.array(landmarks.edges, np.intp).reshape(-1, 2)][..., :2]
            # A NaN between two edges interrupts the line.
            line = np.concatenate([ends, np.full((len(ends), 1, 2), np.nan)], axis=1).reshape(-1, 2)
            bones.set_data(line[:, 0], line[:, 1])
        return []

    FuncAnimation(figure, draw, frames=frames).save(out, writer=PillowWriter(fps=max(1, round(fps))), dpi=80)
