"""Language models behind poses: logits and searches are those of transformers on the same vectors, clip by clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from tests.models.same_as_transformers import (
    END,
    FRAMES,
    SEARCHES,
    TEXTS,
    check_logits,
    check_search,
    check_settings,
    labels_of,
    padded_clips,
    vectors_of_poses,
)
from tests.recorded_calls import RecordedCalls
from tests.small_configs import translator_config
from toolkit.batching.collate import NO_TOKEN, places_of_labels
from toolkit.decoding import held_clips, step_graphs
from toolkit.decoding.beam_search import beam_search
from toolkit.decoding.step_graphs import StepGraphs
from toolkit.models import PoseTranslator
from toolkit.models.language_models import prefixes
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS

WIDTH, VOCABULARY, START = 32, 29, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
# Windows that are shorter than a prefix, and prefixes of several lengths: a gap of padding would be seen.
OF_KIND: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": False},  # tied, and with random weights, it would repeat its last word
    "gemma2": {
        "sliding_window": 7,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}
BEFORE, BEHIND = [5, 6, 7], [8, 9]
OWN = [[10, 11], [12], [13, 14, 15], []]
every_kind = pytest.mark.parametrize("kind", LANGUAGE_MODELS)


@pytest.fixture
def make() -> Callable[..., PoseTranslator]:
    def make(kind: str, **settings: Any) -> PoseTranslator:
        torch.manual_seed(5)
        backbone = AutoConfig.for_model(kind, **{**SIZES, **OF_KIND.get(kind, {})})
        words = {"prefix_token_ids": BEFORE, "suffix_token_ids": BEHIND, "prefix_template": "{language}"}
        model = PoseTranslator(translator_config(backbone, **words, max_prefix_tokens=3, **settings)).eval()
        with torch.no_grad():
            for name, weight in model.backbone.named_parameters():
                if weight.dim() > 1:  # sharp, so that beams hardly tie
                    is_table = "embed" in name or "lm_head" in name
                    weight.mul_((1.0 if kind.startswith("gemma") else 6.0) if is_table else 5.0)
        model.generation_config.update(pad_token_id=0, eos_token_id=END, max_new_tokens=12, length_penalty=0.6)
        return model

    return make


@pytest.fixture
def clips() -> dict[str, Tensor]:
    """Clips of several lengths in one batch, each with words of its own."""
    own = torch.tensor([[*ids, *[NO_TOKEN] * (3 - len(ids))] for ids in OWN])
    return {**padded_clips(), "prefix_ids": own}


def prefix_of(model: PoseTranslator, clips: dict[str, Tensor], clip: int, text: list[int]) -> Tensor:
    """By hand, what the language model reads of one clip: words, poses, words, start token and text."""
    table = model.backbone.get_input_embeddings().weight
    scale = WIDTH**0.5 if model.backbone.config.model_type.startswith("gemma") else 1.0
    before, behind = (table[ids] * scale for ids in ([*BEFORE, *OWN[clip]], [*BEHIND, START, *text]))
    return torch.cat([before, vectors_of_poses(model, clips, clip), behind])[None]


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_model_on_the_same_vectors(
    kind: str, attention: str, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model = make(kind)
    if kind != "gemma2":  # which has no other than eager
        model.backbone.set_attn_implementation(attention)

    def expected(clip: int, text: list[int]) -> Tensor:
        logits: Tensor = model.backbone(inputs_embeds=prefix_of(model, clips, clip, text[:-1])).logits
        return logits[0, -len(text) :]

    check_logits(model, clips, expected)


@every_kind
@pytest.mark.parametrize("beams", [1, 5])
def test_a_search_finds_what_transformers_finds_for_each_clip(
    kind: str, beams: int, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model = make(kind)

    def inputs(clip: int) -> dict[str, Tensor]:
        vectors = prefix_of(model, clips, clip, [])
        return {"inputs_embeds": vectors, "attention_mask": torch.ones(vectors.shape[:2], dtype=torch.int64)}

    check_search(model, clips, beams, inputs, begins=1)
    began = model.generate(**clips, max_new_tokens=1)[:, 0]
    assert (began == END).all(), "the start token is a word; what is special is left out of texts"


@every_kind
def test_steps_as_graphs_find_the_same(
    kind: str, make: Callable[..., PoseTranslator], clips: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows, scores that are capped, and queries that share keys."""
    model, capture = make(kind), RecordedCalls()
    monkeypatch.setattr(step_graphs, "SHORTEST", 8)
    settings = {"num_beams": 5, "return_dict_in_generate": True, "output_scores": True, "custom_generate": beam_search}
    plain, graphed = (model.generate(**clips, **settings, graphs=given) for given in (None, StepGraphs(capture)))
    assert torch.equal(graphed.sequences, plain.sequences)
    torch.testing.assert_close(graphed.sequences_scores, plain.sequences_scores, atol=1e-4, rtol=1e-4)
    assert capture.replays


@pytest.mark.gpu
@every_kind
def test_a_gpu_finds_what_a_cpu_finds(kind: str, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]) -> None:
    """A position of padding on the left sees nothing: CUDA's kernels give 0 for it; NaN would reach the clip's own."""
    settings = {"num_beams": 5, "return_dict_in_generate": True, "output_scores": True, "custom_generate": beam_search}
    expected = make(kind).generate(**clips, **settings)
    on_gpu = {name: tensor.cuda() for name, tensor in clips.items()}
    found = make(kind).cuda().generate(**on_gpu, **settings)
    torch.testing.assert_close(found.sequences_scores.cpu(), expected.sequences_scores, atol=1e-3, rtol=1e-3)
    assert torch.equal(found.sequences.cpu(), expected.sequences)


def test_beams_share_the_keys_of_their_prefix(
    make: Callable[..., PoseTranslator], clips: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = make("qwen2"), []
    attention = held_clips._prefix_attention

    def watched(module: Any, query: Tensor, key: Any, value: Any, *others: Any, **settings: Any) -> Any:
        seen.append((len(query), len(key.prefix), len(value.prefix), len(key.own)))
        return attention(module, query, key, value, *others, **settings)

    monkeypatch.setitem(held_clips.AttentionInterface._global_mapping, held_clips.PREFIX_ATTENTION, watched)
    before = model.backbone.config._attn_implementation
    model.generate(**clips, num_beams=5, min_new_tokens=4, custom_generate=beam_search)
    assert seen and all(rows == own == 5 * keys == 5 * values for rows, keys, values, own in seen)
    assert model.backbone.config._attn_implementation == before


@pytest.mark.parametrize("settings", SEARCHES, ids=", ".join)
def test_the_settings_of_generate_hold(
    settings: dict[str, Any], make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    check_settings(make("llama"), clips, **settings)


def test_ctc_reads_the_poses_alone(make: Callable[..., PoseTranslator], clips: dict[str, Tensor]) -> None:
    model = make("qwen3", ctc=True)
    labels = labels_of([[END]] * len(FRAMES))
    with torch.no_grad():
        output = model(**clips, labels=labels)
        for clip in range(len(FRAMES)):
            expected = model.ctc_head(vectors_of_poses(model, clips, clip))
            assert output.encoder_mask[clip].sum() == len(expected)
            torch.testing.assert_close(output.ctc_logits[clip, : len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_joint_search_with_ctc(make: Callable[..., PoseTranslator], clips: dict[str, Tensor]) -> None:
    check_settings(make("llama", ctc=True, ctc_search_weight=0.3), clips)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gemma", "llama", "mistral", "qwen2", "qwen3"])
def test_a_causal_kernel_gets_no_mask_in_training(
    kind: str,
    checkpointing: bool,
    make: Callable[..., PoseTranslator],
    clips: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses and gradients are those with a mask; where a window is shorter than the sequence, there is one."""
    model, seen = make(kind).train(), []
    windows = kind in OF_KIND and "sliding_window" in OF_KIND[kind]
    if checkpointing:
        settings = {"use_reentrant": False, **prefixes.recomputation(model.backbone)}
        model.backbone.gradient_checkpointing_enable(settings)
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(*states: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **settings: Any) -> Tensor:
        seen.append((attn_mask is None, is_causal))
        return kernel(*states, attn_mask=attn_mask, is_causal=is_causal, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    labels = labels_of(TEXTS)

    def loss_and_gradients() -> tuple[Tensor, list[Tensor]]:
        logits = model(**clips, labels=labels, labelled=places_of_labels(labels)).logits
        loss = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
        return loss, list(torch.autograd.grad(loss, list(model.parameters())))

    loss, gradients = loss_and_gradients()
    assert seen and ((True, True) in seen) != (kind == "mistral"), seen
    if not windows:
        assert set(seen) == {(True, True)}
    assert model.backbone.config._attn_implementation == "sdpa"
    monkeypatch.setattr(prefixes, "KERNELS", ())
    seen.clear()
    expected, others = loss_and_gradients()
    assert windows or {has_none for has_none, _ in seen} == {False}
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for found, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)
