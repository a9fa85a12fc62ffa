"""``conv``: a projection of each frame, then strided convolutions over time that shorten the sequence."""

from __future__ import annotations

from torch import Tensor, nn

from toolkit.models.encoders.layers import (
    MaskedConvolution,
    PoseEncoder,
    frame_front,
    halvings,
    to_backbone,
    with_visibility,
)


class ConvEncoder(PoseEncoder):
    """Gated residual convolutions; the first ``log2(stride)`` of them halve the sequence.

    Args:
        num_points, num_channels: what a frame holds.
        width: the backbone's hidden size.
        hidden: width of the convolutions.
        layers: convolutions, at least ``log2(stride)``.
        kernel: frames that one convolution sees (odd).
        stride: how much shorter the sequence becomes, a power of two.
        dropout: dropout probability.
        positions: add sinusoidal absolute positions.
    """

    def __init__(
        self,
        *,
        num_points: int,
        num_channels: int,
        width: int,
        hidden: int,
        layers: int,
        kernel: int,
        stride: int,
        dropout: float,
        positions: bool,
    ) -> None:
        super().__init__(width, positions)
        self.front = frame_front(num_points, num_channels, hidden, dropout)
        halving = halvings(stride)
        self.convolutions = nn.ModuleList(
            MaskedConvolution(hidden, kernel, 2 if layer < halving else 1, dropout)
            for layer in range(max(layers, halving))
        )
        self.back = to_backbone(hidden, width)

    def encode(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden, mask = self.front(with_visibility(poses, visible)), frame_mask
        for convolution in self.convolutions:
            hidden, mask = convolution(hidden, mask)
        return self.back(hidden), mask
