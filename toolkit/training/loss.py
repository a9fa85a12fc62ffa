"""The loss, summed, so that the caller can divide by the target tokens of the whole global batch.

A mean over a micro-batch would weigh tokens by how full their micro-batch happened to be; a sum over everything divided
once gives the same gradient however the global batch is cut into ranks, micro-batches and accumulation steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.batching.collate import IGNORED_LABEL


def token_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed negative log-likelihood of the labels, in nats.

    Args:
        logits: [..., tokens, vocabulary].
        labels: [..., tokens], -100 where nothing counts.
        label_smoothing: share of the target mass spread over the vocabulary (Szegedy et al. 2016).
    """
    return functional.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def ctc_loss(logits: Tensor, encoder_mask: Tensor, labels: Tensor, special_ids: Tensor) -> Tensor:
    """Summed CTC loss (Graves et al. 2006) of the labels without their special tokens, in nats.

    A clip without labels (a filler) and a clip whose encoder sequence is too short for its text count nothing.

    Args:
        logits: [clips, positions, vocabulary + 1]; the last one is the blank.
        encoder_mask: bool [clips, positions].
        labels: [clips, tokens], -100 where nothing counts.
        special_ids: token ids that are written, not signed (end of sentence, language codes).
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
