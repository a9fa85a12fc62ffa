"""Our beam search finds what HuggingFace's finds, whatever the settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.scripts import load_script
from toolkit.batching.collate import Batch
from toolkit.batching.loader import evaluation_batches
from toolkit.corpus.packed import Corpus
from toolkit.decoding import beam_search as module
from toolkit.decoding.beam_search import beam_search
from toolkit.decoding.held_clips import SHARED_ATTENTION
from toolkit.models import PoseProcessor, PoseTranslator

Make = Callable[..., PoseTranslator]


@pytest.fixture
def batch(corpus: Corpus, processor: PoseProcessor) -> Batch:
    """Clips of many lengths."""
    return next(evaluation_batches(corpus.splits["test"], processor.tokenizer, 1200))


def both(model: PoseTranslator, batch: Batch, **settings: Any) -> tuple[Any, Any]:
    """What HuggingFace's loop and ours return."""
    inputs = (batch.poses, batch.visible, batch.frame_mask)
    settings = {"return_dict_in_generate": True, "output_scores": True, **settings}
    return model.generate(*inputs, **settings), model.generate(*inputs, custom_generate=beam_search, **settings)


def texts_of(sequences: torch.Tensor) -> list[list[int]]:
    """Each text up to its end. What follows is padding: for HuggingFace the end token where token 0 should pad."""
    texts = [row[: row.index(1)] if 1 in row else row for row in sequences.tolist()]
    for text in texts:
        while text and text[-1] == 0:
            text.pop()
    return texts


def assert_alike(theirs: Any, ours: Any) -> None:
    assert texts_of(theirs.sequences) == texts_of(ours.sequences)
    torch.testing.assert_close(theirs.sequences_scores, ours.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length_penalty", [0.6, 0.0, -1.0, 2.0])
def test_texts_and_scores_are_those_of_huggingface(
    translator: Make, batch: Batch, kind: str, attention: str, length_penalty: float
) -> None:
    theirs, ours = both(translator(kind, attention=attention), batch, length_penalty=length_penalty)
    assert_alike(theirs, ours)
    texts = texts_of(theirs.sequences)
    assert len(texts) == len(batch) > 15
    if length_penalty == 0.6:
        assert len({tuple(text) for text in texts}) > 3 and len(set(map(len, texts))) > 1, "too much alike to show much"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 4},
        {"num_return_sequences": 2, "early_stopping": True},
        {"early_stopping": "never", "length_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"forced_bos_token_id": 7},
        {"forced_eos_token_id": 1},
        {"min_new_tokens": 5},
        {"num_beams": 2, "max_new_tokens": 1},
        {"num_beams": 7, "repetition_penalty": 1.3},
    ],
)
def test_the_settings_of_generate_hold(translator: Make, batch: Batch, settings: dict[str, Any]) -> None:
    assert_alike(*both(translator(), batch, **settings))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"length_penalty": -1.0}, {"num_return_sequences": 4}, {"early_stopping": True}, {"max_new_tokens": 1}],
)
def test_a_gpu_is_asked_after_every_ten_tokens_and_finds_the_same(
    translator: Make, batch: Batch, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(module, "tokens_between_looks", lambda device: 10)
    model = translator(kind)
    tokens = settings.get("max_new_tokens", 14)
    with load_script("benchmarks/operator_calls.py").Calls() as calls:
        model.generate(batch.poses, batch.visible, batch.frame_mask, custom_generate=beam_search, **settings)
    asked = {key: count for key, count in calls.waits.items() if key[1] in ("step", "_drop", "_collect", "beam_search")}
    assert sum(asked.values()) <= -(-tokens // 10), asked
    assert_alike(*both(model, batch, **settings))


def test_joint_search_with_ctc_lets_finished_clips_go_and_finds_the_same(translator: Make, batch: Batch) -> None:
    assert_alike(*both(translator(ctc=0.3), batch, length_penalty=0.0))


@pytest.mark.parametrize("forced_by", [None, "forced_bos_token_id", "first_tokens"])
@torch.no_grad()
def test_joint_scores_are_those_of_decoder_and_ctc_by_torchs_own_functions(
    translator: Make, batch: Batch, forced_by: str | None
) -> None:
    """Texts of BART, and of what writes many languages, begin with a special token, which CTC does not read."""
    weight, special, first = 0.3, [0, 1, 2, 7], 7
    model, inputs = translator("bart", ctc=weight), (batch.poses, batch.visible, batch.frame_mask)
    model.config.special_token_ids = special
    settings: dict[str, Any] = {"length_penalty": 0.0, "forced_eos_token_id": 1, "max_new_tokens": 6}
    if forced_by:
        settings[forced_by] = torch.full((len(batch),), first) if forced_by == "first_tokens" else first
    _, found = both(model, batch, **settings)
    for number, (text, score) in enumerate(zip(texts_of(found.sequences[:, 1:]), found.sequences_scores, strict=True)):
        assert not forced_by or text[0] == first
        labels = torch.tensor([[*text, 1]])
        output = model(*(values[number : number + 1] for values in inputs), labels)
        scores = output.logits[0].log_softmax(-1).gather(1, labels.T).squeeze(1)
        # What must be written costs the decoder nothing: the first token, and the end of the longest texts.
        of_decoder = scores[bool(forced_by) : 5 if len(text) == 5 else None].sum().item()
        signed = torch.tensor([token for token in text if token not in special])
        positions = int(output.encoder_mask.sum())
        lost = functional.ctc_loss(
            output.ctc_logits[0, :positions].log_softmax(-1),
            signed,
            torch.tensor(positions),
            torch.tensor(len(signed)),
            blank=output.ctc_logits.shape[-1] - 1,
            reduction="sum",
        )
        assert score.item() == pytest.approx((1 - weight) * of_decoder - weight * lost.item(), abs=1e-3)


def test_fewer_rows_are_computed_and_one_encoding_serves_all_beams(translator: Make, batch: Batch) -> None:
    model, rows, keys = translator(), [], []
    attention = model.backbone.decoder.block[0].layer[1].EncDecAttention
    model.backbone.decoder.register_forward_pre_hook(
        lambda _, arguments, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    attention.register_forward_hook(
        lambda module, arguments, named, output: keys.append(
            len(named["past_key_values"].cross_attention_cache.layers[0].keys)
        ),
        with_kwargs=True,
    )
    theirs, _ = both(model, batch)
    steps = theirs.sequences.shape[1] - 1
    of_theirs, of_ours = rows[:steps], rows[steps:]
    assert rows[0] == 4 * len(batch) and len(batch) in of_ours, "the first step runs once a clip"
    assert min(of_ours) < max(of_ours), "clips leave the batch"
    assert keys[-1] == rows[-1] // 4, "keys stand once a clip"
    assert steps > 3 and sum(of_ours) < sum(of_theirs)
    assert model.backbone.config._attn_implementation == "sdpa" != SHARED_ATTENTION


def test_the_attention_is_put_back_even_after_an_error(translator: Make, batch: Batch) -> None:
    model = translator()

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        model.generate(
            batch.poses, batch.visible, batch.frame_mask, custom_generate=beam_search, logits_processor=[stop]
        )
    assert model.backbone.config._attn_implementation == "sdpa"


def test_tokens_alone_are_returned_unless_more_is_asked(translator: Make, batch: Batch) -> None:
    model = translator()
    inputs = (batch.poses, batch.visible, batch.frame_mask)
    theirs, ours = model.generate(*inputs), model.generate(*inputs, custom_generate=beam_search)
    assert isinstance(ours, torch.Tensor) and texts_of(theirs) == texts_of(ours)
