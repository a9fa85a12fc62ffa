"""The arithmetic of memory counts what a search really holds, and what does not fit is not gathered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, BartConfig, LlamaConfig, PreTrainedConfig, T5Config

from tests.recorded_calls import RecordedCalls
from toolkit.decoding.beam_search import beam_search
from toolkit.decoding.step_graphs import StepGraphs
from toolkit.models import PoseTranslator, PoseTranslatorConfig
from toolkit.planning import memory
from toolkit.planning.costs.storages import Storages
from toolkit.planning.memory import fitting_batch_frames, translation_memory

CLIPS, FRAMES, BEAMS, TOKENS = 3, 40, 4, 12
KEPT = {"keys", "values", "prefix_keys", "prefix_values"}
SIZES = {"vocab_size": 50, "d_model": 32}


def gemma_halves(kind: str) -> dict[str, Any]:
    """Of an encoder-decoder made of language models; its encoder may have a part for pictures, which is not built."""
    half: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "head_dim": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    encoder = half if kind == "t5gemma" else {"text_config": half, "vision_config": {"image_size": 16, "patch_size": 4}}
    return {"encoder": encoder, "decoder": half, "vocab_size": 50, "decoder_start_token_id": 2}


BACKBONES: dict[str, PreTrainedConfig] = {
    # Heads that together are wider than the model, as T5's largest are.
    "t5": T5Config(
        **SIZES, d_kv=16, num_heads=4, d_ff=64, num_layers=4, num_decoder_layers=3, decoder_start_token_id=0
    ),
    "bart": BartConfig(
        **SIZES, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=8,
        decoder_attention_heads=4, max_position_embeddings=64,
    ),
    # Queries share keys, and heads are not a part of the width.
    "llama": LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=3,
    ),
    **{kind: AutoConfig.for_model(kind, **gemma_halves(kind)) for kind in ("t5gemma", "t5gemma2")},
}  # fmt: skip


def translator(name: str, stride: int, **more: Any) -> PoseTranslator:
    encoder = {
        "kind": "conv",
        "hidden": 16,
        "layers": 1,
        "kernel": 3,
        "stride": stride,
        "dropout": 0.0,
        "positions": True,
    }
    model = PoseTranslator(PoseTranslatorConfig(BACKBONES[name].to_dict(), encoder, num_points=5, **more)).eval()
    model.generation_config.update(num_beams=BEAMS, min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    return model


def largest_cache(model: PoseTranslator) -> int:
    """Bytes of the keys and values after the last step of a search."""
    sizes: list[int] = []

    def look(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        cache = named["past_key_values"]
        parts = [cache] if hasattr(cache, "layers") else [cache.self_attention_cache, cache.cross_attention_cache]
        kept = [value for part in parts for layer in part.layers for key, value in vars(layer).items() if key in KEPT]
        sizes.append(sum(tensor.nbytes for tensor in kept if tensor is not None))  # T5 has layers that stay empty

    handle = model.backbone.get_decoder().register_forward_hook(look, with_kwargs=True)
    poses = torch.randn(CLIPS, FRAMES, 5, 3)
    seen, real = torch.ones(CLIPS, FRAMES, 5, dtype=torch.bool), torch.ones(CLIPS, FRAMES, dtype=torch.bool)
    model.generate(poses, seen, real, custom_generate=beam_search)
    handle.remove()
    return max(sizes)


@pytest.mark.parametrize(("attention", "stride"), [("sdpa", 1), ("sdpa", 4), ("eager", 2)])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_cache_is_what_the_search_holds_and_little_more(name: str, attention: str, stride: int) -> None:
    model = translator(name, stride)
    if name != "t5gemma":  # which has no other than eager
        model.backbone.set_attn_implementation(attention)
    estimate = translation_memory(model, clips=CLIPS, frames=FRAMES, beams=BEAMS, max_new_tokens=TOKENS)
    held = largest_cache(model)
    assert held <= estimate.cache <= 1.5 * held


@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
def test_graphs_keep_what_is_counted(name: str) -> None:
    model, graphs = translator(name, stride=2), StepGraphs(RecordedCalls())
    estimate = translation_memory(model, clips=CLIPS, frames=FRAMES, beams=BEAMS, max_new_tokens=TOKENS, graphs=True)
    poses, real = torch.randn(CLIPS, FRAMES, 5, 3), torch.ones(CLIPS, FRAMES, dtype=torch.bool)
    model.generate(poses, real[..., None].expand(-1, -1, 5), real, custom_generate=beam_search, graphs=graphs)
    assert graphs.cache is not None
    held = sum(tensor.nbytes for tensor in (*graphs.cache.states(), graphs.cache.scores))
    assert 0.9 * held <= estimate.kept <= 1.1 * held
    without = translation_memory(model, clips=CLIPS, frames=FRAMES, beams=BEAMS, max_new_tokens=TOKENS)
    assert estimate.working > without.working


@pytest.mark.parametrize("vocabulary", [70, 3000])
def test_a_joint_search_takes_what_is_counted(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a search by the decoder alone: alignments with candidates, or scores of a large vocabulary."""
    monkeypatch.setitem(BACKBONES, "t5", T5Config(**BACKBONES["t5"].to_dict() | {"vocab_size": vocabulary}))
    most, counted = [], []
    for weight in (0.0, 0.4):
        model = translator("t5", 1, ctc=True, ctc_search_weight=weight, special_token_ids=[0, 1])
        poses, real = torch.randn(CLIPS, FRAMES, 5, 3), torch.ones(CLIPS, FRAMES, dtype=torch.bool)
        with Storages([*model.parameters(), *model.buffers()]) as live:
            model.generate(poses, real[..., None].expand(-1, -1, 5), real, custom_generate=beam_search)
        most.append(max(peak.alone for peak in live.peaks.values()))
        counted.append(
            translation_memory(model, clips=CLIPS, frames=FRAMES, beams=BEAMS, max_new_tokens=TOKENS).working
        )
    assert 0.9 <= (counted[1] - counted[0]) / (most[1] - most[0]) <= 1.5


def test_weights_are_counted_once_and_in_their_own_precision() -> None:
    model = translator("t5", 1)
    given = {"clips": 1, "frames": 10, "beams": 1, "max_new_tokens": 1}
    whole = translation_memory(model, **given).weights
    assert whole == sum(parameter.nbytes for parameter in model.parameters())
    assert translation_memory(model.bfloat16(), **given).weights == whole // 2


def test_more_of_anything_needs_more() -> None:
    model = translator("bart", 2)
    least = {"clips": 2, "frames": 20, "beams": 2, "max_new_tokens": 10}
    for key in least:
        more = translation_memory(model, **(least | {key: 2 * least[key]}))
        assert more.total > translation_memory(model, **least).total, key


def test_generation_batches_are_as_large_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, search = translator("t5", 1), {"beams": BEAMS, "max_new_tokens": TOKENS}
    frames = np.array([FRAMES] * 16)

    def chosen(clips: float, *, weights: float = 0.0, gathers: bool = False) -> int:
        """With room for so many clips beside so many times the weights."""
        one = translation_memory(model, clips=1, frames=FRAMES, **search)
        room = weights * one.weights + clips * (one.total - one.weights)
        monkeypatch.setattr(memory, "free_memory", lambda device: 1.001 * room / memory.LARGEST_SHARE)
        return fitting_batch_frames(
            model, torch.device("cpu"), frames=frames, most=16 * FRAMES, gathers=gathers, **search
        )

    assert chosen(16) == 16 * FRAMES
    assert chosen(15) == 8 * FRAMES
    assert chosen(4) == 4 * FRAMES
    assert chosen(0.1) == FRAMES, "one clip is tried anyway"
    assert chosen(4, weights=1, gathers=True) == 4 * FRAMES, "partitioned weights are gathered"
    assert chosen(2, weights=0.5, gathers=True) >= 2 * FRAMES, "without room for them, layer by layer"
