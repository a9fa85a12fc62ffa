"""Features alone and beside poses keep the promises of pose encoders, whatever the kind and the fusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config

from tests.small_configs import POSE_ENCODER, T5, translator_config
from toolkit.models import PoseTranslator

WIDTH = 12
CASES = [
    (points, kind, fusion, stride)
    for points, fusion in ((0, "sum"), (50, "sum"), (50, "concat"))
    for kind, stride in (("linear", 1), ("linear", 4), ("conv", 2))
]


def model_of(points: int, kind: str, fusion: str, stride: int, **settings: Any) -> PoseTranslator:
    torch.manual_seed(0)
    encoder = {"kind": kind, "hidden": 16, "layers": 2, "kernel": 5, "dropout": 0.0}
    config = translator_config(
        T5Config(**T5 | {"dropout_rate": 0.0}),
        **{"num_points": points, "num_features": WIDTH, "feature_encoder": encoder, "fusion": fusion}
        | {"pose_encoder": POSE_ENCODER | {"stride": stride}}
        | settings,
    )
    return PoseTranslator(config)


def clips_of(frames: list[int], points: int, padded: int = 0) -> dict[str, Tensor]:
    """Clips of random values, padded to the longest of them or to more; padding holds anything."""
    longest = max(*frames, padded)
    poses = torch.full((len(frames), longest, points, 3), 7.0)
    features = torch.full((len(frames), longest, WIDTH), 5.0, dtype=torch.float16)
    for row, length in enumerate(frames):
        generator = torch.Generator().manual_seed(length)
        poses[row, :length] = torch.randn(length, points, 3, generator=generator)
        features[row, :length] = torch.randn(length, WIDTH, generator=generator).half()
    mask = torch.arange(longest) < torch.tensor(frames)[:, None]
    visible = torch.ones(len(frames), longest, points, dtype=torch.bool)
    return {"poses": poses, "visible": visible, "frame_mask": mask, "video_features": features}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neither_padding_nor_other_clips_change_a_clip(case: tuple[int, str, str, int]) -> None:
    points, _, fusion, stride = case
    model = model_of(*case).eval()
    for length in (1, 2, 9, 12):
        alone, mask = model.encode(**clips_of([length], points))
        positions = -(-length // stride) * (2 if fusion == "concat" else 1)
        assert mask.sum() == positions and model.pose_encoder.length(length) == alone.shape[1]
        together, among = model.encode(**clips_of([length, 15], points, padded=20))
        assert among[0].sum() == positions
        torch.testing.assert_close(together[:1, :positions], alone[:, :positions], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_learns_and_every_input_counts(case: tuple[int, str, str, int]) -> None:
    points = case[0]
    model = model_of(*case)
    inputs = clips_of([9, 6], points)
    labels = torch.tensor([[3, 4, 1], [5, 1, -100]])
    before = model(**inputs, labels=labels).logits
    before.square().sum().backward()
    without = [name for name, item in model.pose_encoder.named_parameters() if item.grad is None or not item.grad.any()]
    assert without == []
    for name in ["video_features", *(["poses"] if points else [])]:
        changed = inputs | {name: inputs[name] * 0.5}
        assert not torch.allclose(model(**changed, labels=labels).logits, before)


def test_a_masked_frame_is_not_a_frame_of_small_numbers() -> None:
    model = model_of(0, "linear", "sum", 1).eval()
    inputs = clips_of([5], 0)
    masked, small = (inputs["video_features"].clone() for _ in range(2))
    masked[:, 2], small[:, 2] = 0, 1e-6
    vectors = [model.pose_encoder(**inputs | {"video_features": values})[0][0, 2] for values in (masked, small)]
    assert not torch.allclose(*vectors)


def test_where_the_features_are_matters() -> None:
    """Without positions of their own T5's cross-attention would read a reversed clip alike."""
    for case in ((0, "linear", "sum", 1), (50, "linear", "concat", 1), (50, "linear", "sum", 1)):
        model = model_of(*case).eval()
        still = {**clips_of([8], case[0]), "poses": torch.zeros(1, 8, case[0], 3)}
        still["video_features"] = torch.ones(1, 8, WIDTH, dtype=torch.float16)
        vectors, _ = model.pose_encoder(**still)
        assert (vectors[0, 1:] - vectors[0, :-1]).abs().amax(dim=-1).min() > 1e-3


def test_a_model_of_features_asks_for_them() -> None:
    model = model_of(50, "conv", "sum", 2)
    inputs = clips_of([5], 50)
    del inputs["video_features"]
    with pytest.raises(ValueError, match="video_features"):
        model.encode(**inputs)


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model = model_of(50, "conv", "concat", 2).eval()
    model.save_pretrained(tmp_path / "model")
    again = PoseTranslator.from_pretrained(tmp_path / "model").eval()
    inputs = clips_of([7, 5], 50)
    torch.testing.assert_close(again.encode(**inputs)[0], model.encode(**inputs)[0])
