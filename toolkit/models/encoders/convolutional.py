"""``conv``: a projection of each frame, then strided convolutions over time that shorten the sequence."""

from __future__ import annotations

from torch import Tensor, nn

from toolkit.models.encoders.layers import (
    EncoderSettings,
    MaskedConvolution,
    PoseEncoder,
    frame_front,
    halvings,
    to_backbone,
    with_visibility,
)


class ConvEncoder(PoseEncoder):
    """Gated residual convolutions, at least ``log2(stride)``: the first so many of them halve the sequence."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        self.front = frame_front(settings)
        halving = halvings(settings.stride)
        self.convolutions = nn.ModuleList(
            MaskedConvolution(settings.hidden, settings.kernel, 2 if layer < halving else 1, settings.dropout)
            for layer in range(max(settings.layers, halving))
        )
        self.back = to_backbone(settings.hidden, settings.width)

    def encode(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden, mask = self.front(with_visibility(poses, visible)), frame_mask
        for convolution in self.convolutions:
            hidden, mask = convolution(hidden, mask)
        return self.back(hidden), mask
