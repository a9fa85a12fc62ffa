"""A model that is evaluated under ZeRO-3 is partitioned while it is read: no rank ever holds all of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import T5Config

from tests.process_groups import run_in_two_processes
from tests.same_translations import assert_same_translations
from tests.small_configs import POSE_ENCODER, T5, translator_config
from toolkit.corpus.packed import Corpus
from toolkit.cpu.allocator import return_freed_memory
from toolkit.decoding.decode_split import translate_split
from toolkit.decoding.whole_weights import partitioned_engine, whole_weights
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.scoring.predictions import write_predictions


def own_memory() -> int:
    """Bytes that this process has for itself; mapped files do not count."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@contextmanager
def growth() -> Iterator[list[int]]:
    """Within it the largest growth of this process's memory is the list's last number."""
    before, growths, done = own_memory(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            growths.append(max(growths[-1], own_memory() - before))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield growths
    finally:
        done.set()
        thread.join()


def load_as_rank(rank: int, small: Path, large: Path, size: int) -> None:
    return_freed_memory()
    partitioned_engine(str(small), world_size=2)  # what is imported for the first engine takes memory of its own
    with growth() as growths:
        engine = partitioned_engine(str(large), world_size=2)
    assert sum(parameter.ds_numel * 4 for parameter in engine.module.parameters()) == size
    assert growths[-1] < 0.75 * size, f"rank {rank} took {growths[-1]:,} bytes for a model of {size:,}"


def save_model(folder: Path, width: int) -> int:
    """Write a model that is about 12 layers of 2 x 512 x ``width`` weights, and give its size in bytes."""
    backbone = T5Config(**T5 | {"d_model": 512, "d_ff": width, "num_layers": 6})
    model = PoseTranslator(translator_config(backbone, pose_encoder=POSE_ENCODER | {"layers": 1}))
    model.save_pretrained(folder)
    (folder / "processor_config.json").write_text("{}")  # a folder without one is refused
    return sum(parameter.numel() * 4 for parameter in model.parameters())


@pytest.mark.process
def test_no_rank_holds_more_than_its_partition(tmp_path: Path) -> None:
    save_model(tmp_path / "small", 8)
    size = save_model(tmp_path / "large", 6144)
    assert size > 300e6
    run_in_two_processes(load_as_rank, tmp_path / "small", tmp_path / "large", size)


def translate_as_rank(rank: int, folder: Path, processor: PoseProcessor, corpus: Path, out: Path) -> None:
    engine = partitioned_engine(str(folder), world_size=2)
    for gather in (True, False):
        with torch.no_grad(), whole_weights(engine, gather=gather) as synced:
            split = Corpus.open(corpus).splits["test"]
            rows = translate_split(
                engine.module, split, processor, batch_frames=300, rank=rank, world_size=2, synced=synced
            )
        write_predictions(out / f"{rank}_{gather}.csv", rows)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.nightly)])
def test_a_partitioned_model_translates_as_the_whole_one(
    kind: str,
    tmp_path: Path,
    translator: Callable[..., PoseTranslator],
    processor: PoseProcessor,
    corpus: Corpus,
) -> None:
    folder = tmp_path / "model"
    translator(kind, vocabulary=384).save_pretrained(folder)
    processor.save_pretrained(folder)
    whole = PoseTranslator.from_pretrained(folder).eval()
    rows = translate_split(whole, corpus.splits["test"], processor, batch_frames=300)
    write_predictions(tmp_path / "one.csv", rows)
    run_in_two_processes(translate_as_rank, folder, processor, corpus.path, tmp_path)
    found = sorted(tmp_path.glob("[01]_*.csv"))
    assert len(found) == 4
    for path in found:
        assert_same_translations(path, tmp_path / "one.csv")
