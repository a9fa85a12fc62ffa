"""Translate any number of clips with bounded memory: a few are read ahead, batched by length, and yielded in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from toolkit.decoding.search import Hypothesis, search
from toolkit.decoding.within_memory import SearchWithinMemory
from toolkit.inference.clip_sources import ClipSource
from toolkit.inference.windows import overlap_seconds, window_seconds, window_spans, without_repeats
from toolkit.models.processor import ClipArrays, PoseFeatureExtractor, PoseProcessor
from toolkit.models.translator import PoseTranslator
from toolkit.poses.pose_file import PoseError
from toolkit.poses.video_features import Recording

BATCH_FRAMES = 8192
BATCHES_READ_AHEAD = 4  # enough to find clips of similar length, few enough to yield soon
MOST_CLIPS_OF_A_BATCH = 128  # short clips stay below the limit of frames, but the beams of each take memory


@dataclass(frozen=True)
class TranslatedWindow:
    """Hypotheses for one window of a clip."""

    start: float  # seconds from the clip's beginning
    end: float  # the same
    hypotheses: tuple[Hypothesis, ...] = ()  # best first; empty where ``reason`` says why
    reason: str = ""  # why nothing can be translated here; else empty
    hint: str = ""  # the remedy, if there is one


@dataclass(frozen=True)
class Translation:
    """The translation of one clip."""

    uid: str  # of its source
    where: str  # the same
    windows: tuple[TranslatedWindow, ...]  # one for a clip that was translated whole
    reason: str = ""  # why it could not be translated; empty if it could
    hint: str = ""  # the remedy, if there is one

    @property
    def texts(self) -> list[str]:
        """The best text of each window, without words that repeat the end of the one before."""
        return without_repeats([window.hypotheses[0].text if window.hypotheses else "" for window in self.windows])

    @property
    def text(self) -> str:
        """The best text of the whole clip."""
        return " ".join(filter(None, self.texts))


@dataclass(frozen=True)
class Windowing:
    """How long clips are split into windows."""

    seconds: float | None = None  # of a window; None splits clips that are longer than the model reads, 0 none
    overlap: float | None = None  # of neighbours, in seconds; None = the default

    def spans(self, clip: Recording, extractor: PoseFeatureExtractor) -> list[tuple[float, float]]:
        """Start and end of each window of a clip in seconds; raises UserError for lengths that do not fit the model."""
        duration = clip.num_frames / clip.fps
        if self.seconds == 0:
            return [(0.0, duration)]
        window = window_seconds(extractor.fps, extractor.max_frames, self.seconds)
        overlap = overlap_seconds(window, self.overlap)
        frames = (clip.num_frames - 1) / clip.fps * extractor.fps
        if self.seconds is None and extractor.max_frames and frames < extractor.max_frames:
            return [(0.0, duration)]
        return window_spans(duration, window, overlap)


def check_windowing(windowing: Windowing, extractor: PoseFeatureExtractor) -> None:
    """Raise UserError if windows of that length and overlap do not fit the model."""
    if windowing.seconds != 0:
        window = window_seconds(extractor.fps, extractor.max_frames, windowing.seconds)
        overlap_seconds(window, windowing.overlap)


def translate_clips(
    model: PoseTranslator,
    processor: PoseProcessor,
    sources: Iterable[ClipSource],
    *,
    windowing: Windowing | None = None,
    n_best: int = 1,
    batch_frames: int = BATCH_FRAMES,
    conditions: Mapping[str, str] | None = None,
    **settings: Any,
) -> Iterator[Translation]:
    """Translate clips in batches, in their order; for those that cannot be used a translation holds the reason.

    ``windowing`` says how long clips are split, by default into the longest windows that the model reads. A batch has
    ``batch_frames`` padded frames at most; ``conditions`` are what is known of all clips, and ``settings`` override the
    model's own generation settings.

    Raises:
        UserError: the windows do not fit the model.
    """
    extractor = processor.feature_extractor
    windowing = windowing or Windowing()
    check_windowing(windowing, extractor)
    settings = {"n_best": n_best, **settings}
    windows: list[TranslatedWindow] = []
    for pending in _portions(_pending_windows(sources, extractor, windowing), BATCHES_READ_AHEAD * batch_frames):
        found = _search(model, processor, pending, batch_frames, conditions or {}, settings)
        for window, hypotheses in zip(pending, found, strict=True):
            windows.append(TranslatedWindow(window.start, window.end, hypotheses, window.reason, window.hint))
            if window.is_last:
                failed = TranslatedWindow(0.0, 0.0) if any(window.hypotheses for window in windows) else windows[0]
                source = window.source
                yield Translation(source.uid, source.where, tuple(windows), failed.reason, failed.hint)
                windows = []


@dataclass(frozen=True)
class _PendingWindow:
    """A window of a clip before its translation; without features where ``reason`` says why."""

    source: ClipSource
    start: float
    end: float
    is_last: bool
    features: ClipArrays | None = None
    reason: str = ""
    hint: str = ""

    @property
    def frames(self) -> int:
        return 0 if self.features is None else len(self.features)


def _pending_windows(
    sources: Iterable[ClipSource], extractor: PoseFeatureExtractor, windowing: Windowing
) -> Iterator[_PendingWindow]:
    for source in sources:
        try:
            clip = source.recording()
        except PoseError as error:
            yield _PendingWindow(source, 0.0, 0.0, True, reason=str(error), hint=error.hint)
            continue
        spans = windowing.spans(clip, extractor)
        for number, (start, end) in enumerate(spans):
            is_last = number == len(spans) - 1
            try:
                features = extractor.sample(clip.between(start, end) if len(spans) > 1 else clip)
                yield _PendingWindow(source, start, end, is_last, features)
            except PoseError as error:
                yield _PendingWindow(source, start, end, is_last, reason=str(error), hint=error.hint)


def _portions(pending: Iterable[_PendingWindow], most_frames: int) -> Iterator[list[_PendingWindow]]:
    """The stream in lists of about ``most_frames`` frames."""
    before = 0

    def portion(window: _PendingWindow) -> int:
        nonlocal before
        # A window without features keeps its place in the order and counts as one frame.
        before += max(window.frames, 1)
        return before // most_frames

    for _, group in groupby(pending, key=portion):
        yield list(group)


def _search(
    model: PoseTranslator,
    processor: PoseProcessor,
    pending: Sequence[_PendingWindow],
    batch_frames: int,
    conditions: Mapping[str, str],
    settings: dict[str, Any],
) -> list[tuple[Hypothesis, ...]]:
    """The hypotheses of each window, none for those without features."""
    device = next(model.parameters()).device
    found: list[tuple[Hypothesis, ...]] = [()] * len(pending)

    def search_in(batch: list[int], _: Any) -> list[list[Hypothesis]]:
        clips = [features for index in batch if (features := pending[index].features) is not None]
        inputs = processor.add_conditions(processor.feature_extractor.pad(clips), [conditions] * len(clips)).to(device)
        return search(model, processor, **inputs, **settings)

    within = SearchWithinMemory(search_in, _halves)
    for batch in _batches([window.frames for window in pending], batch_frames):
        for index, of_clip in zip(batch, within.find(batch), strict=True):
            found[index] = tuple(of_clip)
    return found


def _halves(batch: list[int]) -> tuple[list[int], list[int]]:
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]


def _batches(frames: Sequence[int], batch_frames: int) -> Iterator[list[int]]:
    """Indices of clips of similar length, at most ``batch_frames`` padded frames; a longer clip goes alone."""
    batch: list[int] = []
    for index in sorted(range(len(frames)), key=lambda index: -frames[index]):
        if frames[index] == 0:
            break
        longest = frames[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * longest > batch_frames or len(batch) == MOST_CLIPS_OF_A_BATCH):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
