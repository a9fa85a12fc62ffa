"""The progress line fits its terminal, and is plain where there is none."""

import io
import os
import pty
import re

import pytest

from toolkit.tracking.progress import ProgressLine, StepFigures, fit_line, format_duration, short_rate


def figures(step: int, **changes) -> StepFigures:
    values = {
        "step": step,
        "epoch": step / 10,
        "loss": 1.23456,
        "learning_rate": 3e-4,
        "grad_norm": 0.987,
        "clips_per_second": 41.23,
        "frames_per_second": 2134.0,
        "tokens_per_second": 310.0,
        "padding_share": 0.043,
        "data_wait_share": 0.02,
        "memory_gib": 1.5,
        "mfu": 0.31,
    }
    return StepFigures(**(values | changes))


def test_plain_lines_come_every_few_steps_and_at_the_end():
    stream = io.StringIO()
    with ProgressLine(total_steps=25, total_epochs=2.5, log_every=10, stream=stream) as progress:
        for step in range(1, 26):
            progress.update(figures(step))
        progress.echo("saved checkpoints/step_25 [done]")
    lines = stream.getvalue().splitlines()
    assert [re.search(r"step (\d+)/25", line).group(1) for line in lines[:3]] == ["10", "20", "25"]
    for part in (
        "epoch 1.0/2.5",
        "loss 1.2346",
        "lr 3.0e-04",
        "grad 0.99",
        "41.2 clips/s",
        "2.1k frames/s",
        "pad 4 %",
        "wait 2 %",
        "MFU 31 %",
        "ETA",
    ):
        assert part in lines[0]
    assert lines[3] == "saved checkpoints/step_25 [done]"  # brackets are text, not markup
    assert "\x1b" not in stream.getvalue()


def test_a_gradient_norm_that_is_not_known_is_left_out():
    stream = io.StringIO()
    with ProgressLine(total_steps=1, total_epochs=1, stream=stream) as progress:
        progress.update(figures(1, grad_norm=None))
    assert "grad" not in stream.getvalue()


def test_a_rank_that_is_not_enabled_prints_nothing():
    stream = io.StringIO()
    with ProgressLine(total_steps=10, total_epochs=1, log_every=1, enabled=False, stream=stream) as progress:
        progress.update(figures(1))
        progress.echo("hello")
    assert stream.getvalue() == ""


def test_a_terminal_shows_one_live_line_that_is_rewritten_in_place(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        with ProgressLine(total_steps=30, total_epochs=3, stream=terminal) as progress:
            for step in (1, 2, 3):
                progress.update(figures(step))
            progress.echo("dev cer 0.5")
            progress.update(figures(4))
        terminal.flush()
        seen = ""
        while "step 4/30" not in seen:  # a terminal hands over what it has so far
            seen += os.read(leader, 65536).decode()
    os.close(leader)
    assert all(f"step {step}/30" in seen for step in (1, 2, 3, 4))
    assert "dev cer 0.5" in seen and "\r" in seen and "\x1b[2K" in seen
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= 60


def test_remaining_time_ignores_one_long_pause(monkeypatch):
    clock = iter([0.0, *(float(t) for t in (1, 2, 3, 103, 104, 105))])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = ProgressLine(total_steps=16, total_epochs=1, stream=io.StringIO())
    assert progress.remaining_seconds() is None
    for step in range(1, 7):  # an evaluation of 100 s between steps 3 and 4
        progress.update(figures(step))
    assert progress.remaining_seconds() == 10.0


def test_a_narrow_terminal_leaves_out_the_lightest_parts_first():
    parts = [("epoch 1/2", 2), ("step 3/4", 9), ("pad 1 %", 1)]
    assert fit_line(parts, 80) == "epoch 1/2  step 3/4  pad 1 %"
    assert fit_line(parts, 20) == "epoch 1/2  step 3/4"
    assert fit_line(parts, 10) == "step 3/4"
    assert fit_line(parts, 1) == "step 3/4"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (180, "3 min"), (7500, "2 h 05 min"), (200_000, "2 d 8 h")],
)
def test_durations_are_in_words(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.421, "0.42"), (41.23, "41.2"), (2134, "2.1k"), (1_300_000, "1.3M")])
def test_rates_are_short(value, text):
    assert short_rate(value) == text
