"""The loss, summed, so that the caller can divide by the target tokens of the whole global batch.

A mean over each micro-batch would weigh tokens by how full their micro-batch is. A sum that is divided once gives the
same gradient however the global batch is split into ranks, micro-batches and accumulation steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.batching.collate import IGNORED_LABEL, Batch

# Scores that are computed in fp32 at once: what fits a CPU's cache, and what occupies a GPU.
CPU_SCORES, GPU_SCORES = 2**19, 2**27


def row_losses(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's target, in nats, and the logarithm of the row's sum: fp32 [rows], twice.

    Args:
        logits: [rows, vocabulary].
        targets: int64 [rows, 1].
        smoothing: share of the target mass spread over the vocabulary (Szegedy et al. 2016).
    """
    scores = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
    expected = scores.gather(-1, targets)
    norms = logits.gather(-1, targets) - expected
    losses = (smoothing - 1) * expected
    if smoothing:
        losses = losses - smoothing * scores.mean(dim=-1, keepdim=True)
    return losses.squeeze(-1), norms.squeeze(-1)


def row_slopes(
    logits: Tensor, targets: Tensor, norms: Tensor, weights: Tensor, smoothing: float, slopes: Tensor
) -> None:
    """Write the gradient of the sum of losses, each times its weight, into ``slopes`` [rows, vocabulary].

    Args:
        logits, targets, smoothing: as for :func:`row_losses`, which gives ``norms``.
        weights: fp32 [rows, 1].
    """
    shares = (logits - norms[:, None]).exp_()
    if torch.compiler.is_compiling():  # fused with all the rest, unlike a scatter
        columns = torch.arange(logits.shape[-1], device=logits.device)
        shares = torch.where(columns == targets, shares + (smoothing - 1), shares)
    else:
        shares.scatter_add_(-1, targets, shares.new_full((len(shares), 1), smoothing - 1))
    torch.addcmul(weights * (-smoothing / logits.shape[-1]), shares, weights, out=slopes)


class RowFunctions(NamedTuple):
    """What computes :func:`row_losses` and :func:`row_slopes`: these themselves, or compiled."""

    losses: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = row_losses
    slopes: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor], None] = row_slopes


AS_WRITTEN = RowFunctions()


def token_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    scores_at_once: int | None = None,
    rows: RowFunctions = AS_WRITTEN,
) -> Tensor:
    """Summed negative log-likelihood of the labels, in nats.

    Computed in fp32, a few rows at a time: the scores of a vocabulary are the largest tensors of a step, and fp32
    copies of all of them would be several times as large.

    Args:
        logits: [..., tokens, vocabulary].
        labels: [..., tokens], -100 where nothing counts.
        label_smoothing: share of the target mass spread over the vocabulary.
        scores_at_once: how many scores are computed in fp32 at once; None = as suits the device.
        rows: computes them.
    """
    at_once = scores_at_once or (GPU_SCORES if logits.is_cuda else CPU_SCORES)
    return _TokenLoss.apply(logits.flatten(0, -2), labels.flatten(), label_smoothing, at_once, rows)


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy that saves the logits and one number per row, and computes the gradient from them."""

    @staticmethod
    def forward(
        context: Any, logits: Tensor, labels: Tensor, smoothing: float, at_once: int, functions: RowFunctions
    ) -> Tensor:
        counts = labels != IGNORED_LABEL
        targets = labels.where(counts, 0)[:, None]
        found = [functions.losses(logits[rows], targets[rows], smoothing) for rows in _chunks(logits, at_once)]
        losses, norms = (torch.cat(parts) if len(found) != 1 else parts[0] for parts in zip(*found, strict=True))
        context.save_for_backward(logits, counts, targets, norms)
        context.smoothing, context.at_once, context.functions = smoothing, at_once, functions
        return losses.where(counts, 0.0).sum()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, counts, targets, norms = context.saved_tensors
        slopes = torch.empty_like(logits)
        weights = (gradient * counts)[:, None]
        for rows in _chunks(logits, context.at_once):
            context.functions.slopes(
                logits[rows], targets[rows], norms[rows], weights[rows], context.smoothing, slopes[rows]
            )
        return slopes, None, None, None, None


def _chunks(logits: Tensor, at_once: int) -> Iterator[slice]:
    """Rows that together have so many scores."""
    rows = max(1, at_once // logits.shape[-1])
    for start in range(0, max(1, len(logits)), rows):
        yield slice(start, start + rows)


def translation_losses(
    model: Any,
    poses: Tensor,
    visible: Tensor,
    frame_mask: Tensor,
    labels: Tensor,
    labelled: Tensor,
    special_ids: Tensor,
    *,
    prefix_ids: Tensor | None = None,
    video_features: Tensor | None = None,
    gloss_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    scores_at_once: int | None = None,
    rows: RowFunctions = AS_WRITTEN,
) -> tuple[Tensor, Tensor]:
    """Summed token loss and CTC loss of a micro-batch, in nats; the second is 0 without a CTC head.

    Args:
        model: a translator, or the engine around one.
        poses, visible, frame_mask, labels, labelled, prefix_ids, video_features: of the micro-batch.
        gloss_labels: of the micro-batch; CTC reads them where there are some, else the labels.
        special_ids: as for :func:`ctc_loss`.
        label_smoothing, scores_at_once, rows: as for :func:`token_loss`.
    """
    output = model(
        poses=poses,
        visible=visible,
        frame_mask=frame_mask,
        labels=labels,
        labelled=labelled,
        prefix_ids=prefix_ids,
        **({} if video_features is None else {"video_features": video_features}),
    )
    targets = labels.flatten().index_select(0, labelled)
    nll = token_loss(output.logits, targets, label_smoothing, scores_at_once, rows)
    if output.ctc_logits is None:
        return nll, torch.zeros_like(nll)
    if gloss_labels is None:
        return nll, ctc_loss(output.ctc_logits, output.encoder_mask, labels, special_ids)
    return nll, ctc_loss(output.ctc_logits, output.encoder_mask, gloss_labels, special_ids[:0])


def batch_losses(
    model: Any, batch: Batch, special_ids: Tensor, *, label_smoothing: float = 0.0, rows: RowFunctions = AS_WRITTEN
) -> tuple[Tensor, Tensor]:
    """As :func:`translation_losses`, of a batch on the model's device."""
    return translation_losses(
        model,
        **batch.inputs,
        labels=batch.labels,
        labelled=batch.labelled,
        special_ids=special_ids,
        gloss_labels=batch.gloss_labels,
        label_smoothing=label_smoothing,
        rows=rows,
    )


def ctc_loss(logits: Tensor, encoder_mask: Tensor, labels: Tensor, special_ids: Tensor) -> Tensor:
    """Summed CTC loss (Graves et al. 2006) of the labels without their special tokens, in nats.

    A clip without labels (a filler) and a clip whose encoder sequence is too short for its text count 0.

    Args:
        logits: [clips, positions, vocabulary + 1]; the last one is the blank.
        encoder_mask: bool [clips, positions].
        labels: [clips, tokens or glosses], -100 where nothing counts.
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
