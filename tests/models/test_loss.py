"""The loss is a sum over target tokens: how a batch is split changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.models.loss import ctc_loss, token_loss

VOCABULARY = 7
SPECIAL = torch.tensor([0, 1])


def example(clips: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(clips, tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, VOCABULARY, (clips, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (clips,), generator=generator)
    labels[torch.arange(tokens) >= lengths[:, None]] = -100
    return logits, labels


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.4]), st.data())
def test_token_loss_does_not_depend_on_how_the_batch_is_split(
    clips: int, tokens: int, seed: int, smoothing: float, data: st.DataObject
) -> None:
    logits, labels = example(clips, tokens, seed)
    split = data.draw(st.integers(1, clips - 1))
    parts = sum(token_loss(logits[part], labels[part], smoothing) for part in (slice(split), slice(split, None)))
    torch.testing.assert_close(token_loss(logits, labels, smoothing), parts, rtol=1e-5, atol=1e-5)


def test_token_loss_counts_only_labels() -> None:
    logits, labels = example(3, 5, 0)
    by_hand = torch.zeros((), dtype=torch.float64)
    for clip in range(3):
        for token in range(5):
            if labels[clip, token] != -100:
                by_hand -= logits[clip, token].log_softmax(-1)[labels[clip, token]]
    torch.testing.assert_close(token_loss(logits, labels).double(), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_loss_and_its_gradient_are_torchs_cross_entropy(smoothing: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vocabulary = 40_000  # a chunk holds a few rows
    labels = torch.randint(vocabulary, (7, 13))
    labels[2:4] = -100
    ours = torch.randn(7, 13, vocabulary, dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        theirs.flatten(0, 1).float(), labels.flatten(), label_smoothing=smoothing, reduction="sum"
    )
    loss = token_loss(ours, labels, smoothing)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not ours.grad[2:4].any()


def test_a_batch_of_fillers_has_no_loss_and_a_gradient_of_zero() -> None:
    logits = torch.randn(2, 3, VOCABULARY, requires_grad=True)
    ctc_logits = torch.randn(2, 6, VOCABULARY + 1, requires_grad=True)
    nothing = torch.full((2, 3), -100)
    loss = token_loss(logits, nothing) + ctc_loss(ctc_logits, torch.ones(2, 6, dtype=torch.bool), nothing, SPECIAL)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()
    assert ctc_logits.grad is not None and not ctc_logits.grad.any()


def test_ctc_leaves_out_special_tokens_padding_and_fillers() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 8, VOCABULARY + 1), torch.ones(2, 8, dtype=torch.bool)
    bare = ctc_loss(logits, mask, torch.tensor([[3, 4, -100], [-100, -100, -100]]), SPECIAL)
    framed = ctc_loss(logits, mask, torch.tensor([[0, 3, 4, 1], [-100, -100, -100, -100]]), SPECIAL)
    alone = ctc_loss(logits[:1], mask[:1], torch.tensor([[3, 4]]), SPECIAL)
    assert bare.item() == pytest.approx(alone.item())
    assert framed.item() == pytest.approx(alone.item())


def test_ctc_ignores_padding_frames() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 8, VOCABULARY + 1), torch.tensor([[3, 4]])
    mask = torch.arange(8)[None] < 5
    changed = logits.clone()
    changed[:, 5:] = 9.0
    assert ctc_loss(changed, mask, labels, SPECIAL).item() == ctc_loss(logits, mask, labels, SPECIAL).item()


def test_a_clip_too_short_for_its_text_counts_0_and_not_infinity() -> None:
    logits, mask = torch.randn(1, 2, VOCABULARY + 1), torch.ones(1, 2, dtype=torch.bool)
    assert ctc_loss(logits, mask, torch.tensor([[3, 4, 5]]), SPECIAL).item() == 0.0
