"""Two ranks under ZeRO stage 3 start from a translator as one process does, in fp32 and on four bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.models.warm_start.makers import HANDS, SMALL, corpus_of, make, save
from tests.process_groups import run_in_two_processes
from toolkit.corpus.packed import Corpus
from toolkit.models import PoseTranslator
from toolkit.models.build import build_processor, build_translator
from toolkit.models.warm_start.filling import WarmStart
from toolkit.models.warm_start.plan import make_plan
from toolkit.models.warm_start.source import read_source
from toolkit.recipe.resolve import resolve_named

NF4 = ("model.lora.r=4", "model.quantization={kind: nf4, compute_dtype: fp32}")
CASES = {"fp32": (), "nf4 on a merged adapter": NF4}


@pytest.mark.process
def test_partitioned_weights_are_the_sources(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", HANDS)
    for name, overrides in CASES.items():
        adapted = ("model.lora.r=4",) if overrides else ()
        source = save(tmp_path / name / "source", make(corpus, *adapted, seed=1))
        whole = make(corpus, f"model.init_from={source}", *overrides, seed=9, base=tmp_path / name / "base")
        torch.save(dequantised(whole.model), tmp_path / name / "expected")
    run_in_two_processes(start_as_rank, tmp_path)


def start_as_rank(rank: int, folder: Path) -> None:
    corpus = Corpus.open(folder / "corpus")
    for name, overrides in CASES.items():
        settings = [*SMALL, f"model.init_from={folder / name / 'source'}", *overrides]
        resolved = resolve_named("t5_small", settings, 2, has_gpu=False, ds="zero3", needs_data=False)
        tokenizer = build_processor(resolved.recipe, corpus).tokenizer
        plan = make_plan(
            read_source(resolved.recipe.model.init_from or ""),
            resolved.recipe,
            corpus.landmark_set,
            corpus.metadata.fps,
            tokenizer,
        )
        base = folder / name / "base of two"
        torch.manual_seed(9)
        start = WarmStart(plan, base if overrides else None, keeps_base=rank == 0)
        model = build_translator(resolved, corpus, tokenizer, start)
        assert any(hasattr(parameter, "ds_id") for parameter in model.backbone.parameters())
        found, expected = dequantised(model), torch.load(folder / name / "expected")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)
        distributed.barrier()
        assert base.is_dir() == bool(overrides), "the frozen weights of a run that trains in full are in no folder"


def dequantised(model: PoseTranslator) -> dict[str, torch.Tensor]:
    """Every weight as the layers compute with it."""
    import bitsandbytes
    import deepspeed

    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            state = getattr(parameter, "quant_state", None)
            values = parameter.data if state is None else bitsandbytes.functional.dequantize_4bit(parameter.data, state)
            weights[name] = values.detach().clone()
    return weights
