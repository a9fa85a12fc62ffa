"""Feature files of clips, as another network makes them of the video."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from toolkit.poses.pose_file import read_pose


def write_features(poses: Path, folder: Path, width: int, fps: float) -> None:
    """Write a feature file of each pose file: what a frozen random network sees of the same recording."""
    folder.mkdir(exist_ok=True)
    matrix = np.random.default_rng(0).normal(size=(256, width))
    for path in poses.glob("*.pose"):
        raw = read_pose(path.read_bytes())
        frames = np.minimum(np.arange(0, raw.num_frames / raw.fps, 1 / fps) * raw.fps, raw.num_frames - 1).astype(int)
        seen = np.nan_to_num(raw.data[frames, 0].reshape(len(frames), -1))[:, :256]
        values = np.tanh(seen @ matrix[: seen.shape[1]] / 1000)
        np.save(folder / f"{path.stem}.npy", values.astype(np.float32))
