"""Pose encoders: landmark coordinates or video features in, a sequence of backbone-sized vectors and its mask out.

A recipe chooses one by ``model.pose_encoder``; each kind has its file. An encoder must not know texts. All of them are
tested for this:

* a missing landmark is marked by a visibility channel or replaced by a learned embedding, and the zero in its place is
  never read;
* frames added after a clip change nothing, nor do other clips in its batch;
* the vectors carry their absolute position (``positions: true``), because the cross-attention of T5-like backbones has
  none of its own;
* every parameter gets a gradient from every batch, whatever is missing in it.
"""

from __future__ import annotations

from typing import Any

from toolkit.models.encoders.conformer import ConformerEncoder
from toolkit.models.encoders.convolutional import ConvEncoder
from toolkit.models.encoders.features import FeatureSettings, FusedEncoder
from toolkit.models.encoders.graph import GraphEncoder
from toolkit.models.encoders.layers import EncoderSettings, PoseEncoder
from toolkit.models.encoders.linear import LinearEncoder
from toolkit.poses.landmarks import LandmarkSet

__all__ = ["KINDS", "FeatureSettings", "PoseEncoder", "make_pose_encoder"]

KINDS: dict[str, type[PoseEncoder]] = {
    "linear": LinearEncoder,
    "conv": ConvEncoder,
    "conformer": ConformerEncoder,
    "stgcn": GraphEncoder,
}


def make_pose_encoder(
    settings: dict[str, Any],
    *,
    num_points: int,
    num_channels: int,
    width: int,
    landmark_set: LandmarkSet | None = None,
    features: FeatureSettings | None = None,
) -> PoseEncoder:
    """The encoder that a recipe's ``model.pose_encoder`` describes, with random weights.

    ``settings`` is that section; the others are as in :class:`EncoderSettings`. With ``features`` it encodes these,
    too, or alone where there are no landmarks.

    Raises:
        ValueError: ``stgcn`` without a landmark set.
    """
    sizes = EncoderSettings(num_points, num_channels, width, landmark_set, **settings)
    if not features:
        return KINDS[sizes.kind](sizes)
    return FusedEncoder(sizes, KINDS[sizes.kind](sizes) if num_points else None, features)
