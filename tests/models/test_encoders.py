"""Pose encoders keep their three promises: missing is not zero, padding never leaks, positions are absolute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.models.encoders import PoseEncoder, sinusoidal_positions, with_visibility

POINTS, CHANNELS, WIDTH = 6, 3, 16
KINDS = [("linear", 1), ("conv", 1), ("conv", 2), ("conv", 4)]


def encoder(kind: str, stride: int, **settings: Any) -> PoseEncoder:
    torch.manual_seed(0)
    chosen = {"hidden": 24, "layers": 3, "kernel": 5, "dropout": 0.0, "positions": True, **settings}
    return PoseEncoder(kind=kind, stride=stride, num_points=POINTS, num_channels=CHANNELS, width=WIDTH, **chosen).eval()


def clip(frames: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    poses = torch.randn(1, frames, POINTS, CHANNELS, generator=generator)
    visible = torch.rand(1, frames, POINTS, generator=generator) > 0.3
    return poses * visible.unsqueeze(-1), visible, torch.ones(1, frames, dtype=torch.bool)


def padded(
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    poses, visible, mask = batch
    more = frames - mask.shape[1]
    garbage = torch.full((1, more, POINTS, CHANNELS), 7.0)
    return (
        torch.cat([poses, garbage], 1),
        torch.cat([visible, torch.ones(1, more, POINTS, dtype=torch.bool)], 1),
        torch.cat([mask, torch.zeros(1, more, dtype=torch.bool)], 1),
    )


@pytest.mark.parametrize(("kind", "stride"), KINDS)
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 13])
@pytest.mark.parametrize("padding", [1, 3, 8])
def test_padding_changes_nothing_whatever_it_holds(kind: str, stride: int, frames: int, padding: int) -> None:
    encode = encoder(kind, stride)
    vectors, mask = encode(*clip(frames))
    longer_vectors, longer_mask = encode(*padded(clip(frames), frames + padding))
    assert longer_mask.sum() == mask.sum()
    torch.testing.assert_close(longer_vectors[:, : vectors.shape[1]], vectors, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("kind", "stride"), KINDS)
@pytest.mark.parametrize("frames", [1, 5, 8, 12])
def test_the_sequence_shrinks_by_the_stride(kind: str, stride: int, frames: int) -> None:
    vectors, mask = encoder(kind, stride)(*clip(frames))
    assert vectors.shape == (1, -(-frames // stride), WIDTH)
    assert mask.shape == (1, -(-frames // stride))
    assert mask.all()


@pytest.mark.parametrize(("kind", "stride"), KINDS)
def test_a_missing_landmark_is_not_a_landmark_at_zero(kind: str, stride: int) -> None:
    encode = encoder(kind, stride)
    poses, visible, mask = clip(8)
    poses[:, :, 0] = 0.0
    seen, unseen = visible.clone(), visible.clone()
    seen[:, :, 0], unseen[:, :, 0] = True, False
    assert not torch.allclose(encode(poses, seen, mask)[0], encode(poses, unseen, mask)[0])


def test_whatever_stands_in_for_a_missing_landmark_is_not_read() -> None:
    poses, visible, _ = clip(4)
    nonsense = torch.where(visible.unsqueeze(-1), poses, torch.full_like(poses, 123.0))
    torch.testing.assert_close(with_visibility(nonsense, visible), with_visibility(poses, visible))


@pytest.mark.parametrize("positions", [True, False])
def test_positions_tell_frames_apart(positions: bool) -> None:
    encode = encoder("linear", 1, positions=positions)
    poses, visible, mask = clip(1)
    vectors, _ = encode(poses.repeat(1, 5, 1, 1), visible.repeat(1, 5, 1), mask.repeat(1, 5))
    assert torch.allclose(vectors[:, 0], vectors[:, 4]) is not positions


def test_sinusoids_are_those_of_the_paper() -> None:
    table = sinusoidal_positions(50, 8, torch.device("cpu"), torch.float32)
    assert table.shape == (50, 8)
    torch.testing.assert_close(table[3, 0], torch.tensor(3.0).sin())
    torch.testing.assert_close(table[3, 4], torch.tensor(3.0).cos())
    # A shift in time is a rotation of each pair: the products of neighbours do not depend on where they stand.
    near = (table[:-1] * table[1:]).sum(-1)
    torch.testing.assert_close(near, near[:1].expand_as(near))
