import gzip
import io
import os
import pickle
import re
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.poses.arrays import DEFAULT_FPS, read_arrays
from toolkit.poses.features import extract_features, read_clip
from toolkit.poses.landmarks import load_landmark_set
from toolkit.poses.layouts import BODY, FACE_68, LEFT_HAND, layouts_by_size
from toolkit.poses.pose_file import PoseError

RNG = np.random.default_rng(0)


def _saved(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _keypoints(frames: int = 6, points: int = 133, channels: int = 2) -> np.ndarray:
    return RNG.uniform(100, 300, (frames, points, channels)).astype(np.float32)


@pytest.mark.parametrize("points", sorted(layouts_by_size()))
def test_every_usual_number_of_points_has_names(points: int) -> None:
    raw = read_arrays(_npy(_keypoints(points=points)))
    assert len(raw.header.points) == points == len(set(raw.header.points))
    assert raw.data.shape[:3] == (6, 1, points) and raw.fps == DEFAULT_FPS
    assert {(BODY, "LEFT_SHOULDER"), (LEFT_HAND, "PINKY_TIP")} <= set(raw.header.points)


@pytest.mark.parametrize("protocol", range(6))
def test_the_common_pickles(protocol: int) -> None:
    keypoints, scores = _keypoints(), RNG.uniform(0.5, 1, (6, 133)).astype(np.float32)
    forms = [
        {"keypoints": keypoints[:, None], "scores": scores[:, None]},
        {"keypoints": keypoints, "scores": scores},
        {"keypoints": list(keypoints[:, None]), "scores": list(scores[:, None])},
        {"keypoints": keypoints.astype(np.float64), "scores": scores, "fps": np.float64(25), "w_h": (640, 480)},
    ]
    for form in forms:
        raw = read_arrays(pickle.dumps(form, protocol=protocol))
        np.testing.assert_allclose(raw.data[:, 0], keypoints, rtol=1e-6)
        np.testing.assert_allclose(raw.confidence[:, 0], scores, rtol=1e-6)


@pytest.mark.parametrize("protocol", range(6))
def test_a_varying_number_of_people_and_frames_of_nobody(protocol: int) -> None:
    """As rtmlib and Uni-Sign write it: each frame lists the people that the detector saw in it, or nobody."""
    signer = np.tile(_keypoints(frames=1), (8, 1, 1)) + RNG.normal(0, 1, (8, 133, 2))
    other = signer + np.array([900, 0])
    keypoints = [signer[:1], np.stack([signer[1], other[1]]), np.stack([other[2], signer[2]]), [], None]
    keypoints += [np.zeros((0, 133, 2)), signer[6], other[7:]]
    scores = [np.ones((1, 133)), np.ones((2, 133)), np.ones((2, 133)), [], None, np.zeros((0, 133)), np.ones(133)]
    scores += [np.ones((1, 133, 1))]
    there = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)
    in_objects = np.empty(8, object)
    in_objects[:] = keypoints
    for form in [
        {"keypoints": keypoints, "scores": scores},
        {"keypoints": tuple(keypoints), "confidence": tuple(scores), "fps": np.array([25.0])},
        {"keypoints": in_objects, "scores": scores},
        {"keypoints": [[] if frame is None else np.asarray(frame).tolist() for frame in keypoints]},
    ]:
        raw = read_arrays(pickle.dumps(form, protocol=protocol))
        assert raw.data.shape == (8, 1, 133, 2) and (raw.confidence[:, 0] == there[:, None]).all()
        np.testing.assert_allclose(raw.data[there, 0], signer[there], rtol=1e-6)


def test_what_numpy_saves_of_objects_is_read() -> None:
    keypoints, frames = _keypoints(), np.empty(2, object)
    frames[:] = [_keypoints(frames=2), _keypoints(frames=1)]
    for content in (_npy(np.array({"keypoints": keypoints})), _npy(np.array([{"keypoints": keypoints}]))):
        np.testing.assert_array_equal(read_arrays(content).data[:, 0], keypoints)
    np.testing.assert_array_equal(read_arrays(pickle.dumps(keypoints)).data[:, 0], keypoints)
    for content in (_npy(frames), _saved(keypoints=frames)):
        np.testing.assert_array_equal(read_arrays(content).data[:, 0], [frames[0][0], frames[1][0]])


def test_what_is_gzipped_is_read(pose_file) -> None:
    keypoints = _keypoints()
    for content in (_npy(keypoints), pickle.dumps({"keypoints": keypoints}, protocol=0), _saved(keypoints=keypoints)):
        np.testing.assert_array_equal(read_clip(gzip.compress(content)).data[:, 0], keypoints)
    clip = pose_file.bytes(*pose_file.body())
    assert read_clip(gzip.compress(clip[:99]) + gzip.compress(clip[99:])).num_frames == 10


def test_pickles_of_python_2() -> None:
    """Which wrote the bytes of arrays as text."""
    keypoints = np.arange(75 * 2, dtype="<f4").reshape(1, 75, 2)
    text = keypoints.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x01KKK\x02t"
    array += b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    content = b"\x80\x02}U\x09keypoints" + array + b"T" + struct.pack("<i", len(text)) + text + b"tbs."
    np.testing.assert_array_equal(read_arrays(content).data[:, 0], keypoints)


def test_npz_with_its_own_frame_rate() -> None:
    raw = read_arrays(_saved(keypoints=_keypoints(points=543, channels=3), confidence=np.ones((6, 543)), fps=30))
    assert raw.fps == 30 and raw.data.shape == (6, 1, 543, 3)


def test_what_the_last_coordinate_means() -> None:
    flat = read_arrays(_npy(_keypoints(points=133, channels=3)))
    assert flat.data.shape[3] == 2 and flat.confidence.max() > 100, "x, y, score"
    deep = read_arrays(_npy(_keypoints(points=543, channels=3)))
    assert deep.data.shape[3] == 3 and (deep.confidence == 1).all(), "x, y, z"
    both = read_arrays(_npy(_keypoints(points=543, channels=4)))
    assert both.data.shape[3] == 3 and both.confidence.max() > 100, "x, y, z, score"


def test_without_scores_the_origin_is_missing() -> None:
    keypoints = _keypoints(points=543, channels=3)
    keypoints[2, 40] = 0
    assert np.argwhere(read_arrays(_npy(keypoints)).confidence == 0).tolist() == [[2, 0, 40]]


@pytest.mark.parametrize("name", ["unisign_69", "isign_76"])
def test_features_of_rtmpose(name: str) -> None:
    content = pickle.dumps({"keypoints": _keypoints()[:, None], "scores": np.ones((6, 1, 133))})
    features = extract_features(content, load_landmark_set(name), 25)
    lacking = {component for component, _ in features.lacking}
    assert lacking == (set() if name == "unisign_69" else {"FACE_LANDMARKS"})
    assert np.isfinite(features.values).all(axis=(0, 2)).sum() == (69 if name == "unisign_69" else 53)


def test_features_of_openpose_take_their_points_by_name() -> None:
    keypoints = _keypoints(points=137)
    keypoints[:, 2], keypoints[:, 5] = [100, 200], [200, 200]  # OpenPose's right and left shoulder
    keypoints[:, 4] = [150, 300]  # its right wrist
    landmarks = load_landmark_set("unisign_69")
    values = extract_features(_npy(keypoints), landmarks, 25).values
    right_wrist = landmarks.position(BODY, "RIGHT_WRIST")
    np.testing.assert_allclose(values[:, right_wrist], [[0, 1, 1]] * 6, atol=1e-6)
    assert landmarks.points[-1] == (FACE_68, "30")
    np.testing.assert_allclose(values[:, -1, :2], 0)


class _Evil:
    def __reduce__(self):
        return (os.system, ("false",))


@pytest.mark.parametrize(
    "evil",
    [
        pickle.dumps({"keypoints": _Evil()}),
        pickle.dumps({"keypoints": _Evil()}, protocol=2),
        b"\x80\x04cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x02cnumpy.core.multiarray\nos.system\n(S'x'\ntR.",
        b"\x80\x04Pid\n.",
        pickle.dumps({"keypoints": _Evil()}, protocol=0),
        b"(c_codecs\nencode\n(Vabc\nVpunycode\ntR.",
        gzip.compress(pickle.dumps({"keypoints": _Evil()}), mtime=0),
        _npy(np.array([_Evil()], dtype=object)),
        _saved(keypoints=np.array([_Evil()], dtype=object)),
        pickle.dumps({"keypoints": np.array([_Evil()], dtype=object)}),
    ],
)
def test_no_code_runs(evil: bytes, monkeypatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("code was run"))
    with pytest.raises(PoseError):
        read_clip(evil)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"keypoints": _keypoints()})[:-100], "read: "),
        (_saved(keypoints=_keypoints())[:-100], "zip"),
        (pickle.dumps([1, 2]), "list"),
        (pickle.dumps({"other": 1}), "keypoints.*other"),
        (
            pickle.dumps({"keypoints": [np.zeros((133, 2)), np.zeros((5, 2))]}),
            "keypoints, frame 1: 5 points of 2 values, before 133 of 2",
        ),
        (_npy(np.zeros((4, 5, 2))), "5 points"),
        (_npy(np.zeros((4, 133))), r"shape \(4, 133\)"),
        (_npy(np.zeros((0, 133, 2))), r"shape \(0, 133, 2\)"),
        (_npy(np.array(["a"])), "numbers"),
        (_npy(np.array([None])), "people"),
        (_npy(np.array([{"a": 1}, {}], dtype=object)), "frame 0 .*dict"),
        (_npy(_keypoints())[:-8], "6,384 .*6,376"),
        (_npy(np.zeros((4, 133, 2))).replace(b"(4, 133, 2)", b"(9999,99,9)"), "8,512"),
        (_saved(keypoints=_keypoints(), fps=0), r"\b0 frames"),
        (_saved(keypoints=_keypoints(), scores=np.ones(5)), r"scores .*\(5,\).*keypoints \(6, 133, 2\)"),
        (_npy(np.zeros((3, 40, 75))), "coordinates"),
        (_npy(np.zeros((40, 225))), r"\b3 values .*75 points"),
        (_npy(np.zeros((1, 40, 75, 3))), "40 people in 1 frames"),
        (pickle.dumps({"keypoints": [np.zeros((40, 75, 3))]}), "40 people in 1 frames"),
        (_saved(kpts=np.zeros((4, 75, 3))), "keypoints.*: .*kpts"),
        (pickle.dumps({"keypoints": [[], None, np.zeros((0, 133, 2))]}), "people"),
        (pickle.dumps({"keypoints": [np.ones((2, 133, 2)), [], np.ones((1, 17, 2))]}), "keypoints, frame 2: 17 points"),
        (
            pickle.dumps({"keypoints": [np.ones((2, 133, 2)), []], "scores": [np.ones(133), []]}),
            "scores, frame 0: 133 ",
        ),
        (pickle.dumps({"keypoints": [np.ones((2, 133, 2)), []], "conf": [[]]}), "keypoints holds 2 frames, conf 1"),
        (pickle.dumps({"keypoints": _keypoints(), "fps": [25, 30]}), "fps .*2 "),
        (pickle.dumps({"keypoints": "a" * 99}), "keypoints .*str"),
        (b"BZh91AY", "compressed by bzip2"),
        (gzip.compress(_npy(_keypoints()), mtime=0)[:-30], "gzip"),
    ],
)
def test_damage_is_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(PoseError) as raised:
        read_clip(content)
    assert re.search(reason, f"{raised.value}: {raised.value.hint}")


def test_a_list_that_holds_itself_is_a_reason() -> None:
    value: list = []
    value.append(value)
    with pytest.raises(PoseError):
        read_arrays(pickle.dumps({"keypoints": value}))


def test_words_are_no_numbers() -> None:
    with pytest.raises(PoseError, match=r"frame 0 .*str"):
        read_arrays(pickle.dumps({"keypoints": [["a" * 1000] * 1000]}))


def test_nested_lists_of_numbers_are_read() -> None:
    keypoints = _keypoints()
    lists, arrays = (read_arrays(pickle.dumps({"keypoints": value})) for value in (keypoints.tolist(), keypoints))
    np.testing.assert_array_equal(lists.data, arrays.data)


def _check_people(examples: int) -> None:
    """Frames list any people in any order; once all were seen together, the signer is found in each frame."""
    signer, landmarks = _keypoints(frames=1)[0], load_landmark_set("unisign_69")
    frame = st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(frame, max_size=8), st.integers(0, 5), st.booleans(), st.booleans())
    def run(frames: list[tuple[bool, int, int]], protocol: int, objects: bool, gzipped: bool) -> None:
        keypoints, scores = [], []
        frames = [(True, 0, 3), *frames]
        for there, place, others in frames:
            people = [signer + 1000 * (number + 1) for number in range(others)]
            marks = [np.full(133, 0.02)] * others
            if there:
                people.insert(place, signer)
                marks.insert(place, np.ones(133))
            keypoints.append(np.array(people, np.float32))
            scores.append(np.array(marks, np.float32))
        there = np.array([frame[0] for frame in frames])
        value: object = keypoints
        if objects:
            value = np.empty(len(frames), object)
            value[:] = keypoints
        content = pickle.dumps({"keypoints": value, "scores": scores}, protocol=protocol)
        raw = read_clip(gzip.compress(content) if gzipped else content)
        assert raw.data.shape == (len(frames), raw.data.shape[1], 133, 2)
        values = extract_features(raw, landmarks, 25).values
        assert np.isfinite(values).all(axis=(1, 2)).tolist() == there.tolist()
        assert np.ptp(values[there][:, 0, :2], axis=0).max() < 1e-5

    run()


def test_lists_of_any_people_give_the_signer() -> None:
    _check_people(100)


@pytest.mark.nightly
def test_many_lists_of_any_people_give_the_signer() -> None:
    _check_people(5_000)


def _check_mutations(examples: int) -> None:
    keypoints, scores = _keypoints(3), np.ones((3, 133), np.float32)
    seeds = [pickle.dumps({"keypoints": keypoints, "scores": scores}, protocol=protocol) for protocol in (2, 5)]
    seeds += [pickle.dumps({"keypoints": [keypoints[:2], keypoints[:1], []]}, protocol=0)]
    seeds += [_npy(keypoints), _npy(np.array({"keypoints": keypoints})), _saved(keypoints=keypoints, scores=scores)]
    seeds += [gzip.compress(seeds[0])]
    landmarks = load_landmark_set("unisign_69")

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.sampled_from(seeds), st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=3)), max_size=4)
    )
    def run(seed: bytes, patches: list[tuple[int, bytes]]) -> None:
        content = bytearray(seed)
        for position, patch in patches:
            content[position : position + len(patch)] = patch
        try:
            values = extract_features(bytes(content), landmarks, 25, max_frames=64).values
            assert values.shape[1:] == (69, 3) and not np.isinf(values).any()
        except PoseError as error:
            assert str(error) and "\n" not in str(error)

    run()


def test_mutated_arrays_are_features_or_a_reason() -> None:
    _check_mutations(500)


@pytest.mark.nightly
def test_many_mutated_arrays_are_features_or_a_reason() -> None:
    _check_mutations(20_000)
