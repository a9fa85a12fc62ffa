"""Windows cover a recording evenly, and their texts fit together as subtitles."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.decoding.search import Hypothesis
from toolkit.errors import UserError
from toolkit.inference.subtitles import Cue, cues, timestamp, to_srt, to_vtt
from toolkit.inference.translate_files import TranslatedWindow, Translation
from toolkit.inference.windows import overlap_seconds, window_seconds, window_spans, without_repeats


@settings(deadline=None)  # a busy machine makes an example slow, not wrong
@given(duration=st.floats(0.1, 20_000), window=st.floats(1, 60), share=st.floats(0, 0.5))  # up to five hours and a half
def test_windows_cover_everything_and_overlap_as_asked(duration: float, window: float, share: float) -> None:
    overlap = share * window
    spans = window_spans(duration, window, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == pytest.approx(duration)
    if len(spans) > 1:
        assert all(end - start == pytest.approx(window, abs=1e-6) for start, end in spans)
        shared = [left[1] - right[0] for left, right in pairwise(spans)]
        assert min(shared) >= overlap - 1e-6
        assert max(shared) - min(shared) < 1e-6


def test_lengths_follow_the_model_unless_asked() -> None:
    assert window_seconds(12.5, 512, None) == pytest.approx(40.88)
    assert window_seconds(12.5, None, 10) == 10
    assert overlap_seconds(40, None) == 4 and overlap_seconds(2, None) == 0.5
    for asked in (0.01, 41):
        with pytest.raises(UserError, match="--window"):
            window_seconds(12.5, 512, asked)
    for asked in (-1, 3):
        with pytest.raises(UserError, match="--overlap"):
            overlap_seconds(4, asked)


def test_words_that_two_windows_share_are_kept_once() -> None:
    assert without_repeats(["we go to the", "to the market", "tomorrow"]) == ["we go to the", "market", "tomorrow"]
    assert without_repeats(["the end", "", "the end of it"]) == ["the end", "", "of it"]
    assert without_repeats(["", " two  spaces "]) == ["", " two  spaces "]


def translation(*texts: str) -> Translation:
    windows = [
        TranslatedWindow(
            8.0 * number, 8.0 * number + 10, (Hypothesis(text, -1.0),) if text else (), "" if text else "nobody"
        )
        for number, text in enumerate(texts)
    ]
    return Translation("long", "long.pose", tuple(windows))


def test_cues_take_turns_in_the_middle_of_the_overlap() -> None:
    assert cues(translation("one", "", "three")) == [Cue(0, 9, "one"), Cue(17, 26, "three")]
    assert translation("one", "", "three").text == "one three"


def test_subtitles_hold_any_text() -> None:
    hostile = translation("a --> b\n\n2\n<b>bold</b> & more\x1b[2J", "x" * 50 + " " + "words " * 20)
    srt, vtt = to_srt(hostile), to_vtt(hostile)
    assert srt.startswith("1\n00:00:00,000 --> 00:00:09,000\na → b  2 <b>bold</b>")
    assert srt.count(" --> ") == 2 and vtt.count(" --> ") == 2
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:09.000\na --&gt; b")
    assert "\x1b" not in srt + vtt and "<b>" not in vtt
    assert all("\n\n" not in block.strip("\n") for block in srt.split("\n\n"))


def test_timestamps() -> None:
    assert timestamp(0) == "00:00:00.000"
    assert timestamp(3 * 3600 + 59.9996, ",") == "03:01:00,000"
