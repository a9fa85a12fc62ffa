"""Peculiarities of ``stgcn``: a graph of named landmarks, hands that share weights, parts relative to a landmark."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from toolkit.models.encoders.parts import part_groups
from toolkit.poses.landmarks import LandmarkSet, landmark_set_names, load_landmark_set

HAND = 21


def without(landmark_set: LandmarkSet, *parts: str) -> LandmarkSet:
    """The set without some of its parts."""
    kept = [index for name, indices in landmark_set.parts.items() if name not in parts for index in indices]
    place = {index: new for new, index in enumerate(kept)}
    return replace(
        landmark_set,
        points=tuple(landmark_set.points[index] for index in kept),
        parts={
            name: tuple(place[i] for i in indices) for name, indices in landmark_set.parts.items() if name not in parts
        },
        mirror=tuple(place.get(landmark_set.mirror[index], place[index]) for index in kept),
        edges=tuple((place[a], place[b]) for a, b in landmark_set.edges if a in place and b in place),
    )


@pytest.mark.parametrize("name", landmark_set_names())
def test_every_shipped_set_makes_graphs_that_learn(name: str, encoder: Any, clips: Any) -> None:
    landmarks = load_landmark_set(name)
    encode = encoder("stgcn", 2, landmarks=landmarks)
    poses, visible, mask = clips(5, 2, landmarks=landmarks, share=0.9)
    vectors, _ = encode(poses, visible, mask)
    (vectors * torch.randn_like(vectors)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encode.parameters())
    covered = sum(part.last - part.first for parts in encode.groups.values() for part in parts)
    assert covered == landmarks.num_points


@pytest.mark.parametrize("absent", [("left_hand", "right_hand"), ("body",), ("body", "right_hand"), ("left_hand",)])
def test_parts_that_a_set_lacks_have_no_weights(absent: tuple[str, ...], encoder: Any, clips: Any) -> None:
    landmarks = without(load_landmark_set("hands_body_50"), *absent)
    encode = encoder("stgcn", landmarks=landmarks)
    vectors, mask = encode(*clips(4, 2, landmarks=landmarks))
    assert vectors.shape[:2] == mask.shape == (2, 4)
    names = [part.name for parts in encode.groups.values() for part in parts]
    # Where the hands are stays known without any landmark of the body.
    assert set(names) == {"body", "left_hand", "right_hand"} - (set(absent) - {"body"})


def test_left_and_right_hand_share_their_weights() -> None:
    for name in landmark_set_names():
        groups = part_groups(load_landmark_set(name))
        assert [part.name for part in groups["hands"]] == ["left_hand", "right_hand"]
        assert groups["hands"][0].edges == groups["hands"][1].edges
        assert len(groups["hands"][0].edges) == HAND
    other = replace(load_landmark_set("hands_body_50"), edges=((8, 9),))
    assert "hands" not in part_groups(other)


def test_a_right_hand_looks_like_the_left_one_in_a_mirror(encoder: Any, clips: Any) -> None:
    landmarks = load_landmark_set("hands_body_50")
    encode = encoder("stgcn", positions=False)
    poses, visible, mask = clips(6, share=1.0)
    left, right = (
        slice(landmarks.parts[part][0], landmarks.parts[part][-1] + 1) for part in ("left_hand", "right_hand")
    )
    poses[:, :, right] = poses[:, :, left] * torch.tensor([-1.0, 1.0, 1.0])
    read: list[torch.Tensor] = []
    encode.graphs["hands"].register_forward_hook(lambda _, given, result: read.append(result[0]))
    encode(poses, visible, mask)
    torch.testing.assert_close(*read[0].split(1))


@pytest.mark.parametrize(
    ("name", "part"), [("hands_body_50", "left_hand"), ("youtube_asl_85", "face"), ("holistic_178", "face")]
)
def test_parts_are_told_from_their_landmark_and_the_body_knows_where_that_is(
    name: str, part: str, encoder: Any, clips: Any
) -> None:
    landmarks = load_landmark_set(name)
    encode = encoder("stgcn", landmarks=landmarks)
    group = "hands" if part.endswith("hand") else part
    read: dict[str, list[torch.Tensor]] = {group: [], "body": []}
    for key, values in read.items():
        encode.graphs[key].register_forward_hook(lambda _, given, result, values=values: values.append(result[0]))
    poses, visible, mask = clips(6, landmarks=landmarks, share=1.0)
    encode(poses, visible, mask)
    moved = poses.clone()
    moved[:, :, list(landmarks.parts[part])] += torch.tensor([0.5, -0.3, 0.2])
    encode(moved, visible, mask)
    torch.testing.assert_close(read[group][0], read[group][1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(read["body"][0], read["body"][1], atol=1e-3)


def test_features_that_are_relative_already_are_left_alone() -> None:
    groups = part_groups(load_landmark_set("unisign_69"))
    assert not any(part.is_relative or part.guests for parts in groups.values() for part in parts)


def test_the_graph_is_that_of_the_names() -> None:
    landmarks = load_landmark_set("hands_body_50")
    body = part_groups(landmarks)["body"][0]
    names = [point for _, point in landmarks.points[body.first : body.last]] + list(body.guests)
    rows = {name: dict(zip(names, row, strict=True)) for name, row in zip(names, body.adjacency(), strict=True)}
    near = {name: {other for other, share in row.items() if share} for name, row in rows.items()}
    assert near["LEFT_ELBOW"] == {"LEFT_SHOULDER", "LEFT_WRIST"}
    assert near["left_hand"] == {"LEFT_WRIST"}
    assert all(sum(row.values()) == pytest.approx(1.0) for row in rows.values())


def test_an_stgcn_without_a_landmark_set_is_refused() -> None:
    from toolkit.models.encoders import make_pose_encoder

    with pytest.raises(ValueError, match="landmark"):
        make_pose_encoder(
            {"kind": "stgcn", "hidden": 8, "layers": 1, "kernel": 3, "stride": 1, "dropout": 0.0, "positions": True},
            num_points=50,
            num_channels=3,
            width=8,
        )
