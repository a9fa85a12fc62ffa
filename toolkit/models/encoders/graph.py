"""``stgcn``: each part of the body as a graph of its landmarks, convolved over space and time.

Yan et al. 2018, "Spatial Temporal Graph Convolutional Networks for Skeleton-Based Action Recognition"
(arXiv:1801.07455): a landmark is mixed with its neighbours in the skeleton (their distance partitioning: one matrix for
itself, one for the neighbours), then each landmark is convolved over time. Part-wise as in Uni-Sign (Li et al. 2025,
arXiv:2501.15187): both hands share their weights, hands are relative to the wrist and a face to the nose, the graph's
edges start from the skeleton and are learnt, and the parts are concatenated at the end.

The graph comes from the landmark set (see ``parts.py``); parts that a set lacks have no weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization

from toolkit.models.encoders.bf16_convolutions import Conv2d
from toolkit.models.encoders.layers import EncoderSettings, PoseEncoder, halvings, to_backbone
from toolkit.models.encoders.parts import Part, part_groups

READOUTS = 4
"""Weighted means over the landmarks of a part that become its vector: a single one would lose where a finger is."""


class GraphEncoder(PoseEncoder):
    """Graph blocks for each group of parts that share weights, their readouts side by side, projection.

    A part has ``hidden`` values in the end, and its landmarks ``hidden / READOUTS`` channels each.

    Raises:
        ValueError: there is no landmark set.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        landmark_set = settings.landmark_set
        if landmark_set is None:
            raise ValueError("the stgcn encoder needs the landmark set, whose parts and edges are its graph")
        self.coordinates = sum(channel != "confidence" for channel in landmark_set.channels)
        self.groups = part_groups(landmark_set)
        self.graphs = nn.ModuleDict({name: PartGraph(parts[0], settings) for name, parts in self.groups.items()})
        self.back = to_backbone(settings.hidden * sum(map(len, self.groups.values())), settings.width)

    def encode(self, poses: Tensor, visible: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        clips = len(poses)
        origins = {
            part.name: _origin(poses, visible, part)
            for parts in self.groups.values()
            for part in parts
            if part.is_relative
        }
        read = []
        mask = frame_mask
        for name, parts in self.groups.items():
            # Parts that share weights are stacked as further clips.
            values, seen = zip(*(self._nodes(poses, visible, part, origins) for part in parts), strict=True)
            vectors, mask = self.graphs[name](torch.cat(values), torch.cat(seen), frame_mask.repeat(len(parts), 1))
            read += vectors.split(clips)
        return self.back(torch.cat(read, dim=-1)), mask[:clips]

    def _nodes(
        self, poses: Tensor, visible: Tensor, part: Part, origins: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What the nodes of a part hold [clips, frames, nodes, channels], and which of them are seen."""
        values, seen = poses[:, :, part.first : part.last], visible[:, :, part.first : part.last]
        if part.is_relative:
            origin, origin_seen = origins[part.name]
            offset = origin.clone()
            offset[..., self.coordinates :] = 0.0  # a confidence is no coordinate
            values, seen = values - offset, seen & origin_seen
        if part.guests:
            # Hands and face have lost their own place, so the body's graph gets it.
            values = torch.cat([values, *(origins[guest][0] for guest in part.guests)], dim=2)
            seen = torch.cat([seen, *(origins[guest][1] for guest in part.guests)], dim=2)
        if part.is_mirrored:
            values = torch.cat([-values[..., :1], values[..., 1:]], dim=-1)
        return values, seen


def _origin(poses: Tensor, visible: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Where a part is: [clips, frames, 1, channels], and whether that is known, bool [clips, frames, 1]."""
    if part.origin is not None:
        return poses[:, :, part.origin, None], visible[:, :, part.origin, None]
    values, seen = poses[:, :, part.first : part.last], visible[:, :, part.first : part.last, None]
    count = seen.sum(dim=2, keepdim=True)
    return (values * seen).sum(dim=2, keepdim=True) / count.clamp(min=1), count[..., 0] > 0


class PartGraph(nn.Module):
    """The graph of one part, or of several that share its weights; at least ``log2(stride)`` blocks."""

    def __init__(self, part: Part, settings: EncoderSettings) -> None:
        super().__init__()
        width = settings.hidden // READOUTS
        self.embedding = NodeEmbedding(part.num_nodes, settings.num_channels, width)
        halving = halvings(settings.stride)
        self.blocks = nn.ModuleList(
            GraphBlock(part, width, settings.kernel, 2 if layer < halving else 1, settings.dropout)
            for layer in range(max(settings.layers, halving))
        )
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(part.num_nodes, READOUTS, bias=False)

    def forward(self, values: Tensor, seen: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes [clips, frames, nodes, channels] to [clips, frames / stride, hidden], and the mask."""
        nodes = self.embedding(values, seen)
        for block in self.blocks:
            nodes, mask = block(nodes, mask)
        return self.readout(self.norm(nodes).transpose(2, 3)).flatten(2), mask


class NodeEmbedding(nn.Module):
    """A node's values and which landmark it is; a learned embedding of its own where the landmark is missing."""

    def __init__(self, nodes: int, num_channels: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(num_channels, width)
        self.identity = nn.Parameter(torch.empty(nodes, width))
        self.missing = nn.Parameter(torch.empty(nodes, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.identity, std=0.5)
        nn.init.normal_(self.missing, std=0.5)

    def forward(self, values: Tensor, seen: Tensor) -> Tensor:
        """Values [clips, frames, nodes, channels], seen [clips, frames, nodes] to [clips, frames, nodes, width]."""
        return torch.where(seen.unsqueeze(-1), self.project(values) + self.identity, self.missing)


class GraphBlock(nn.Module):
    """A pre-norm residual block: mix each node with its neighbours, convolve each node over time, mix its channels.

    ``kernel`` is the odd number of frames that the convolution sees, ``stride`` 1 or 2.
    """

    def __init__(self, part: Part, width: int, kernel: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.part = part
        self.stride = stride
        self.norm = nn.LayerNorm(width)
        self.adjacency = nn.Parameter(torch.empty(part.num_nodes, part.num_nodes))
        self.space = nn.Linear(2 * width, width)
        # One filter a channel, alike for all nodes: [clips, channels, frames, nodes].
        self.time = Conv2d(
            width, width, (kernel, 1), stride=(stride, 1), padding=(kernel // 2, 0), groups=width, bias=False
        )
        self.time_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialization.copy_(self.adjacency, torch.tensor(self.part.adjacency()))

    def forward(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes [clips, frames, nodes, width] and mask [clips, frames], and both with frames / stride."""
        own = self.norm(nodes)
        neighbours = torch.matmul(self.adjacency.to(own.dtype), own)
        mixed = nn.functional.gelu(self.space(torch.cat([own, neighbours], dim=-1))) * mask[..., None, None]
        # The permuted view is what torch calls channels-last: nothing is copied.
        mixed = self.time(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed = self.output(nn.functional.gelu(self.time_norm(mixed)))
        return nodes[:, :: self.stride] + self.dropout(mixed), mask[:, :: self.stride]


def reset_graph_parameters(module: nn.Module) -> None:
    """Initialise the tensors of this file's modules; other modules are not changed."""
    if isinstance(module, (NodeEmbedding, GraphBlock)):
        module.reset_parameters()
