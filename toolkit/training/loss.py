"""The loss, summed, so that the caller can divide by the target tokens of the whole global batch.

A mean over each micro-batch would weigh tokens by how full their micro-batch is. A sum that is divided once gives the
same gradient however the global batch is split into ranks, micro-batches and accumulation steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.batching.collate import IGNORED_LABEL


def token_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed negative log-likelihood of the labels, in nats.

    Computed in fp32, a few rows at a time: the scores of a vocabulary are the largest tensors of a step, and fp32
    copies of all of them would be several times as large.

    Args:
        logits: [..., tokens, vocabulary].
        labels: [..., tokens], -100 where nothing counts.
        label_smoothing: share of the target mass spread over the vocabulary (Szegedy et al. 2016).
    """
    return _TokenLoss.apply(logits.flatten(0, -2), labels.flatten(), label_smoothing)


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy that saves the logits and one number per row, and computes the gradient from them."""

    @staticmethod
    def forward(context: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        counts = labels != IGNORED_LABEL
        targets = labels.where(counts, 0)[:, None]
        norms = torch.empty(len(logits), device=logits.device)
        losses = torch.empty_like(norms)
        for rows in _chunks(logits):
            scores = logits[rows].float()
            norms[rows] = scores.logsumexp(dim=-1)
            expected = (1 - smoothing) * scores.gather(-1, targets[rows]).squeeze(-1)
            losses[rows] = norms[rows] - expected - (smoothing * scores.mean(dim=-1) if smoothing else 0.0)
        context.save_for_backward(logits, counts, targets, norms)
        context.smoothing = smoothing
        return losses.where(counts, 0.0).sum()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, counts, targets, norms = context.saved_tensors
        smoothing, result = context.smoothing, torch.empty_like(logits)
        weights = (gradient * counts)[:, None]
        for rows in _chunks(logits):
            slopes = logits[rows].float().sub_(norms[rows, None]).exp_()
            if smoothing:
                slopes.sub_(smoothing / logits.shape[-1])
            slopes.scatter_add_(-1, targets[rows], slopes.new_full((len(slopes), 1), smoothing - 1))
            result[rows] = slopes.mul_(weights[rows])
        return result, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Rows that together fit a CPU's cache, or occupy a GPU."""
    rows = max(1, (2**27 if logits.is_cuda else 2**19) // logits.shape[-1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def ctc_loss(logits: Tensor, encoder_mask: Tensor, labels: Tensor, special_ids: Tensor) -> Tensor:
    """Summed CTC loss (Graves et al. 2006) of the labels without their special tokens, in nats.

    A clip without labels (a filler) and a clip whose encoder sequence is too short for its text count 0.

    Args:
        logits: [clips, positions, vocabulary + 1]; the last one is the blank.
        encoder_mask: bool [clips, positions].
        labels: [clips, tokens], -100 where nothing counts.
        special_ids: tokens that stand for no sign (end of sentence, language codes).
    """
    signed = (labels != IGNORED_LABEL) & ~torch.isin(labels, special_ids)
    lengths = signed.sum(dim=1)
    log_probabilities = logits.float().log_softmax(dim=-1).transpose(0, 1)
    losses = functional.ctc_loss(
        log_probabilities,
        labels[signed],
        encoder_mask.sum(dim=1),
        lengths,
        blank=logits.shape[-1] - 1,
        reduction="none",
        zero_infinity=True,
    )
    return torch.where(lengths > 0, losses, torch.zeros_like(losses)).sum()
