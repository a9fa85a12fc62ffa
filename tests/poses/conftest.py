"""Pose files made by hand, so that tests know what is in them."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from toolkit.poses.landmarks import load_landmark_set

HAND = [point for component, point in load_landmark_set("hands_body_50").points if component == "LEFT_HAND_LANDMARKS"]
BODY = ["NOSE", "LEFT_EYE", "RIGHT_EYE", "LEFT_SHOULDER", "RIGHT_SHOULDER", "LEFT_ELBOW", "RIGHT_ELBOW", "LEFT_WRIST"]
BODY += ["RIGHT_WRIST", "LEFT_HIP", "RIGHT_HIP"]
COMPONENTS = {"POSE_LANDMARKS": BODY, "LEFT_HAND_LANDMARKS": HAND, "RIGHT_HAND_LANDMARKS": HAND}


def _text(value: str) -> bytes:
    return struct.pack("<H", len(value)) + value.encode()


class PoseFile:
    """Writes ``.pose`` files of every version, with any values that a test gives."""

    points = tuple((component, point) for component, names in COMPONENTS.items() for point in names)

    def body(self, frames: int = 10, people: int = 1, dims: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """A person who stands still: data [frames, people, points, dims] in pixels, confidence 1."""
        rng = np.random.default_rng(0)
        data = np.tile(rng.uniform(100, 300, (1, 1, len(self.points), dims)), (frames, people, 1, 1)).astype(np.float32)
        data[:, :, self.at("LEFT_SHOULDER")] = [300, 200, 0][:dims]
        data[:, :, self.at("RIGHT_SHOULDER")] = [200, 200, 0][:dims]
        return data, np.ones(data.shape[:3], np.float32)

    def at(self, point: str, component: str = "POSE_LANDMARKS") -> int:
        return self.points.index((component, point))

    def header(self, version: float, layout: str = "XYZC", width: int = 500) -> bytes:
        parts = [struct.pack("<fHHHH", version, width, 500, 0, len(COMPONENTS))]
        for component, names in COMPONENTS.items():
            parts += [_text(component), _text(layout), struct.pack("<HHH", len(names), 1, 1), *map(_text, names)]
            parts += [struct.pack("<HH", 0, 1), struct.pack("<HHH", 1, 2, 3)]
        return b"".join(parts)

    def bytes(
        self,
        data: np.ndarray,
        confidence: np.ndarray,
        *,
        version: float = 0.2,
        fps: float = 25,
        claimed_frames: int | None = None,
    ) -> bytes:
        frames, people, _, dims = data.shape
        head = self.header(version, "XYZC" if dims == 3 else "XYC")
        claimed = frames if claimed_frames is None else claimed_frames
        if version == 0.0:
            return head + struct.pack("<HH", int(fps), claimed) + self._sparse(data, confidence)
        sizes = (
            struct.pack("<fIH", fps, claimed, people)
            if version == 0.2
            else struct.pack("<HHH", int(fps), claimed % (1 << 16), people)
        )
        return head + sizes + data.astype("<f4").tobytes() + confidence.astype("<f4").tobytes()

    def _sparse(self, data: np.ndarray, confidence: np.ndarray) -> bytes:
        together = np.concatenate([data, confidence[..., None]], axis=3).astype("<f4")
        out = []
        for frame in together:
            out.append(struct.pack("<H", len(frame)))
            out += [struct.pack("<h", 0) + person.tobytes() for person in frame]
        return b"".join(out)


@pytest.fixture(scope="session")
def pose_file() -> PoseFile:
    return PoseFile()
