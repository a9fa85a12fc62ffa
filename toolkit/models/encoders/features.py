"""The encoder of what another network made of a clip, alone or joined with the pose encoder.

Features have the frames of the poses, and their encoder has the stride of the pose encoder: both give as many
positions. A frame of zeros is one that is not known; a learned embedding stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.models.encoders.layers import (
    EncoderSettings,
    MaskedConvolution,
    PoseEncoder,
    frame_front,
    halvings,
    sinusoidal_positions,
    to_backbone,
    with_visibility,
)


@dataclass(frozen=True)
class FeatureSettings:
    """What a model reads besides landmarks, or instead of them.

    Attributes:
        num_features: numbers of a frame; 0 = nothing.
        encoder: a recipe's ``model.feature_encoder``.
        fusion: a recipe's ``model.fusion``.
    """

    num_features: int = 0
    encoder: dict[str, Any] | None = None
    fusion: str = "sum"


class FeatureEncoder(nn.Module):
    """A projection of each frame, a way to shorten the sequence, and a projection into the backbone.

    ``linear`` shortens by the mean of ``stride`` frames, ``conv`` by the convolutions of the pose encoder ``conv``.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.stride = settings.stride
        self.front = frame_front(settings)
        halving = halvings(settings.stride)
        layers = max(settings.layers, halving) if settings.kind == "conv" else 0
        self.convolutions = nn.ModuleList(
            MaskedConvolution(settings.hidden, settings.kernel, 2 if layer < halving else 1, settings.dropout)
            for layer in range(layers)
        )
        self.back = to_backbone(settings.hidden, settings.width)

    def forward(self, features: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode [clips, frames, dimensions]: vectors [clips, frames / stride, width] and their mask, no positions."""
        known = (features != 0).any(dim=-1, keepdim=True)
        hidden, mask = self.front(with_visibility(features.unsqueeze(2), known)), frame_mask
        for convolution in self.convolutions:
            hidden, mask = convolution(hidden, mask)
        if not self.convolutions and self.stride > 1:
            hidden, mask = _means(hidden, mask, self.stride)
        return self.back(hidden), mask


def _means(hidden: Tensor, mask: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The mean of every ``stride`` frames of a clip, padding left out."""
    missing = -hidden.shape[1] % stride
    hidden = nn.functional.pad(hidden * mask.unsqueeze(-1), (0, 0, 0, missing)).unflatten(1, (-1, stride))
    counts = nn.functional.pad(mask, (0, missing)).unflatten(1, (-1, stride)).sum(dim=-1, keepdim=True)
    return hidden.sum(dim=2) / counts.clamp(min=1), mask[:, ::stride]


class FusedEncoder(PoseEncoder):
    """A feature encoder, and a pose encoder where there are landmarks.

    ``sum`` adds their vectors, position by position; ``concat`` gives the backbone those of the poses, then those of
    the features. Both then carry the positions of their frames.
    """

    def __init__(self, settings: EncoderSettings, poses: PoseEncoder | None, features: FeatureSettings) -> None:
        super().__init__(settings)
        self.poses = poses
        self.frames_per_position = 1 if settings.kind == "linear" else settings.stride
        own = replace(
            settings,
            num_points=1,
            num_channels=features.num_features,
            stride=self.frames_per_position,
            **(features.encoder or {}),
        )
        self.features = FeatureEncoder(own)
        self.concatenates = poses is not None and features.fusion == "concat"
        self.vectors_per_position = 2 if self.concatenates else 1

    def forward(
        self, poses: Tensor, visible: Tensor, frame_mask: Tensor, video_features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As a pose encoder, of ``video_features`` [clips, frames, dimensions], too."""
        if video_features is None:
            raise ValueError("the model needs video_features: call it with what its processor makes of clips")
        vectors, mask = self.features(video_features.to(next(self.parameters()).dtype), frame_mask)
        if self.positions and (self.concatenates or self.poses is None):
            vectors = vectors + sinusoidal_positions(vectors.shape[1], self.width, vectors.device, vectors.dtype)
        if self.poses is None:
            return vectors, mask
        of_poses, _ = self.poses(poses, visible, frame_mask)
        if not self.concatenates:
            return of_poses + vectors, mask
        return padding_last(torch.cat([of_poses, vectors], dim=1), torch.cat([mask, mask], dim=1))


def padding_last(vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move all padding behind a clip's vectors: where these are must not depend on the clip's batch."""
    order = (~mask).int().argsort(dim=1, stable=True)
    return vectors.gather(1, order.unsqueeze(-1).expand_as(vectors)), mask.gather(1, order)
