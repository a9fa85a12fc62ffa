"""T5Gemma and T5Gemma 2: logits and searches are those of transformers on the same vectors, clip by clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.small_configs import translator_config
from toolkit.batching.collate import places_of_labels
from toolkit.decoding.beam_search import beam_search
from toolkit.models import PoseTranslator
from toolkit.models.backbone import new_backbone
from toolkit.models.loading.backbone_weights import placement_for, published_backbone

WIDTH, VOCABULARY, START, END = 32, 29, 2, 1
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
FRAMES = (23, 9, 15, 4)
BEFORE = [5, 6, 7]
TEXTS = [[4, 5, 6, 7, 8, END], [9, END], [10, 11, 12, END], [END]]
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
    torch.manual_seed(1)
    mask = torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None]
    poses = torch.randn(len(FRAMES), max(FRAMES), 50, 3) * mask[..., None, None]
    return {"poses": poses, "visible": mask[..., None].expand(-1, -1, 50), "frame_mask": mask}


def vectors_of(model: PoseTranslator, clips: dict[str, Tensor], clip: int) -> Tensor:
    """By hand, what transformers' model gets of one clip: words and poses, so that its first layer reads both alike."""
    frames = FRAMES[clip]
    poses, _ = model.pose_encoder(*(clips[key][clip : clip + 1, :frames] for key in clips))
    words = model.backbone.get_input_embeddings().weight[BEFORE]
    if model.backbone.config.model_type == "t5gemma":  # which multiplies words and poses
        return torch.cat([words, poses[0] / WIDTH**0.5])[None]
    return torch.cat([words * WIDTH**0.5, poses[0]])[None]


@every_kind
def test_logits_are_those_of_the_model_on_the_same_vectors(
    kind: str, window: int, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model = make(kind, window)
    labels = torch.full((len(TEXTS), max(map(len, TEXTS))), -100)
    for row, text in enumerate(TEXTS):
        labels[row, : len(text)] = torch.tensor(text)
    with torch.no_grad():
        found = model(**clips, labels=labels).logits
        labelled = places_of_labels(labels)
        torch.testing.assert_close(model(**clips, labels=labels, labelled=labelled).logits, found[labels != -100])
        for clip, text in enumerate(TEXTS):
            vectors, words = vectors_of(model, clips, clip), torch.tensor([[START, *text[:-1]]])
            expected = model.backbone(inputs_embeds=vectors, decoder_input_ids=words).logits[0]
            torch.testing.assert_close(found[clip, : len(text)], expected, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("beams", [1, 5])
def test_a_search_finds_what_transformers_finds_for_each_clip(
    kind: str, window: int, beams: int, make: Callable[..., PoseTranslator], clips: dict[str, Tensor]
) -> None:
    model, settings = make(kind, window), {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**clips, **settings, **({"custom_generate": beam_search} if beams > 1 else {}))
    texts = set()
    for clip in range(len(FRAMES)):
        with torch.no_grad():
            vectors = vectors_of(model, clips, clip)
        theirs = model.backbone.generate(inputs_embeds=vectors, generation_config=model.generation_config, **settings)
        expected = theirs.sequences[0].tolist()
        texts.add(tuple(expected))
        assert found.sequences[clip, : len(expected)].tolist() == expected
        assert not found.sequences[clip, len(expected) :].any()
        if beams > 1:
            torch.testing.assert_close(found.sequences_scores[clip], theirs.sequences_scores[0], atol=1e-4, rtol=1e-4)
    assert len(texts) > 1, "too much alike to show much"


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
