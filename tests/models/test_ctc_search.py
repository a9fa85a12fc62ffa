"""Prefix scores against the definition: sums over every alignment, one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from toolkit.models.ctc_search import CtcPrefixScores

VOCABULARY = 5  # 0 start, 1 end, 2..4 letters; CTC adds the blank, 5
POSITIONS = 5


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != VOCABULARY)


def brute_force(log_probs: torch.Tensor, text: tuple[int, ...], *, whole: bool) -> float:
    """log P(text) or log P(text followed by anything), over all alignments."""
    total = 0.0
    for path in itertools.product(range(VOCABULARY + 1), repeat=len(log_probs)):
        read = collapse(path)
        if read == text if whole else read[: len(text)] == text:
            total += math.exp(sum(log_probs[t, token].item() for t, token in enumerate(path)))
    return math.log(total) if total else -math.inf


@pytest.mark.parametrize("text", [(), (2,), (2, 3), (2, 2), (3, 2, 3)])
@pytest.mark.parametrize("length", [POSITIONS, POSITIONS - 1])
def test_gains_are_ratios_of_sums_over_all_alignments(text: tuple[int, ...], length: int) -> None:
    torch.manual_seed(len(text))
    logits = torch.randn(1, POSITIONS, VOCABULARY + 1) * 2
    mask = torch.arange(POSITIONS)[None] < length
    log_probs = logits[0, :length].log_softmax(-1)
    scorer = CtcPrefixScores(logits, mask, weight=1.0, end_id=1, special_ids=[0, 1], num_beams=1)
    flat = torch.zeros(1, VOCABULARY)
    for end in range(len(text) + 1):
        scores = scorer(torch.tensor([[0, *text[:end]]]), flat)[0]
    before = brute_force(log_probs, text, whole=False)
    for token in (2, 3, 4):
        expected = brute_force(log_probs, (*text, token), whole=False) - before
        if expected == -math.inf:
            assert scores[token] < -1e6
        else:
            assert scores[token].item() == pytest.approx(expected, abs=1e-4)
    assert scores[1].item() == pytest.approx(brute_force(log_probs, text, whole=True) - before, abs=1e-4)


def test_beams_that_change_places_keep_their_own_alignments() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(2, POSITIONS, VOCABULARY + 1), torch.ones(2, POSITIONS, dtype=torch.bool)
    settings = {"weight": 0.5, "end_id": 1, "special_ids": [0, 1]}
    beams = CtcPrefixScores(logits, mask, num_beams=2, **settings)
    scores = torch.randn(4, VOCABULARY)
    beams(torch.zeros(4, 1, dtype=torch.long), scores)
    beams(torch.tensor([[0, 2], [0, 3], [0, 4], [0, 2]]), scores)
    # Both beams of the second clip now continue its second row.
    together = beams(torch.tensor([[0, 3, 2], [0, 2, 2], [0, 2, 4], [0, 2, 3]]), scores)
    for row, text in ((0, (3, 2)), (1, (2, 2)), (2, (2, 4)), (3, (2, 3))):
        alone = CtcPrefixScores(logits[row // 2 : row // 2 + 1], mask[:1], num_beams=1, **settings)
        for end in range(len(text) + 1):
            expected = alone(torch.tensor([[0, *text[:end]]]), scores[row : row + 1])
        torch.testing.assert_close(together[row], expected[0], atol=1e-4, rtol=1e-4)


def test_weight_zero_is_the_decoder_alone() -> None:
    scores = torch.randn(1, VOCABULARY).log_softmax(-1)
    scorer = CtcPrefixScores(
        torch.randn(1, POSITIONS, VOCABULARY + 1),
        torch.ones(1, POSITIONS, dtype=torch.bool),
        weight=0.0,
        end_id=1,
        special_ids=[0, 1],
        num_beams=1,
    )
    torch.testing.assert_close(scorer(torch.zeros(1, 1, dtype=torch.long), scores), scores)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_special_token_that_the_decoder_must_write_costs_nothing(weight: float) -> None:
    scorer = CtcPrefixScores(
        torch.randn(1, POSITIONS, VOCABULARY + 1),
        torch.ones(1, POSITIONS, dtype=torch.bool),
        weight=weight,
        end_id=1,
        special_ids=[0, 1, 4],
        num_beams=1,
    )
    forced = torch.full((1, VOCABULARY), -math.inf)
    forced[0, 4] = 0.0
    assert scorer(torch.zeros(1, 1, dtype=torch.long), forced).tolist() == forced.tolist()
    free = scorer(torch.tensor([[0, 4]]), torch.zeros(1, VOCABULARY).index_fill(1, torch.tensor([2]), -math.inf))[0]
    assert free[3].isfinite() and free[2] == -math.inf and free[4] < -1e6, "where others are possible it is not found"
