import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.poses.arrays import DEFAULT_FPS, is_array_file, read_arrays
from toolkit.poses.features import extract_features
from toolkit.poses.landmarks import load_landmark_set
from toolkit.poses.layouts import BODY, FACE_68, LEFT_HAND, nameless_layouts
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


@pytest.mark.parametrize("points", sorted(nameless_layouts()))
def test_every_usual_number_of_points_has_names(points: int) -> None:
    raw = read_arrays(_npy(_keypoints(points=points)))
    assert len(raw.header.points) == points == len(set(raw.header.points))
    assert raw.data.shape[:3] == (6, 1, points) and raw.fps == DEFAULT_FPS
    assert {(BODY, "LEFT_SHOULDER"), (LEFT_HAND, "PINKY_TIP")} <= set(raw.header.points)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
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
        pickle.dumps({"keypoints": np.array([_Evil()], dtype=object)}),
    ],
)
def test_no_code_runs(evil: bytes, monkeypatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("code was run"))
    with pytest.raises(PoseError):
        read_arrays(evil)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x04r\xff\xff\xff\x7f.", "cannot be read|impossible size"),
        (b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b".", "impossible size"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "cannot be read"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"other": 1}), "none of the arrays is called"),
        (pickle.dumps({"keypoints": [np.zeros((133, 2)), np.zeros((5, 2))]}), "cannot be read|same number"),
        (_npy(np.zeros((4, 5, 2))), "array of 5 points without names"),
        (_npy(np.zeros((4, 133))), r"shape \(4, 133\)"),
        (_npy(np.zeros((0, 133, 2))), r"shape \(0, 1, 133, 2\)"),
        (_npy(np.array(["a"])), "wanted numbers"),
        (_npy(np.array([None])), "wanted numbers"),
        (_npy(_keypoints())[:-8], "truncated"),
        (_npy(np.zeros((4, 133, 2))).replace(b"(4, 133, 2)", b"(9999,99,9)"), "truncated"),
        (_saved(keypoints=_keypoints(), fps=0), "0 frames per second"),
        (_saved(keypoints=_keypoints(), scores=np.ones(5)), "cannot be read"),
    ],
)
def test_damage_and_bombs_are_reasons(content: bytes, reason: str) -> None:
    with pytest.raises(PoseError, match=reason):
        read_arrays(content)


def _laughs(levels: int) -> list:
    """A small pickle of lists that hold the same list ten times over: 10 ** levels numbers."""
    value: list = [0.0] * 10
    for _ in range(levels - 1):
        value = [value] * 10
    return value


@pytest.mark.parametrize("levels", [4, 5, 9, 100])
@pytest.mark.parametrize("name", ["keypoints", "scores", "fps"])
def test_lists_that_hold_a_list_many_times_over_take_no_memory(levels: int, name: str) -> None:
    content = pickle.dumps({"keypoints": _keypoints(), name: _laughs(levels)})
    assert len(content) < 40_000
    tracemalloc.start()
    with pytest.raises(PoseError):
        read_arrays(content)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_list_that_holds_itself_is_a_reason() -> None:
    value: list = []
    value.append(value)
    with pytest.raises(PoseError, match="nested too deep"):
        read_arrays(pickle.dumps({"keypoints": value}))


def test_words_are_no_numbers() -> None:
    with pytest.raises(PoseError, match="hold a str, wanted numbers"):
        read_arrays(pickle.dumps({"keypoints": [["a" * 1000] * 1000]}))


def test_nested_lists_of_numbers_are_read() -> None:
    keypoints = _keypoints()
    lists, arrays = (read_arrays(pickle.dumps({"keypoints": value})) for value in (keypoints.tolist(), keypoints))
    np.testing.assert_array_equal(lists.data, arrays.data)


def test_a_zip_bomb_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("keypoints.npy", _npy(np.zeros((300_000, 133, 2), np.float32)))
    with pytest.raises(PoseError, match="impossible size"):
        read_arrays(buffer.getvalue())


def _fuzz(examples: int) -> None:
    keypoints, scores = _keypoints(3), np.ones((3, 133), np.float32)
    seeds = [pickle.dumps({"keypoints": keypoints, "scores": scores}, protocol=protocol) for protocol in (2, 5)]
    seeds += [_npy(keypoints), _saved(keypoints=keypoints, scores=scores)]
    landmarks = load_landmark_set("unisign_69")

    @settings(max_examples=examples, deadline=2000, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.sampled_from(seeds), st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=3)), max_size=4)
    )
    def run(seed: bytes, patches: list[tuple[int, bytes]]) -> None:
        content = bytearray(seed)
        for position, patch in patches:
            content[position : position + len(patch)] = patch
        if not is_array_file(bytes(content)):
            return
        try:
            values = extract_features(bytes(content), landmarks, 25, max_frames=64).values
            assert values.shape[1:] == (69, 3) and not np.isinf(values).any()
        except PoseError as error:
            assert str(error) and "\n" not in str(error)

    run()


def test_mutated_arrays_are_features_or_a_reason() -> None:
    _fuzz(500)


@pytest.mark.nightly
def test_many_mutated_arrays_are_features_or_a_reason() -> None:
    _fuzz(20_000)
