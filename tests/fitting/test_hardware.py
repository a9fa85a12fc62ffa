"""The hardware in words, and GPUs as another process sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from toolkit.cluster import host_memory
from toolkit.cluster.ranks import Ranks
from toolkit.fitting import hardware
from toolkit.fitting.hardware import GIB, Card, cards, describe, room_for_tensors


def test_other_hardware_has_other_words() -> None:
    gpu = [Card("H100", 80 * GIB, 70 * GIB)]
    busy = [Card("H100", 80 * GIB, 10 * GIB)]
    found = [
        describe(Ranks(), []),
        describe(Ranks(), gpu),
        describe(Ranks(world_size=2, local_world_size=2), gpu),
        describe(Ranks(world_size=2), gpu),
        describe(Ranks(), [Card("A100", 80 * GIB, 0)]),
        describe(Ranks(), [Card("H100", 94 * GIB, 0)]),
    ]
    assert len(set(found)) == len(found)
    assert describe(Ranks(), busy) == describe(Ranks(), gpu), "what is free differs from one minute to the next"


def test_a_container_with_less_memory_is_other_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "memory_cgroups", lambda: iter([tmp_path]))
    found = []
    for limit in ("max", str(2**31), str(2**30)):
        (tmp_path / "memory.max").write_text(limit)
        found.append(describe(Ranks(), []))
    assert len(set(found)) == len(found)
    assert " 1.0 GiB" in found[-1]


def test_a_machine_without_gpus_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("multiprocessing.get_context", None)
    assert cards() == []


@pytest.mark.nightly
def test_gpus_are_listed_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cards() == [], "the other process sees none"


def test_the_context_of_the_process_that_looks_is_not_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    free, memory, sent = 60 * GIB, 80 * GIB, []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, memory))  # read with a context of its own
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    hardware._look(type("Pipe", (), {"send": staticmethod(sent.append)}))
    ((card,),) = sent
    assert room_for_tensors(card, 1) == free - hardware.GPU_RESERVE * memory
