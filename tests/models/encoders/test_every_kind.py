"""All kinds keep their promises: missing is not zero, padding never leaks, positions are absolute, all of it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config

from toolkit.models import PoseTranslator, PoseTranslatorConfig
from toolkit.models.encoders import KINDS
from toolkit.models.encoders.layers import sinusoidal_positions, with_visibility
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.sections.model import PoseEncoder

STRIDES = [("linear", 1), ("conv", 1), ("conv", 2), ("conv", 4), ("conformer", 1), ("conformer", 4), ("stgcn", 1),
           ("stgcn", 4)]  # fmt: skip
Clips = tuple[Tensor, Tensor, Tensor]


def padded(batch: Clips, frames: int) -> Clips:
    """The batch with frames behind it that hold anything, and claim to be visible."""
    poses, visible, mask = batch
    more = frames - mask.shape[1]
    return (
        torch.cat([poses, torch.full((len(poses), more, *poses.shape[2:]), 7.0)], 1),
        torch.cat([visible, torch.ones(len(poses), more, poses.shape[2], dtype=torch.bool)], 1),
        torch.cat([mask, torch.zeros(len(poses), more, dtype=torch.bool)], 1),
    )


@pytest.mark.parametrize(("kind", "stride"), STRIDES)
def test_padding_changes_nothing_whatever_it_holds(kind: str, stride: int, encoder: Any, clips: Any) -> None:
    encode = encoder(kind, stride)
    for frames in (1, 2, 7, 8, 13):
        vectors, mask = encode(*clips(frames))
        for padding in (1, 3, 8):
            longer_vectors, longer_mask = encode(*padded(clips(frames), frames + padding))
            assert longer_mask.sum() == mask.sum()
            torch.testing.assert_close(longer_vectors[:, : vectors.shape[1]], vectors, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "stride"), STRIDES)
def test_the_other_clips_of_a_batch_change_nothing(kind: str, stride: int, encoder: Any, clips: Any) -> None:
    encode = encoder(kind, stride)
    alone, _ = encode(*clips(9))
    for others in (clips(14, 3, seed=1), tuple(50 * part for part in clips(30, 1, seed=2)[:1]) + clips(30, 1)[1:]):
        batch = [torch.cat(parts) for parts in zip(padded(clips(9), others[0].shape[1]), others, strict=True)]
        together, mask = encode(*batch)
        assert mask[0].sum() == alone.shape[1]
        torch.testing.assert_close(together[:1, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "stride"), STRIDES)
def test_the_sequence_shrinks_by_the_stride(kind: str, stride: int, encoder: Any, clips: Any) -> None:
    encode = encoder(kind, stride)
    for frames in (1, 5, 8, 12):
        vectors, mask = encode(*clips(frames))
        assert vectors.shape == (1, -(-frames // stride), encode.width)
        assert mask.shape == (1, -(-frames // stride))
        assert mask.all()


@pytest.mark.parametrize(("kind", "stride"), STRIDES)
def test_a_missing_landmark_is_not_a_landmark_at_zero(kind: str, stride: int, encoder: Any, clips: Any) -> None:
    encode = encoder(kind, stride)
    poses, visible, mask = clips(8, share=1.0)
    poses[:, :, 0] = 0.0
    unseen = visible.clone()
    unseen[:, :, 0] = False
    assert not torch.allclose(encode(poses, visible, mask)[0], encode(poses, unseen, mask)[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_stands_in_for_a_missing_landmark_is_not_read(kind: str, encoder: Any, clips: Any) -> None:
    encode = encoder(kind)
    poses, visible, mask = clips(4)
    nonsense = torch.where(visible.unsqueeze(-1), poses, torch.full_like(poses, 123.0))
    torch.testing.assert_close(encode(nonsense, visible, mask)[0], encode(poses, visible, mask)[0])
    torch.testing.assert_close(with_visibility(nonsense, visible), with_visibility(poses, visible))


@pytest.mark.parametrize("missing", ["nothing", "both hands", "everything"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_whatever_is_missing(kind: str, missing: str, encoder: Any, clips: Any) -> None:
    encode = encoder(kind, 2).train()
    poses, visible, mask = clips(6, 2, share=1.0)
    visible[..., {"nothing": slice(0, 0), "both hands": slice(8, 50), "everything": slice(0, 50)}[missing]] = False
    vectors, _ = encode(poses * visible.unsqueeze(-1), visible, mask)
    (vectors * torch.randn_like(vectors)).sum().backward()
    for name, parameter in encode.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if missing == "nothing" and not name.endswith("missing"):
            assert parameter.grad.any(), name


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_positions_tell_frames_apart(kind: str, positions: bool, encoder: Any, clips: Any) -> None:
    encode = encoder(kind, positions=positions)
    poses, visible, mask = clips(1)
    vectors, _ = encode(poses.repeat(1, 30, 1, 1), visible.repeat(1, 30, 1), mask.repeat(1, 30))
    # In the middle of a clip that stands still the position differs, and the attention: by how near its ends are.
    assert torch.allclose(vectors[:, 14], vectors[:, 16], atol=0.01) is not positions


@pytest.mark.parametrize("kind", KINDS)
def test_precisions(kind: str, encoder: Any, clips: Any) -> None:
    batch = clips(9, 2, share=0.9)
    expected, _ = encoder(kind, 2)(*batch)
    halved, _ = encoder(kind, 2).bfloat16()(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = encoder(kind, 2)(*batch)
    assert halved.dtype == torch.bfloat16
    for given in (halved, mixed):
        assert (given.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kinds_own_sizes_stand_where_the_recipe_says_null(kind: str) -> None:
    given = PoseEncoder.model_validate({"kind": kind, "hidden": None, "layers": None, "stride": None, "heads": None})
    assert given == PoseEncoder.model_validate({"kind": kind})
    assert PoseEncoder.model_validate({"kind": kind, "hidden": 64}).hidden == 64


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"kernel": 4}, "kernel 4"),
        ({"stride": 3}, "stride 3"),
        ({"kind": "conformer", "hidden": 90}, "hidden 90"),
        ({"kind": "stgcn", "hidden": 90}, "hidden 90"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], value: str) -> None:
    with pytest.raises(ValueError, match=value):
        PoseEncoder.model_validate(settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_translator_with_it_is_saved_and_loaded(kind: str, tmp_path: Any, clips: Any) -> None:
    landmarks = load_landmark_set("unisign_69")
    backbone = T5Config(vocab_size=40, d_model=32, d_kv=8, num_heads=2, d_ff=32, num_layers=1, decoder_start_token_id=0)
    settings = PoseEncoder.model_validate({"kind": kind, "hidden": 16, "layers": 1}).model_dump()
    model = PoseTranslator(
        PoseTranslatorConfig(
            backbone=backbone.to_dict(),
            pose_encoder=settings,
            num_points=landmarks.num_points,
            num_channels=landmarks.num_channels,
            landmark_set=landmarks.to_dict(),
        )
    ).eval()
    model.save_pretrained(tmp_path)
    batch = (*clips(6, 2, landmarks=landmarks), torch.tensor([[5, 1], [7, 1]]))
    torch.testing.assert_close(PoseTranslator.from_pretrained(tmp_path)(*batch).logits, model(*batch).logits)


def test_sinusoids_are_those_of_the_paper() -> None:
    table = sinusoidal_positions(50, 8, torch.device("cpu"), torch.float32)
    assert table.shape == (50, 8)
    torch.testing.assert_close(table[3, 0], torch.tensor(3.0).sin())
    torch.testing.assert_close(table[3, 4], torch.tensor(3.0).cos())
    # A shift in time is a rotation of each pair: the products of neighbours do not depend on where they stand.
    near = (table[:-1] * table[1:]).sum(-1)
    torch.testing.assert_close(near, near[:1].expand_as(near))
