"""Language models behind poses: logits and searches are those of transformers on the same vectors, clip by clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from tests.recorded_calls import RecordedCalls
from tests.small_configs import translator_config
from toolkit.batching.collate import NO_TOKEN, places_of_labels
from toolkit.decoding import held_clips, step_graphs
from toolkit.decoding.beam_search import beam_search
from toolkit.decoding.step_graphs import StepGraphs
from toolkit.models import PoseTranslator
from toolkit.models.language_models import prefixes
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS

WIDTH, VOCABULARY, START, END = 32, 29, 3, 1
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
FRAMES = (23, 9, 15, 4)
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
    torch.manual_seed(1)
    mask = torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None]
    own = torch.tensor([[*ids, *[NO_TOKEN] * (3 - len(ids))] for ids in OWN])
    poses = torch.randn(len(FRAMES), max(FRAMES), 50, 3) * mask[..., None, None]
    visible = mask[..., None].expand(-1, -1, 50)
    return {"poses": poses, "visible": visible, "frame_mask": mask, "prefix_ids": own}


def prefix_of(model: PoseTranslator, clips: dict[str, Tensor], clip: int, text: list[int]) -> Tensor:
    """By hand, what the language model reads of one clip: words, poses, words, start token and text."""
    frames = FRAMES[clip]
    inputs = (clips[key][clip : clip + 1, :frames] for key in ("poses", "visible", "frame_mask"))
    vectors, _ = model.pose_encoder(*inputs)
    table = model.backbone.get_input_embeddings().weight
    scale = WIDTH**0.5 if model.backbone.config.model_type.startswith("gemma") else 1.0
    before, behind = (table[ids] * scale for ids in ([*BEFORE, *OWN[clip]], [*BEHIND, START, *text]))
    return torch.cat([before, vectors[0], behind])[None]


def labels_of(texts: list[list[int]]) -> Tensor:
    labels = torch.full((len(texts), max(map(len, texts))), -100)
    for row, text in enumerate(texts):
        labels[row, : len(text)] = torch.tensor(text)
    return labels


def texts_of(sequences: Tensor) -> list[list[int]]:
    """Each text up to its end; what follows is padding, for which HuggingFace writes ends where token 0 should pad."""
    return [row[: row.index(END)] if END in row else row for row in sequences[:, 1:].tolist()]


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_model_on_the_same_vectors(
    kind: str, attention: str, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model = make(kind)
    if kind != "gemma2":  # which has no other than eager
        model.backbone.set_attn_implementation(attention)
    texts = [[4, 5, 6, 7, 8, END], [9, END], [10, 11, 12, END], [END]]
    labels = labels_of(texts)
    with torch.no_grad():
        found = model(**clips, labels=labels).logits
        labelled = places_of_labels(labels)
        torch.testing.assert_close(model(**clips, labels=labels, labelled=labelled).logits, found[labels != -100])
        for clip, text in enumerate(texts):
            vectors = prefix_of(model, clips, clip, text[:-1])
            expected = model.backbone(inputs_embeds=vectors).logits[0, -len(text) :]
            torch.testing.assert_close(found[clip, : len(text)], expected, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("beams", [1, 5])
def test_a_search_finds_what_transformers_finds_for_each_clip(
    kind: str, beams: int, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model = make(kind)
    settings = {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    loop = {"custom_generate": beam_search} if beams > 1 else {}
    found = model.generate(**clips, **settings, **loop)
    assert (found.sequences[:, 0] == END).all(), "the start token is a word; what is special is left out of texts"
    texts = []
    for clip in range(len(FRAMES)):
        with torch.no_grad():
            vectors = prefix_of(model, clips, clip, [])
        theirs = model.backbone.generate(
            inputs_embeds=vectors,
            attention_mask=torch.ones(vectors.shape[:2], dtype=torch.int64),
            generation_config=model.generation_config,
            **settings,
        )
        expected = theirs.sequences[0].tolist()
        texts.append(tuple(expected))
        assert found.sequences[clip, 1 : 1 + len(expected)].tolist() == expected
        assert not found.sequences[clip, 1 + len(expected) :].any()
        if beams > 1:
            torch.testing.assert_close(found.sequences_scores[clip], theirs.sequences_scores[0], atol=1e-4, rtol=1e-4)
    assert len(set(texts)) > 1, "too much alike to show much"


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


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 4},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 6},
        {"forced_eos_token_id": END, "early_stopping": True},
    ],
)
def test_the_settings_of_generate_hold(
    settings: dict[str, Any], make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model = make("llama")
    settings = {"num_beams": 4, "return_dict_in_generate": True, "output_scores": True, **settings}
    theirs, ours = model.generate(**clips, **settings), model.generate(**clips, **settings, custom_generate=beam_search)
    assert texts_of(ours.sequences) == texts_of(theirs.sequences)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)


def test_ctc_reads_the_poses_alone(make: Callable[..., PoseTranslator], clips: dict[str, Tensor]) -> None:
    model = make("qwen3", ctc=True)
    labels = labels_of([[END]] * len(FRAMES))
    with torch.no_grad():
        output = model(**clips, labels=labels)
        for clip, frames in enumerate(FRAMES):
            inputs = (clips[key][clip : clip + 1, :frames] for key in ("poses", "visible", "frame_mask"))
            expected = model.ctc_head(model.pose_encoder(*inputs)[0])[0]
            assert output.encoder_mask[clip].sum() == len(expected)
            torch.testing.assert_close(output.ctc_logits[clip, : len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_joint_search_with_ctc(make: Callable[..., PoseTranslator], clips: dict[str, Tensor]) -> None:
    model = make("llama", ctc=True, ctc_search_weight=0.3)
    settings = {"num_beams": 4, "return_dict_in_generate": True, "output_scores": True}
    theirs, ours = model.generate(**clips, **settings), model.generate(**clips, **settings, custom_generate=beam_search)
    assert texts_of(ours.sequences) == texts_of(theirs.sequences)


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
    labels = labels_of([[4, 5, 6, 7, 8, END], [9, END], [10, 11, 12, END], [END]])

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
