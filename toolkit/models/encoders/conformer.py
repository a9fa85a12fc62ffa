"""``conformer``: strided convolutions, then blocks that attend over the whole clip and convolve over its neighbourhood.

Gulati et al. 2020, "Conformer: Convolution-augmented Transformer for Speech Recognition" (arXiv:2005.08100), with two
changes: rotary positions (Su et al. 2021, "RoFormer", arXiv:2104.09864) encode the distance of two frames, and the
convolution module has LayerNorm in place of batch normalisation, whose statistics depend on padding and on the other
clips of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolkit.models.encoders.bf16_convolutions import Conv1d
from toolkit.models.encoders.layers import (
    EncoderSettings,
    MaskedConvolution,
    PoseEncoder,
    frame_front,
    halvings,
    to_backbone,
    with_visibility,
)

WIDENING = 4  # of the feed-forward modules


class ConformerEncoder(PoseEncoder):
    """Projection of each frame, ``log2(stride)`` strided convolutions, Conformer blocks, projection.

    The width of an attention head, ``hidden / heads``, must be even.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        hidden, heads, dropout = settings.hidden, settings.heads, settings.dropout
        self.front = frame_front(settings)
        self.subsampling = nn.ModuleList(
            MaskedConvolution(hidden, 3, 2, dropout) for _ in range(halvings(settings.stride))
        )
        self.blocks = nn.ModuleList(
            ConformerBlock(hidden, heads, settings.kernel, dropout) for _ in range(settings.layers)
        )
        self.back = to_backbone(hidden, settings.width)
        self.head_width = hidden // heads

    def encode(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden, mask = self.front(with_visibility(poses, visible)), frame_mask
        for convolution in self.subsampling:
            hidden, mask = convolution(hidden, mask)
        rotation = rotations(hidden.shape[1], self.head_width, hidden.device)
        for block in self.blocks:
            hidden = block(hidden, mask, rotation)
        return self.back(hidden), mask


class ConformerBlock(nn.Module):
    """Half a feed-forward module, self-attention, convolution, the other half, and a closing norm; all residual."""

    def __init__(self, width: int, heads: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.first_half = _feed_forward(width, dropout)
        self.attention = RotaryAttention(width, heads, dropout)
        self.convolution = ConvolutionModule(width, kernel, dropout)
        self.second_half = _feed_forward(width, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states [clips, positions, width] in and out; mask bool [clips, positions]."""
        hidden = hidden + 0.5 * self.first_half(hidden)
        hidden = hidden + self.attention(hidden, mask, rotation)
        hidden = hidden + self.convolution(hidden, mask)
        return self.norm(hidden + 0.5 * self.second_half(hidden))


def _feed_forward(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, WIDENING * width),
        nn.SiLU(),
        nn.Dropout(dropout),
        nn.Linear(WIDENING * width, width),
        nn.Dropout(dropout),
    )


class RotaryAttention(nn.Module):
    """Pre-norm self-attention over the real positions of a clip, with rotary positions."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        clips, length, width = hidden.shape
        mixed = self.queries_keys_values(self.norm(hidden)).view(clips, length, 3, self.heads, -1)
        queries, keys, values = mixed.permute(2, 0, 3, 1, 4)  # each [clips, heads, positions, head width]
        attended = nn.functional.scaled_dot_product_attention(
            rotated(queries, rotation),
            rotated(keys, rotation),
            values,
            attn_mask=mask[:, None, None, :],
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.dropout(self.output(attended.transpose(1, 2).reshape(clips, length, width)))


class ConvolutionModule(nn.Module):
    """Pre-norm gated pointwise, depthwise and pointwise convolution over time; padding counts as zero."""

    def __init__(self, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gated = nn.Linear(width, 2 * width)
        self.depthwise = Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.depthwise_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        unpadded = nn.functional.glu(self.gated(self.norm(hidden)), dim=-1) * mask.unsqueeze(-1)
        mixed = self.depthwise(unpadded.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.output(nn.functional.silu(self.depthwise_norm(mixed))))


def rotations(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which each position's pairs of channels turn, float32 [positions, head width / 2] each."""
    pairs = torch.arange(0, head_width, 2, device=device, dtype=torch.float32)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * 10_000.0 ** (-pairs / head_width)
    return angles.cos(), angles.sin()


def rotated(vectors: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel ``i`` against channel ``i + half`` by the position's angle; [..., positions, head width]."""
    cosines, sines = (part.to(vectors.dtype) for part in rotation)
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
