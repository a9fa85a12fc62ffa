"""A split for whose search memory is short: the graphs give theirs, batches are halved, and the texts stay the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.recorded_calls import RecordedCalls
from toolkit.corpus.packed import Corpus
from toolkit.decoding import step_graphs
from toolkit.decoding.decode_split import find_hypotheses
from toolkit.models import PoseProcessor, PoseTranslator

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB"

Find = Callable[..., tuple[list[str], list[int]]]


def fail(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(ERROR)


@pytest.fixture
def find(translator: Callable[..., PoseTranslator], processor: PoseProcessor, corpus: Corpus) -> Find:
    """The texts of a split, and the clips of each batch that was encoded; with more than ``most`` memory is short."""
    model, split = translator(vocabulary=384), corpus.splits["test"]

    def find(most: int = 99, **settings: Any) -> tuple[list[str], list[int]]:
        batches: list[int] = []

        def encode(_: Any, inputs: Any) -> None:
            batches.append(len(inputs[0]))
            if len(inputs[0]) > most:
                fail()

        handle = model.pose_encoder.register_forward_pre_hook(encode)
        try:
            found = find_hypotheses(model, split, processor, batch_frames=4 * int(split.frames.max()), **settings)
        finally:
            handle.remove()
        return [row[0].text for row in found], batches

    return find


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("search:")]


def test_batches_are_searched_in_halves(find: Find, caplog: pytest.LogCaptureFixture) -> None:
    texts, batches = find()
    assert max(batches) > 2
    with caplog.at_level(logging.WARNING, logger="toolkit"):
        found, tried = find(most=1)
    assert found == texts and tried.count(1) == sum(batches)
    assert len(lines(caplog)) == 1 and ERROR in lines(caplog)[0]


def test_a_single_clip_that_does_not_fit_is_an_error(find: Find) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        find(most=0)


def test_ranks_that_step_together_halve_nothing(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for this one."""
    with pytest.raises(torch.OutOfMemoryError):
        find(most=1, synced=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError):
        find(most=1, world_size=1)  # of ranks that hold one model together


@pytest.mark.parametrize("part", ["StaticCache", "capture"])
def test_graphs_give_their_memory_first(
    find: Find, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    texts, batches = find()

    def capture(call: Callable[[], torch.Tensor]) -> Any:
        if part == "capture":
            monkeypatch.setattr(step_graphs.StaticCache, "begin", fail)  # and so the step as it is written
            fail()
        return RecordedCalls()(call)

    monkeypatch.setattr(step_graphs, "capture_on", lambda device: capture)
    if part == "StaticCache":
        monkeypatch.setattr(step_graphs, "StaticCache", fail)
    with caplog.at_level(logging.WARNING, logger="toolkit"):
        found, tried = find()
    assert found == texts and len(tried) == len(batches) + 1, "one batch is searched again"
    assert ERROR in lines(caplog)[-1] and "graphs" in lines(caplog)[-1]
