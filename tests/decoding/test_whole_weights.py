"""Under ZeRO-3 two ranks translate as one does, with whole weights or in step; the weights stay partitioned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.process_groups import run_in_two_processes
from tests.same_translations import assert_same_translations
from toolkit.corpus.packed import Corpus
from toolkit.decoding.decode_split import translate_split
from toolkit.decoding.whole_weights import whole_weights
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.planning import memory
from toolkit.scoring.predictions import write_predictions


def translate_as_rank(rank: int, model: PoseTranslator, processor: PoseProcessor, path: Path, out: Path) -> None:
    import deepspeed

    # Small parameters are partitioned like large ones.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    split = Corpus.open(path).splits["test"]
    wanted: dict[str, Any] = {"batch_frames": 300, "frames": split.frames, "beams": 4, "max_new_tokens": 6}
    assert memory.fits_whole(engine, **wanted)
    if rank == 1:
        memory.free_memory = lambda *_: 100_000  # one rank without room is enough
    assert not memory.fits_whole(engine, **wanted)
    weight = model.pose_encoder.front[0].weight
    for gather in (True, False, True):
        assert weight.numel() == 0
        with torch.no_grad(), whole_weights(engine, gather=gather) as synced:
            assert synced != gather and (weight.numel() > 0) == gather
            rows = translate_split(
                model, split, processor, batch_frames=300, rank=rank, world_size=2, synced=synced, max_new_tokens=6
            )
        write_predictions(out / f"rank{rank}_{gather}.csv", rows)


@pytest.mark.process
def test_two_ranks_with_partitioned_weights_write_what_one_whole_model_writes(
    tmp_path: Path,
    translator: Callable[..., PoseTranslator],
    processor: PoseProcessor,
    corpus: Corpus,
) -> None:
    model, split = translator(vocabulary=384), corpus.splits["test"]
    rows = translate_split(model, split, processor, batch_frames=300, max_new_tokens=6)
    write_predictions(tmp_path / "one.csv", rows)
    run_in_two_processes(translate_as_rank, model, processor, corpus.path, tmp_path)
    for name in ("rank0_True", "rank1_True", "rank0_False", "rank1_False"):
        assert_same_translations(tmp_path / f"{name}.csv", tmp_path / "one.csv")
