"""``linear``: two linear layers on every frame by itself, or one."""

from __future__ import annotations

from torch import Tensor, nn

from toolkit.models.encoders.layers import PoseEncoder, frame_front, to_backbone, with_visibility


class LinearEncoder(PoseEncoder):
    """A projection of each frame; the sequence keeps its length.

    Args:
        num_points, num_channels: what a frame holds.
        width: the backbone's hidden size.
        hidden: width between the two layers.
        dropout: dropout probability between them.
        positions: add sinusoidal absolute positions.
        projection: ``mlp``: Linear-LayerNorm-GELU-Dropout-Linear-LayerNorm. ``single``: one linear layer and nothing
            else, as in the baseline of YouTube-ASL (Uthus et al. 2023, arXiv:2306.15162).
    """

    def __init__(
        self,
        *,
        num_points: int,
        num_channels: int,
        width: int,
        hidden: int,
        dropout: float,
        positions: bool,
        projection: str = "mlp",
    ) -> None:
        super().__init__(width, positions)
        self.front: nn.Module
        self.back: nn.Module
        if projection == "single":
            self.front = nn.Linear(num_points * (num_channels + 1), width)
            self.back = nn.Identity()
        else:
            self.front = frame_front(num_points, num_channels, hidden, dropout)
            self.back = to_backbone(hidden, width)

    def encode(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.back(self.front(with_visibility(poses, visible))), frame_mask
