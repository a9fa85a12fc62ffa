"""Copies to a GPU, with stand-ins for its streams: which stream copies, and what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from toolkit.batching import copies
from toolkit.batching.collate import Batch, collate
from toolkit.batching.copies import copied_ahead, on_device
from toolkit.corpus.packed import Clip, Clips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    tokenizer = ByT5Tokenizer()
    clips = [Clip(f"clip {number}", "ab", np.ones((2, 4, 3), np.float16)) for number in range(3)]
    return [collate(Clips.of([clip]), [number], tokenizer, max_target_tokens=8) for number, clip in enumerate(clips)]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU would be asked to do, in order: memory of the meta device stands for its memory."""
    events: list[str] = []
    current = ["computing"]

    class Stream:
        def __init__(self, device: Any) -> None:
            events.append("new stream")

        def record_event(self) -> int:
            return sum(event.startswith("copy") for event in events) - 1

    @contextmanager
    def stream(_: Stream) -> Iterator[None]:
        current[0] = "copying"
        yield
        current[0] = "computing"

    def to(batch: Batch, device: Any, non_blocking: bool = True) -> Batch:
        assert non_blocking
        events.append(f"copy {batch.uids[0]} while {current[0]}")
        return moved(batch, "meta")

    moved = Batch.to
    computing = SimpleNamespace(wait_event=lambda event: events.append(f"wait for copy {event}"))
    monkeypatch.setattr(copies, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: events.append("pin") or batch)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: events.append("keep"), raising=False)
    return events


def test_each_batch_is_copied_while_the_one_before_it_is_used(batches: list[Batch], events: list[str]) -> None:
    for number, batch in enumerate(copied_ahead(batches, torch.device("cuda"))):
        assert batch.poses.is_meta and batch.uids == batches[number].uids
        events.append(f"use {number}")
    keep = ["keep"] * 5  # poses, visible, frame_mask, labels, labelled
    assert events == [
        *("new stream", "pin", "copy clip 0 while copying", "pin", "copy clip 1 while copying"),
        *("wait for copy 0", *keep, "use 0", "pin", "copy clip 2 while copying"),
        *("wait for copy 1", *keep, "use 1", "wait for copy 2", *keep, "use 2"),
    ]
    assert [batch.uids for batch in copied_ahead([], torch.device("cuda"))] == []


def test_one_stream_copies_all_steps(batches: list[Batch], events: list[str]) -> None:
    for _ in range(2):
        list(copied_ahead(batches, torch.device("cuda")))
    assert events.count("new stream") == 1


def test_without_a_gpu_a_batch_is_copied_when_it_is_asked_for(batches: list[Batch]) -> None:
    asked: list[int] = []

    def stream() -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            asked.append(number)
            yield batch

    copied = copied_ahead(stream(), CPU)
    assert torch.equal(next(copied).poses, batches[0].poses) and asked == [0]


def test_numbers_of_the_host_on_a_device() -> None:
    assert on_device([1, 2.5], CPU).tolist() == [1.0, 2.5]
    assert on_device([3], CPU, torch.int64).dtype == torch.int64
