"""Small encoders of every kind and clips for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.models.encoders import PoseEncoder, make_pose_encoder
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set

WIDTH = 16
Clips = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def encoder() -> Callable[..., PoseEncoder]:
    def make(kind: str, stride: int = 1, *, landmarks: LandmarkSet | None = None, **settings: Any) -> PoseEncoder:
        torch.manual_seed(0)
        landmark_set = landmarks or load_landmark_set("hands_body_50")
        chosen = {"hidden": 24, "layers": 2, "kernel": 5, "heads": 2, "dropout": 0.0, "positions": True, **settings}
        return make_pose_encoder(
            {"kind": kind, "stride": stride, **chosen},
            num_points=landmark_set.num_points,
            num_channels=landmark_set.num_channels,
            width=WIDTH,
            landmark_set=landmark_set,
        ).eval()

    return make


@pytest.fixture
def clips() -> Callable[..., Clips]:
    def make(
        frames: int, count: int = 1, *, landmarks: LandmarkSet | None = None, share: float = 0.7, seed: int = 0
    ) -> Clips:
        landmark_set = landmarks or load_landmark_set("hands_body_50")
        generator = torch.Generator().manual_seed(seed)
        shape = (count, frames, landmark_set.num_points)
        poses = torch.randn(*shape, landmark_set.num_channels, generator=generator)
        visible = torch.rand(*shape, generator=generator) < share
        return poses * visible.unsqueeze(-1), visible, torch.ones(count, frames, dtype=torch.bool)

    return make
