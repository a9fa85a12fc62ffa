"""Many clips, long clips and unusable clips go through translation in order, and with bounded memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5Config

from tests.small_configs import POSE_ENCODER, T5, translator_config
from toolkit.decoding.beam_search import beam_search
from toolkit.errors import UserError
from toolkit.inference.clip_sources import ClipSource
from toolkit.inference.translate_files import Windowing, translate_clips
from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.landmarks import load_landmark_set
from toolkit.poses.pose_file import PoseError, RawPose, read_pose

MAX_FRAMES = 40
Model = tuple[PoseTranslator, PoseProcessor]


@pytest.fixture(scope="module")
def tiny() -> Model:
    torch.manual_seed(2)
    landmark_set = load_landmark_set("hands_body_50")
    config = translator_config(T5Config(**T5 | {"num_layers": 1}), pose_encoder=POSE_ENCODER | {"layers": 1})
    model = PoseTranslator(config).eval()
    model.generation_config.update(num_beams=3, max_new_tokens=5)
    extractor = PoseFeatureExtractor(landmark_set=landmark_set.to_dict(), max_frames=MAX_FRAMES)
    return model, PoseProcessor(extractor, make_tokenizer("bytes"))


@pytest.fixture(scope="module")
def recordings() -> list[RawPose]:
    """Real recordings of twelve letters, of different lengths."""
    specification = importlib.util.find_spec("spoken_to_signed")
    assert specification is not None and specification.submodule_search_locations
    folder = Path(specification.submodule_search_locations[0]) / "assets" / "fingerspelling_lexicon" / "ase"
    return [read_pose(path.read_bytes()) for path in sorted(folder.glob("*.pose"))[:12]]


def source(uid: str, clip: RawPose) -> ClipSource:
    return ClipSource(uid, f"{uid}.pose", lambda: clip)


def unreadable(uid: str) -> ClipSource:
    def read() -> RawPose:
        raise PoseError("the file is truncated")

    return ClipSource(uid, f"{uid}.pose", read)


def long_recording(recordings: list[RawPose], seconds: float) -> RawPose:
    """Letters one after the other."""
    frames = int(seconds * recordings[0].fps)
    data = np.concatenate([clip.data for clip in recordings * 100])[:frames]
    confidence = np.concatenate([clip.confidence for clip in recordings * 100])[:frames]
    return replace(recordings[0], data=data, confidence=confidence)


def test_batches_of_any_size_give_what_each_clip_gives_alone(tiny: Model, recordings: list[RawPose]) -> None:
    model, processor = tiny
    sources = [source(str(number), clip) for number, clip in enumerate(recordings)]
    alone = [next(iter(translate_clips(model, processor, [one]))) for one in sources]
    for batch_frames in (1, 60, 8192):
        together = list(translate_clips(model, processor, sources, batch_frames=batch_frames))
        assert [found.uid for found in together] == [found.uid for found in alone]
        for found, expected in zip(together, alone, strict=True):
            assert found.text == expected.text
            (one,), (other,) = found.windows, expected.windows
            assert one.hypotheses[0].score == pytest.approx(other.hypotheses[0].score, abs=2e-4)  # rounded to 1e-4


def test_clips_for_which_memory_is_short_together_are_translated_in_halves(
    tiny: Model, recordings: list[RawPose]
) -> None:
    model, processor = tiny
    sources = [source(str(number), clip) for number, clip in enumerate(recordings)]
    texts = [found.text for found in translate_clips(model, processor, sources)]

    def encode(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.pose_encoder.register_forward_pre_hook(encode)
    try:
        assert [found.text for found in translate_clips(model, processor, sources)] == texts
    finally:
        handle.remove()


def test_a_whole_clip_is_read_as_the_processor_reads_it(tiny: Model, recordings: list[RawPose]) -> None:
    model, processor = tiny
    (found,) = translate_clips(model, processor, [source("a", recordings[0])], n_best=3)
    output = model.generate(**processor([recordings[0]]), num_return_sequences=3)
    texts = [text.strip() for text in processor.batch_decode(output)]
    assert [hypothesis.text for hypothesis in found.windows[0].hypotheses] == texts


def test_beams_are_searched_by_our_own_loop(
    tiny: Model, recordings: list[RawPose], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    loops: list[object] = []
    generate = model.generate

    def watched(*inputs: object, **settings: object) -> object:
        loops.append(settings.get("custom_generate"))
        return generate(*inputs, **settings)

    monkeypatch.setattr(model, "generate", watched)
    for beams in (3, 1):
        list(translate_clips(model, processor, [source("a", recordings[0])], num_beams=beams))
    assert loops == [beam_search, None]


def test_only_a_little_is_read_ahead(tiny: Model, recordings: list[RawPose]) -> None:
    model, processor = tiny
    read: list[int] = []

    def endless() -> Iterator[ClipSource]:
        for number in range(10_000):
            read.append(number)
            yield source(str(number), recordings[number % len(recordings)])

    found = translate_clips(model, processor, endless(), batch_frames=100)
    for number in range(30):
        assert next(found).uid == str(number)
    assert len(read) < 100


def test_what_cannot_be_read_keeps_its_place_and_its_reason(tiny: Model, recordings: list[RawPose]) -> None:
    model, processor = tiny
    unseen = replace(recordings[0], confidence=np.zeros_like(recordings[0].confidence))
    sources = [source("a", recordings[0]), unreadable("b"), source("c", unseen), source("d", recordings[1])]
    found = list(translate_clips(model, processor, sources))
    assert [item.uid for item in found] == ["a", "b", "c", "d"]
    assert [item.reason for item in found] == [
        "", "the file is truncated", "no landmark of the set is visible in any frame", ""
    ]  # fmt: skip


def test_a_long_recording_is_split_and_an_empty_stretch_loses_nothing_else(
    tiny: Model, recordings: list[RawPose]
) -> None:
    model, processor = tiny
    clip = long_recording(recordings, 60)
    confidence = clip.confidence.copy()
    confidence[int(20 * clip.fps) : int(30 * clip.fps)] = 0
    sources = [source("long", replace(clip, confidence=confidence)), source("short", recordings[0])]
    long, short = translate_clips(model, processor, sources, batch_frames=128)
    assert (long.uid, short.uid, len(short.windows)) == ("long", "short", 1)
    assert long.windows[0].start == 0 and long.windows[-1].end == pytest.approx(60, abs=0.1)
    for left, right in pairwise(long.windows):
        assert left.start < right.start < left.end
    longest = MAX_FRAMES / processor.feature_extractor.fps
    assert all(window.end - window.start <= longest for window in long.windows)
    silent = [window for window in long.windows if window.reason]
    assert silent and all(window.start >= 20 and window.end <= 30.1 for window in silent)
    assert not long.reason


def test_windows_may_be_refused_or_forbidden(tiny: Model, recordings: list[RawPose]) -> None:
    model, processor = tiny
    clip = source("long", long_recording(recordings, 20))
    (whole,) = translate_clips(model, processor, [clip], windowing=Windowing(seconds=0))
    assert len(whole.windows) == 1
    with pytest.raises(UserError, match="--window 60"):
        next(translate_clips(model, processor, [clip], windowing=Windowing(seconds=60)))
