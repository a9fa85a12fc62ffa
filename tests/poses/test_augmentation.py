"""Augmentation: off is nothing at all, missing stays missing, padding stays padding, each change does what it says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.poses.augmentation import augment, draw_lengths, is_off
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.recipe.schema import Augmentation

HANDS_BODY = load_landmark_set("hands_body_50")
TEMPORAL = {"speed": 0.5, "time_warp": 0.8, "frame_drop": 0.3, "temporal_crop": 0.4}
SPATIAL = {"rotation": 20, "scale": 0.3, "shear": 0.2, "translation": 0.5, "noise": 0.05, "mirror": 0.5}
VISIBILITY = {"landmark_drop": 0.2, "hand_drop": 0.8}
ALL = {**TEMPORAL, **SPATIAL, **VISIBILITY}


def generators(clips: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, clip)) for clip in range(clips)]


def random_batch(lengths: list[int], landmark_set: LandmarkSet = HANDS_BODY, seed: int = 0):
    """Poses, visible and frame mask as collation makes them, with a third of the landmarks missing."""
    torch_rng = torch.Generator().manual_seed(seed)
    frames = max(lengths)
    frame_mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    shape = (len(lengths), frames, landmark_set.num_points)
    visible = (torch.rand(shape, generator=torch_rng) > 0.33) & frame_mask.unsqueeze(-1)
    poses = torch.randn(*shape, landmark_set.num_channels, generator=torch_rng) * visible.unsqueeze(-1)
    return poses, visible, frame_mask


def apply(batch, strengths: dict, seed: int = 0, landmark_set: LandmarkSet = HANDS_BODY, max_frames: int | None = None):
    changes = Augmentation(**strengths)
    lengths = draw_lengths(batch[2].sum(1).numpy(), changes, np.random.default_rng(seed), max_frames=max_frames)
    return augment(*batch, changes, landmark_set, lengths, generators(len(batch[0]), seed))


def test_strength_zero_is_the_identity():
    batch = random_batch([7, 3])
    assert is_off(Augmentation())
    assert all(new is old for new, old in zip(apply(batch, {}), batch, strict=True))


@pytest.mark.parametrize("name", sorted(ALL))
def test_each_strength_turns_something_on(name):
    assert not is_off(Augmentation(**{name: ALL[name]}))
    batch = random_batch([40, 40, 40, 40])
    changed = apply(batch, {name: ALL[name]})
    assert changed[0].shape != batch[0].shape or not torch.equal(changed[0], batch[0])


strength_sets = st.fixed_dictionaries({name: st.sampled_from([0.0, 0.1, top]) for name, top in ALL.items()})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), strength_sets, st.integers(0, 1000))
def test_what_holds_for_any_strengths(lengths, strengths, seed):
    batch = random_batch(lengths)
    poses, visible, frame_mask = apply(batch, strengths, seed)
    assert poses.dtype == torch.float32 and visible.dtype == frame_mask.dtype == torch.bool
    assert poses.shape[:2] == visible.shape[:2] == frame_mask.shape
    assert torch.isfinite(poses).all()
    assert frame_mask.any(1).all() and frame_mask.any(0).all()
    # Frames come first, then padding; nothing is seen in padding, and what is not seen is zero.
    assert (frame_mask[:, :-1] >= frame_mask[:, 1:]).all()
    assert not visible[~frame_mask].any()
    assert (poses[~visible] == 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([SPATIAL, VISIBILITY, {**SPATIAL, "mirror": 0.0, **VISIBILITY}]))
def test_without_a_change_of_time_no_landmark_appears(seed, strengths):
    batch = random_batch([20, 9])
    _, visible, frame_mask = apply(batch, {**strengths, "mirror": 0.0}, seed)
    assert torch.equal(frame_mask, batch[2])
    assert not (visible & ~batch[1]).any()


def test_a_landmark_that_is_never_seen_stays_unseen_through_changes_of_time():
    poses, visible, frame_mask = random_batch([30, 30, 30])
    visible[:, :, 11] = False
    poses[:, :, 11] = 0
    _, seen, _ = apply((poses, visible, frame_mask), TEMPORAL)
    assert not seen[:, :, 11].any()


def test_a_landmark_that_is_always_seen_stays_seen_through_changes_of_time():
    poses, visible, frame_mask = random_batch([30, 12])
    visible[:] = frame_mask.unsqueeze(-1)
    _, seen, mask = apply((poses, visible, frame_mask), TEMPORAL)
    assert torch.equal(seen.all(-1), mask)


def test_mirror_twice_is_the_identity():
    batch = random_batch([20, 9])
    once = apply(batch, {"mirror": 1.0})
    assert not torch.equal(once[0], batch[0])
    twice = apply(once, {"mirror": 1.0})
    assert all(torch.equal(new, old) for new, old in zip(twice, batch, strict=True))


def test_mirror_swaps_hands_and_negates_x_alone():
    poses, visible, frame_mask = random_batch([6])
    mirrored, seen, _ = apply((poses, visible, frame_mask), {"mirror": 1.0})
    left, right = (list(HANDS_BODY.parts[part]) for part in ("left_hand", "right_hand"))
    assert torch.equal(mirrored[:, :, left], poses[:, :, right] * torch.tensor([-1.0, 1.0, 1.0]))
    assert torch.equal(seen[:, :, left], visible[:, :, right])


def test_rotation_turns_in_the_image_plane_within_its_limit():
    poses, visible, frame_mask = random_batch([10] * 50)
    turned = apply((poses, visible, frame_mask), {"rotation": 30})[0]
    torch.testing.assert_close(turned[..., :2].norm(dim=-1), poses[..., :2].norm(dim=-1), atol=1e-5, rtol=1e-4)
    assert torch.equal(turned[..., 2], poses[..., 2])
    before, after = (torch.atan2(x[:, :, :, 1], x[:, :, :, 0]) for x in (poses, turned))
    angles = torch.rad2deg(torch.remainder(after - before + torch.pi, 2 * torch.pi) - torch.pi)
    per_clip = torch.stack([clip[seen].median() for clip, seen in zip(angles, visible, strict=True)])
    assert per_clip.abs().max() <= 30.01 and per_clip.min() < -15 and per_clip.max() > 15


def test_scale_changes_all_coordinates_alike_by_at_most_its_share():
    poses, visible, frame_mask = random_batch([10] * 50)
    scaled = apply((poses, visible, frame_mask), {"scale": 0.25})[0]
    ratios = scaled.flatten(1).norm(dim=1) / poses.flatten(1).norm(dim=1)
    torch.testing.assert_close(scaled, poses * ratios[:, None, None, None], atol=1e-5, rtol=1e-4)
    assert ratios.min() >= 1 / 1.25 - 1e-4 and ratios.max() <= 1.25 + 1e-4
    assert ratios.min() < 0.9 and ratios.max() > 1.1


def test_translation_moves_all_points_alike_except_those_relative_to_an_anchor():
    anchored = LandmarkSet.from_dict({**HANDS_BODY.to_dict(), "anchors": {"left_hand": 8}})
    poses, visible, frame_mask = random_batch([10] * 3)
    moved, _, _ = apply((poses, visible, frame_mask), {"translation": 0.5}, landmark_set=anchored)
    shift = moved - poses
    hand = list(HANDS_BODY.parts["left_hand"])
    assert torch.equal(moved[:, :, hand], poses[:, :, hand])
    for clip, seen in zip(shift, visible, strict=True):
        others = clip[:, [0, 1, 2, 45]][seen[:, [0, 1, 2, 45]]]
        assert others.std(0).max() < 1e-6
        assert 0 < others.abs().max() <= 0.5 + 1e-6
        assert (others[:, 2] == 0).all()


def test_confidence_is_not_a_coordinate():
    with_confidence = LandmarkSet.from_dict({**HANDS_BODY.to_dict(), "channels": ["x", "y", "confidence"]})
    poses, visible, frame_mask = random_batch([10] * 3, with_confidence)
    moved, _, _ = apply((poses, visible, frame_mask), {**SPATIAL, "mirror": 0.0}, landmark_set=with_confidence)
    assert not torch.equal(moved[..., :2], poses[..., :2])
    assert torch.equal(moved[..., 2], poses[..., 2])


def test_noise_has_the_standard_deviation_that_was_asked_for():
    poses, visible, frame_mask = random_batch([60] * 8)
    noise = (apply((poses, visible, frame_mask), {"noise": 0.05})[0] - poses)[visible]
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(noise.mean().item()) < 1e-3


def test_speed_changes_the_length_within_its_limits_and_never_beyond_the_longest_length():
    batch = random_batch([60] * 200)
    lengths = apply(batch, {"speed": 0.5})[2].sum(1)
    assert lengths.min() >= 40 and lengths.max() <= 90
    assert lengths.min() < 45 and lengths.max() > 85
    assert apply(batch, {"speed": 0.5}, max_frames=64)[2].sum(1).max() == 64
    # A clip that is longer than the limit before is not shortened.
    assert apply(batch, {"speed": 0.5}, max_frames=50)[2].sum(1).max() == 60


@pytest.mark.parametrize(
    "strengths", [{"speed": 0.5}, {"time_warp": 1.0}, {"frame_drop": 0.5}, {"temporal_crop": 0.5}, TEMPORAL]
)
def test_time_runs_forward_within_the_clip(strengths):
    poses, visible, frame_mask = random_batch([50] * 20)
    visible[:], poses[:] = True, torch.arange(50.0)[None, :, None, None]
    changed, _, mask = apply((poses, visible, frame_mask), strengths)
    for clip, frames in zip(changed[..., 0, 0], mask, strict=True):
        times = clip[frames]
        assert (times.diff() >= -1e-4).all()
        assert times.min() >= 0 and times.max() <= 49
        if "temporal_crop" not in strengths:
            assert times[0] == 0 and times[-1] == 49


def test_temporal_crop_keeps_a_window_of_at_least_the_remaining_share():
    poses, visible, frame_mask = random_batch([100] * 50)
    poses[:], visible[:] = torch.arange(100.0)[None, :, None, None], True
    changed, _, mask = apply((poses, visible, frame_mask), {"temporal_crop": 0.3})
    assert mask.sum(1).min() >= 70 and mask.sum(1).min() < 80
    for clip, frames in zip(changed[..., 0, 0], mask, strict=True):
        assert (clip[frames].diff() == 1).all()


def test_frame_drop_leaves_the_asked_share_of_frames():
    lengths = apply(random_batch([102] * 5 + [2, 1]), {"frame_drop": 0.25})[2].sum(1)
    assert lengths.tolist() == [77] * 5 + [2, 1]


def test_interpolation_uses_the_one_neighbour_that_was_seen():
    poses, visible, frame_mask = random_batch([3])
    visible[:], poses[:] = True, 0.0
    poses[0, :, 0, 0] = torch.tensor([1.0, 5.0, 0.0])
    visible[0, 2, 0] = False
    for seed in range(20):
        changed, seen, _ = apply((poses, visible, frame_mask), {"speed": 1.0}, seed)
        values = changed[0, :, 0, 0][seen[0, :, 0]]
        # Never drawn towards the zero of the missing frame.
        assert values.min() >= 1.0 and values.max() <= 5.0


def test_hand_drop_hides_a_hand_for_half_of_the_clip_at_most():
    poses, visible, frame_mask = random_batch([40] * 100)
    visible[:] = True
    _, seen, _ = apply((poses, visible, frame_mask), {"hand_drop": 1.0})
    for part in ("left_hand", "right_hand"):
        hidden = ~seen[:, :, list(HANDS_BODY.parts[part])].any(-1)
        assert hidden.sum(1).min() >= 1 and hidden.sum(1).max() <= 20
        assert (hidden.int().diff(dim=1).abs().sum(1) <= 2).all(), "one span"
    assert seen[:, :, list(HANDS_BODY.parts["body"])].all()


def test_landmark_drop_hides_landmarks_through_the_clip():
    poses, visible, frame_mask = random_batch([40] * 100)
    visible[:] = True
    _, seen, _ = apply((poses, visible, frame_mask), {"landmark_drop": 0.2})
    assert torch.equal(seen.any(1), seen.all(1))
    assert seen.float().mean().item() == pytest.approx(0.8, abs=0.02)


def test_a_clip_is_changed_alike_in_whichever_batch_it_comes():
    poses, visible, frame_mask = random_batch([30, 12])
    changes = Augmentation(**ALL)
    lengths = draw_lengths(np.array([30, 12]), changes, np.random.default_rng(0))
    together = augment(poses, visible, frame_mask, changes, HANDS_BODY, lengths, generators(2))
    second = poses[1:, :12], visible[1:, :12], frame_mask[1:, :12]
    alone = augment(*second, changes, HANDS_BODY, lengths[1:], generators(2)[1:])
    frames = alone[2].shape[1]
    for whole, single in zip(together, alone, strict=True):
        assert torch.equal(whole[1, :frames], single[0])
        assert not whole[1, frames:].any()


def test_inputs_are_left_as_they_were():
    batch = random_batch([20, 9])
    copies = [tensor.clone() for tensor in batch]
    apply(batch, ALL)
    assert all(torch.equal(now, before) for now, before in zip(batch, copies, strict=True))


def test_poses_of_another_landmark_set_are_refused():
    poses, visible, frame_mask = random_batch([5])
    with pytest.raises(AssertionError, match="landmark"):
        apply((poses[:, :, :49], visible, frame_mask), {"noise": 1})
