"""What is particular to ``conformer``: distance shows in its attention, and no statistic of the batch enters it."""

from __future__ import annotations

import torch

from toolkit.models.encoders import make_pose_encoder
from toolkit.models.encoders.conformer import rotated, rotations


def test_products_of_rotated_vectors_depend_on_their_distance_alone() -> None:
    query, key = torch.randn(8), torch.randn(8)
    rotation = rotations(40, 8, torch.device("cpu"))
    products = rotated(query.expand(40, 8), rotation) @ rotated(key.expand(40, 8), rotation).T
    for distance in (0, 1, 7):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(products[0, 0], products[0, 7])


def test_there_is_no_batch_normalisation() -> None:
    settings = {"hidden": 8, "layers": 2, "heads": 2, "kernel": 3, "stride": 2, "dropout": 0.1, "positions": True}
    encoder = make_pose_encoder({"kind": "conformer", **settings}, num_points=4, num_channels=3, width=8)
    assert not list(encoder.buffers())
