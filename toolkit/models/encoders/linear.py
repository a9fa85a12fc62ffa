"""``linear``: two linear layers on every frame by itself, or one."""

from __future__ import annotations

from torch import Tensor, nn

from toolkit.models.encoders.layers import EncoderSettings, PoseEncoder, frame_front, to_backbone, with_visibility


class LinearEncoder(PoseEncoder):
    """A projection of each frame; the sequence keeps its length.

    ``projection: mlp`` is Linear-LayerNorm-GELU-Dropout-Linear-LayerNorm; ``single`` is one linear layer and nothing
    else, as in the baseline of YouTube-ASL (Uthus et al. 2023, arXiv:2306.15162).
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        self.frames_per_position = 1
        self.front: nn.Module
        self.back: nn.Module
        if settings.projection == "single":
            self.front = nn.Linear(settings.num_points * (settings.num_channels + 1), settings.width)
            self.back = nn.Identity()
        else:
            self.front = frame_front(settings)
            self.back = to_backbone(settings.hidden, settings.width)

    def encode(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.back(self.front(with_visibility(poses, visible))), frame_mask
