"""Translate a whole split over all ranks: every clip once, the encoder once per clip, long clips first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from toolkit.batching.loader import evaluation_batches
from toolkit.corpus.packed import Split
from toolkit.evaluation.predictions import Prediction, make_predictions
from toolkit.models.translator import PoseTranslator


def translate_split(
    model: PoseTranslator,
    split: Split,
    processor: Any,
    *,
    batch_frames: int,
    rank: int = 0,
    world_size: int = 1,
    synced: bool = False,
    on_batch: Callable[[int], None] | None = None,
    **settings: Any,
) -> list[Prediction]:
    """Translate every clip of ``split`` by beam search.

    Args:
        model: in evaluation mode; it says itself how to search (its generation configuration).
        split: the clips.
        processor: gives the tokenizer.
        batch_frames: largest number of padded frames in a batch.
        rank, world_size: which of how many ranks this is; all must call.
        synced: whether ranks must step together (ZeRO stage 3, where every step gathers weights from all ranks).
        on_batch: called with the number of clips that this rank has translated so far.
        settings: override the model's own generation settings.

    Returns:
        predictions in the order of the split, on every rank.
    """
    device = next(model.parameters()).device
    rows: list[tuple[int, str, float | None]] = []
    for batch in evaluation_batches(split, processor.tokenizer, batch_frames, rank=rank, world_size=world_size):
        batch = batch.to(device)
        found = model.generate(
            batch.poses,
            batch.visible,
            batch.frame_mask,
            synced_gpus=synced,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        texts = processor.batch_decode(found.sequences)
        # Greedy search has no sequence scores.
        scores = getattr(found, "sequences_scores", None)
        values = scores.float().tolist() if scores is not None else [None] * len(texts)
        for clip, text, value, is_filler in zip(
            batch.clips.tolist(), texts, values, batch.is_filler.tolist(), strict=True
        ):
            if not is_filler:
                rows.append((clip, text.strip(), value))
        if on_batch:
            on_batch(len(rows))
    rows = _gather(rows, world_size)
    clips = [clip for clip, _, _ in rows]
    if clips != list(range(len(split))):
        raise AssertionError(f"translated clips {len(clips)} of {len(split)}: each must come exactly once")
    return make_predictions(
        list(split.uids), list(split.texts), [text for _, text, _ in rows], [value for _, _, value in rows]
    )


def _gather(rows: list[tuple[int, str, float | None]], world_size: int) -> list[tuple[int, str, float | None]]:
    """All ranks' rows, sorted by clip."""
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    return sorted(rows)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` drops nothing out and keeps no gradients; afterwards it is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
