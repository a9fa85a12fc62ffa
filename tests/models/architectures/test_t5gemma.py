"""T5Gemma and T5Gemma 2: logits and searches are those of transformers on the same vectors, clip by clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.models.same_as_transformers import (
    END,
    FRAMES,
    SEARCHES,
    check_logits,
    check_search,
    check_settings,
    padded_clips,
    vectors_of_poses,
)
from tests.small_configs import translator_config
from toolkit.decoding.beam_search import beam_search
from toolkit.models import PoseTranslator
from toolkit.models.backbone import new_backbone, stacks
from toolkit.models.loading.backbone_weights import placement_for, published_backbone

WIDTH, VOCABULARY, START = 32, 29, 2
HALF: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
BEFORE = [5, 6, 7]
# A window that no layer notices, and one that is shorter than a clip.
every_kind = pytest.mark.parametrize(("kind", "window"), [(k, w) for k in ("t5gemma", "t5gemma2") for w in (64, 6)])


def config_of(kind: str, window: int) -> Any:
    half = {**HALF, "sliding_window": window}
    encoder = half if kind == "t5gemma" else {"text_config": half, "vision_config": VISION, "mm_tokens_per_image": 4}
    return AutoConfig.for_model(
        kind, encoder=encoder, decoder=half, vocab_size=VOCABULARY, decoder_start_token_id=START
    )


@pytest.fixture
def make() -> Callable[..., PoseTranslator]:
    def make(kind: str, window: int) -> PoseTranslator:
        torch.manual_seed(5)
        model = PoseTranslator(translator_config(config_of(kind, window), prefix_token_ids=BEFORE)).eval()
        with torch.no_grad():
            for name, weight in model.backbone.named_parameters():
                if weight.dim() > 1:  # words that weigh little, so that no text repeats its last one
                    weight.mul_(0.2 if "embed" in name else 12.0)
            model.backbone.get_decoder().norm.weight.fill_(80.0)  # sharp, so that beams hardly tie
        model.generation_config.update(
            pad_token_id=0, eos_token_id=END, decoder_start_token_id=START, max_new_tokens=9, length_penalty=0.6
        )
        return model

    return make


@pytest.fixture
def clips() -> dict[str, Tensor]:
    return padded_clips()


def vectors_of(model: PoseTranslator, clips: dict[str, Tensor], clip: int) -> Tensor:
    """By hand, what transformers' model gets of one clip: words and poses, so that its first layer reads both alike."""
    poses, words = vectors_of_poses(model, clips, clip), model.backbone.get_input_embeddings().weight[BEFORE]
    if model.backbone.config.model_type == "t5gemma":  # which multiplies words and poses
        return torch.cat([words, poses / WIDTH**0.5])[None]
    return torch.cat([words * WIDTH**0.5, poses])[None]


@every_kind
def test_logits_are_those_of_the_model_on_the_same_vectors(
    kind: str, window: int, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model = make(kind, window)

    def expected(clip: int, text: list[int]) -> Tensor:
        words = torch.tensor([[START, *text[:-1]]])
        logits: Tensor = model.backbone(inputs_embeds=vectors_of(model, clips, clip), decoder_input_ids=words).logits
        return logits[0]

    check_logits(model, clips, expected)


@every_kind
@pytest.mark.parametrize("beams", [1, 5])
def test_a_search_finds_what_transformers_finds_for_each_clip(
    kind: str, window: int, beams: int, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model = make(kind, window)
    check_search(model, clips, beams, lambda clip: {"inputs_embeds": vectors_of(model, clips, clip)})


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
@pytest.mark.parametrize("settings", SEARCHES, ids=", ".join)
def test_the_settings_of_generate_hold(
    settings: dict[str, Any], kind: str, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    check_settings(make(kind, 6), clips, **settings)


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
def test_beams_share_the_encoding_of_their_clip(
    kind: str, make: Callable[..., PoseTranslator], clips: dict[str, Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    model, seen, ends = make(kind, 6), [], [END, 4, 9, 12, 17, 20]  # so many that clips end in turn

    def watch(_: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        cache = named["past_key_values"]
        texts, encodings = cache.self_attention_cache.layers[1], cache.cross_attention_cache.layers[1]
        seen.append((len(texts.keys), len(encodings.keys), len(encodings.values)))

    before = model.backbone.config._attn_implementation
    model.backbone.get_decoder().register_forward_hook(watch, with_kwargs=True)
    check_settings(model, clips, num_beams=5, eos_token_id=ends, max_new_tokens=20)
    del seen[: next(step for step, (rows, *_) in enumerate(seen) if rows == len(FRAMES))]  # transformers' own
    assert seen[0] == (len(FRAMES),) * 3, "the first step runs once a clip"
    assert len(seen) > 2 and all(rows == 5 * keys == 5 * values for rows, keys, values in seen[1:])
    assert seen[-1][1] < len(FRAMES), "clips leave the batch"
    assert {part.config._attn_implementation for part in stacks(model.backbone)} == {before}
    assert "attention implementation" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
def test_a_rank_without_unfinished_texts_keeps_step_with_the_others(
    kind: str, make: Callable[..., PoseTranslator], clips: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, others = make(kind, 6), iter([True, True, False])
    settings = {"num_beams": 3, "custom_generate": beam_search}
    alone = model.generate(**clips, **settings)
    together = "toolkit.decoding.beam_search._any_rank_searches"
    monkeypatch.setattr(together, lambda this_one, device: this_one or next(others))
    assert torch.equal(model.generate(**clips, **settings, synced=True), alone)
    assert not list(others)


def test_published_weights_are_read_without_those_of_the_vision_tower(tmp_path: Path) -> None:
    config = config_of("t5gemma2", 64)
    torch.manual_seed(3)
    theirs = AutoModelForSeq2SeqLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = published_backbone(str(tmp_path), config, placement_for("fp32", None)).eval()
    assert set(dict(theirs.named_parameters())) - set(dict(ours.named_parameters())) == {
        name
        for name, _ in theirs.named_parameters()
        if "vision_tower" in name or "multi_modal_projector" in name or "eoi_embedding" in name
    }
    words = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected, found = (model(input_ids=words, decoder_input_ids=words).logits for model in (theirs, ours))
    assert torch.equal(found, expected)


def test_random_weights_are_those_that_transformers_draws() -> None:
    """Each module of ours is initialised as the one in its place is."""
    config = config_of("t5gemma2", 64)
    theirs, ours = AutoModelForSeq2SeqLM.from_config(config), new_backbone(config)
    spread = {name: values.std() for name, values in theirs.named_parameters()}
    for name, values in ours.named_parameters():
        torch.testing.assert_close(values.std(), spread[name], rtol=0.2, atol=1e-6, msg=name)
