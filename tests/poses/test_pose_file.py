import re
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pose_format import Pose

from toolkit.corpus.demo import find_lexicon
from toolkit.poses.features import extract_features
from toolkit.poses.landmarks import load_landmark_set
from toolkit.poses.pose_file import PoseError, read_pose

VERSIONS = (0.0, 0.1, 0.2)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_reads_as_pose_format_reads_it(pose_file, version: float) -> None:
    data, confidence = pose_file.body(frames=7)
    data += np.arange(7, dtype=np.float32)[:, None, None, None]
    confidence[3, :, 5] = 0
    content = pose_file.bytes(data, confidence, version=version)
    ours, theirs = read_pose(content), Pose.read(content)
    assert ours.fps == theirs.body.fps == 25
    np.testing.assert_array_equal(ours.data, theirs.body.data.data)
    np.testing.assert_array_equal(ours.confidence, theirs.body.confidence)
    names = [(component.name, point) for component in theirs.header.components for point in component.points]
    assert list(ours.header.points) == names


def test_a_real_file_reads_as_pose_format_reads_it() -> None:
    content = next(find_lexicon().glob("ase/*.pose")).read_bytes()
    ours, theirs = read_pose(content), Pose.read(content)
    assert len(ours.header.points) == 586 and ours.header.width == theirs.header.dimensions.width
    np.testing.assert_array_equal(ours.data, theirs.body.data.data)
    np.testing.assert_array_equal(ours.confidence, theirs.body.confidence)


@pytest.mark.parametrize("version", VERSIONS)
def test_start_and_end_are_exact_in_every_version(pose_file, version: float) -> None:
    data, confidence = pose_file.body(frames=50)
    data[:, 0, 0, 0] = np.arange(50)
    raw = read_pose(pose_file.bytes(data, confidence, version=version))
    assert raw.between(0.4, 1.2).data[:, 0, 0, 0].tolist() == list(range(10, 30))
    assert raw.between(None, 0.2).num_frames == 5
    assert raw.between(1.8, 2.9).data[:, 0, 0, 0].tolist() == list(range(45, 50))
    with pytest.raises(PoseError, match=r"ends at 2\.00 s"):
        raw.between(2.0, 3.0)


def test_v01_counts_its_frames_by_its_length(pose_file) -> None:
    data, confidence = pose_file.body(frames=9)
    assert read_pose(pose_file.bytes(data, confidence, version=0.1)).num_frames == 9


@pytest.mark.parametrize(("frames", "claimed"), [(65_537, 1), (65_536, 0)])
def test_v01_files_of_more_frames_than_they_can_count(pose_file, frames: int, claimed: int) -> None:
    data, confidence = pose_file.body(frames=1, dims=2)
    content = pose_file.bytes(data.repeat(frames, 0), confidence.repeat(frames, 0), version=0.1, claimed_frames=claimed)
    assert read_pose(content).num_frames == frames


@pytest.mark.parametrize("kept", [0.7, 0.9, 0.999])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_truncated_file_is_no_shorter_clip(pose_file, version: float, kept: float) -> None:
    content = pose_file.bytes(*pose_file.body(frames=100), version=version)
    with pytest.raises(PoseError, match="truncated"):
        read_pose(content[: int(kept * len(content))])
    header = len(content) - 4 * 100 * 53 * 4
    with pytest.raises(PoseError, match="truncated"):  # 70 of 100 frames, exactly
        read_pose(content[: header + 4 * 70 * 53 * 4])


@pytest.mark.parametrize("padding", [1, 4, 512, 4 * 53 * 4, 4 * 53 * 4 * 7])
@pytest.mark.parametrize("version", VERSIONS)
def test_bytes_left_over_are_a_reason(pose_file, version: float, padding: int) -> None:
    content = pose_file.bytes(*pose_file.body(), version=version)
    with pytest.raises(PoseError, match="frames"):
        read_pose(content + bytes(padding))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_number_of_frames_never_reads_confidences_out_of_coordinates(pose_file, version: float) -> None:
    for claimed in (1, 5, 9, 11, 20):
        with pytest.raises(PoseError, match=r"frames|truncated"):
            read_pose(pose_file.bytes(*pose_file.body(frames=10), version=version, claimed_frames=claimed))


def _check_lengths(pose_file, examples: int) -> None:
    """A file that is truncated, extended or has a wrong count is read as it was written, or not at all."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.sampled_from(VERSIONS),
        st.tuples(st.integers(1, 12), st.integers(1, 3), st.sampled_from([2, 3])),
        st.integers(-60_000, 60_000) | st.integers(-16, 16) | st.just(0),
        st.integers(-12, 12) | st.just(0),
    )
    def run(version: float, shape: tuple[int, int, int], length: int, miscount: int) -> None:
        frames, people, dims = shape
        data, confidence = pose_file.body(frames, people, dims)
        claimed = frames if length else max(frames + miscount, 0)  # both together may happen to agree
        content = pose_file.bytes(data, confidence, version=version, claimed_frames=claimed)
        changed = content + bytes(length) if length > 0 else content[: len(content) + length]
        try:
            raw = read_pose(changed)
        except PoseError:
            assert changed != content or claimed != frames
            return
        assert raw.num_frames == claimed and (raw.confidence == 1).all()
        if version != 0.0:
            np.testing.assert_array_equal(raw.data, data)

    run()


def test_wrong_lengths_and_counts_never_pass(pose_file) -> None:
    _check_lengths(pose_file, 300)


@pytest.mark.nightly
def test_many_wrong_lengths_and_counts_never_pass(pose_file) -> None:
    _check_lengths(pose_file, 20_000)


def test_v00_keeps_the_most_visible_person(pose_file) -> None:
    data, confidence = pose_file.body(frames=4, people=2)
    data[:, 0], confidence[:, 0] = 0, 0
    raw = read_pose(pose_file.bytes(data, confidence, version=0.0))
    np.testing.assert_array_equal(raw.data[:, 0], data[:, 1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: b"", "truncated"),
        (lambda file: file[:100], "truncated"),
        (lambda file: file[:-4], "truncated"),
        (lambda file: struct.pack("<f", 0.7) + file[4:], "version"),
        (lambda file: b"PK\x03\x04" + file[4:], "version"),
    ],
)
def test_broken_files_say_why(pose_file, change, reason: str) -> None:
    with pytest.raises(PoseError, match=reason):
        read_pose(change(pose_file.bytes(*pose_file.body())))


@pytest.mark.parametrize("version", VERSIONS)
def test_no_frames_and_no_people_say_so(pose_file, version: float) -> None:
    data, confidence = pose_file.body()
    with pytest.raises(PoseError, match="frames"):
        read_pose(pose_file.bytes(data[:0], confidence[:0], version=version))
    with pytest.raises(PoseError, match=r"people|frames"):
        read_pose(pose_file.bytes(data[:, :0], confidence[:, :0], version=version))


@pytest.mark.parametrize("fps", [0.0, float("nan"), float("inf"), -25.0, 0.04, 1000, 90_000, 1e9])
def test_a_rate_that_no_camera_has_is_an_error_unless_a_rate_is_given(pose_file, fps: float) -> None:
    content = pose_file.bytes(*pose_file.body(), fps=fps)
    with pytest.raises(PoseError, match=re.escape(f"{fps:g} frames")) as raised:
        read_pose(content)
    assert "--fps" in raised.value.hint
    assert read_pose(content, 25).fps == 25
    with pytest.raises(PoseError, match=r"fps .*\b0 .*\b1 to 1,000"):
        read_pose(content, 0)


def _seeds(pose_file) -> list[bytes]:
    """Small files of every version; the first is a part of a real recording."""
    real = next(find_lexicon().glob("ase/*.pose")).read_bytes()
    frames = read_pose(real)
    header_size = len(real) - 10 - frames.data.nbytes - frames.confidence.nbytes
    body = struct.pack("<fIH", 25, 3, 1) + frames.data[:3].tobytes() + frames.confidence[:3].tobytes()
    data, confidence = pose_file.body(frames=4, people=2)
    return [real[:header_size] + body, *(pose_file.bytes(data, confidence, version=version) for version in VERSIONS)]


def _features_or_a_reason(content: bytes) -> None:
    """A file gives features of the documented shape, or a reason."""
    landmarks = load_landmark_set("hands_body_50")
    try:
        features = extract_features(content, landmarks, 12.5, max_frames=512).values
        assert features.dtype == np.float32 and features.shape[1:] == (50, 3) and 1 <= len(features) <= 512
        assert not np.isinf(features).any() and np.isfinite(features).any()
        assert (np.isnan(features).all(axis=2) == np.isnan(features).any(axis=2)).all()
    except PoseError as error:
        assert str(error) and "\n" not in str(error)


@st.composite
def mutations(draw, seeds: list[bytes]) -> bytes:
    """A seed with some bytes overwritten (often near its header's end, where the sizes are), and perhaps truncated."""
    content = bytearray(draw(st.sampled_from(seeds)))
    numbers = st.sampled_from([b"\x00" * 4, b"\xff" * 4, b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f"])
    for _ in range(draw(st.integers(0, 6))):
        position = draw(st.integers(0, len(content) - 1) | st.integers(0, min(4000, len(content) - 1)))
        patch = draw(st.binary(min_size=1, max_size=4) | numbers)
        content[position : position + len(patch)] = patch
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


def _check_mutations(pose_file, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(mutations(_seeds(pose_file)))
    def run(content: bytes) -> None:
        _features_or_a_reason(content)

    run()


def test_mutated_files_are_features_or_a_reason(pose_file) -> None:
    _check_mutations(pose_file, 500)


@pytest.mark.nightly
def test_many_mutated_files_are_features_or_a_reason(pose_file) -> None:
    _check_mutations(pose_file, 20_000)
