"""Pose encoders: landmark coordinates in, a shorter sequence of backbone-sized vectors and its mask out.

An encoder knows nothing of text. Three promises hold for each of them and are tested:

* a missing landmark is marked as missing (a visibility channel), never passed off as the coordinate zero;
* padding never leaks: frames added behind a clip change nothing;
* the vectors carry their absolute position, because the cross-attention of T5-like backbones has none of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal_positions(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Absolute positions of "Attention is all you need" (Vaswani et al. 2017), shape [length, width].

    Computed, not stored, so that no clip is too long for them.
    """
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=device, dtype=torch.float32) * (-math.log(10_000.0) / max(half - 1, 1)))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width].to(dtype)


def with_visibility(poses: Tensor, visible: Tensor) -> Tensor:
    """Flatten landmarks and add one visibility channel each.

    Args:
        poses: [clips, frames, points, channels], 0 where missing.
        visible: bool [clips, frames, points].

    Returns:
        [clips, frames, points × (channels + 1)].
    """
    flags = visible.unsqueeze(-1).to(poses.dtype)
    return torch.cat([poses * flags, flags], dim=-1).flatten(2)


class MaskedConvolution(nn.Module):
    """A pre-norm residual 1-D convolution over time that treats padding as silence; stride 2 halves the sequence."""

    def __init__(self, width: int, kernel: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, 2 * width, kernel, stride=stride, padding=kernel // 2)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        silent = self.norm(hidden) * mask.unsqueeze(-1)
        mixed = nn.functional.glu(self.convolution(silent.transpose(1, 2)).transpose(1, 2), dim=-1)
        mask = mask[:, :: self.stride]
        hidden = hidden[:, :: self.stride] + self.dropout(self.output(mixed))
        return hidden, mask


class PoseEncoder(nn.Module):
    """``linear``: one projection a frame, then LayerNorm-GELU-projection. ``conv``: the same front, then convolutions.

    Args:
        kind: ``linear`` or ``conv``.
        num_points, num_channels: what a frame holds.
        hidden: width of the encoder.
        width: the backbone's hidden size.
        layers: convolutions; ``log2(stride)`` of them halve the sequence, the first ones.
        kernel: frames that one convolution sees (odd).
        stride: how much shorter the sequence becomes, a power of two.
        dropout: dropout probability.
        positions: add sinusoidal absolute positions to the output.
    """

    def __init__(
        self,
        *,
        kind: str,
        num_points: int,
        num_channels: int,
        hidden: int,
        width: int,
        layers: int,
        kernel: int,
        stride: int,
        dropout: float,
        positions: bool,
    ) -> None:
        super().__init__()
        self.width = width
        self.positions = positions
        self.front = nn.Sequential(
            nn.Linear(num_points * (num_channels + 1), hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout)
        )
        halvings = int(math.log2(stride)) if kind == "conv" else 0
        depth = max(layers, halvings) if kind == "conv" else 0
        self.convolutions = nn.ModuleList(
            MaskedConvolution(hidden, kernel, 2 if layer < halvings else 1, dropout) for layer in range(depth)
        )
        self.back = nn.Sequential(nn.Linear(hidden, width), nn.LayerNorm(width))

    def forward(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            poses: [clips, frames, points, channels].
            visible: bool [clips, frames, points].
            frame_mask: bool [clips, frames], true on real frames.

        Returns:
            vectors [clips, frames / stride, width] and their bool mask [clips, frames / stride].
        """
        weights_dtype = next(self.parameters()).dtype
        hidden, mask = self.front(with_visibility(poses.to(weights_dtype), visible)), frame_mask
        for convolution in self.convolutions:
            hidden, mask = convolution(hidden, mask)
        vectors = self.back(hidden)
        if self.positions:
            vectors = vectors + sinusoidal_positions(vectors.shape[1], self.width, vectors.device, vectors.dtype)
        return vectors, mask
