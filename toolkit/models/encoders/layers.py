"""What the kinds of pose encoder share: their interface, positions, visibility channels, strided convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolkit.models.encoders.bf16_convolutions import Conv1d
from toolkit.poses.landmarks import LandmarkSet


@dataclass(frozen=True)
class EncoderSettings:
    """What a pose encoder is made from; each kind reads what it has a use for.

    Attributes:
        num_points, num_channels: landmarks of a frame and values of a landmark.
        width: the backbone's hidden size.
        landmark_set: names the landmarks; only ``stgcn`` needs it.
        kind, hidden, dropout, positions, layers, kernel, stride, heads, projection: a recipe's ``model.pose_encoder``.
    """

    num_points: int
    num_channels: int
    width: int
    landmark_set: LandmarkSet | None
    kind: str
    hidden: int
    dropout: float
    positions: bool
    layers: int = 1
    kernel: int = 1
    stride: int = 1
    heads: int = 1
    projection: str = "mlp"


class PoseEncoder(nn.Module):
    """The interface of every kind; a kind says how to :meth:`encode`."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.width = settings.width
        self.positions = settings.positions
        self.frames_per_position = settings.stride
        self.vectors_per_position = 1

    def length(self, frames: int) -> int:
        """Vectors that the backbone gets of so many frames."""
        return -(-frames // self.frames_per_position) * self.vectors_per_position

    def forward(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            poses: [clips, frames, points, channels].
            visible: bool [clips, frames, points].
            frame_mask: bool [clips, frames], true on real frames.

        Returns:
            vectors [clips, frames / stride, width] and their bool mask [clips, frames / stride]; values at masked
            positions are arbitrary.
        """
        weights_dtype = next(self.parameters()).dtype
        vectors, mask = self.encode(poses.to(weights_dtype), visible, frame_mask)
        if self.positions:
            vectors = vectors + sinusoidal_positions(vectors.shape[1], self.width, vectors.device, vectors.dtype)
        return vectors, mask

    def encode(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, without positions."""
        raise NotImplementedError


def sinusoidal_positions(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Absolute positions of "Attention is all you need" (Vaswani et al. 2017), shape [length, width].

    Computed, not stored, for clips of any length.
    """
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=device, dtype=torch.float32) * (-math.log(10_000.0) / max(half - 1, 1)))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width].to(dtype)


def with_visibility(poses: Tensor, visible: Tensor) -> Tensor:
    """Flatten landmarks and add one visibility channel each.

    In the linear layer that follows, the channel's column is a learned embedding of whether the landmark is seen.

    Args:
        poses: [clips, frames, points, channels]; values of missing landmarks are not read.
        visible: bool [clips, frames, points].

    Returns:
        [clips, frames, points × (channels + 1)].
    """
    flags = visible.unsqueeze(-1).to(poses.dtype)
    return torch.cat([poses * flags, flags], dim=-1).flatten(2)


def frame_front(settings: EncoderSettings) -> nn.Sequential:
    """Linear-LayerNorm-GELU-Dropout on each frame with its visibility channels: [..., inputs] -> [..., hidden]."""
    inputs, hidden = settings.num_points * (settings.num_channels + 1), settings.hidden
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(settings.dropout))


def to_backbone(hidden: int, width: int) -> nn.Sequential:
    """Linear-LayerNorm into the backbone: [..., hidden] -> [..., width]."""
    return nn.Sequential(nn.Linear(hidden, width), nn.LayerNorm(width))


def halvings(stride: int) -> int:
    """How many layers of stride 2 shorten a sequence ``stride`` times (a power of two)."""
    return stride.bit_length() - 1


class MaskedConvolution(nn.Module):
    """A pre-norm residual 1-D convolution over time that treats padding as zero; stride 2 halves the sequence.

    ``kernel`` is the odd number of frames that it sees, ``stride`` 1 or 2.
    """

    def __init__(self, width: int, kernel: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(width)
        self.convolution = Conv1d(width, 2 * width, kernel, stride=stride, padding=kernel // 2)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [clips, frames, width] and their mask [clips, frames], and both with frames / stride."""
        unpadded = self.norm(hidden) * mask.unsqueeze(-1)
        mixed = nn.functional.glu(self.convolution(unpadded.transpose(1, 2)).transpose(1, 2), dim=-1)
        mask = mask[:, :: self.stride]
        hidden = hidden[:, :: self.stride] + self.dropout(self.output(mixed))
        return hidden, mask
