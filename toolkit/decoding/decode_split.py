"""Translate a whole split over all ranks: every clip once, the encoder once per clip, long clips first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from toolkit.batching.collate import Batch
from toolkit.batching.ladder import fitted_rungs
from toolkit.batching.languages import language_tokens
from toolkit.batching.loader import evaluation_batches
from toolkit.corpus.packed import Split
from toolkit.decoding.search import Hypothesis, search
from toolkit.decoding.step_graphs import StepGraphs, graphs_of_search
from toolkit.decoding.within_memory import SearchWithinMemory
from toolkit.models.translator import PoseTranslator
from toolkit.scoring.predictions import Prediction, make_predictions


def translate_split(model: PoseTranslator, split: Split, processor: Any, **settings: Any) -> list[Prediction]:
    """Translate every clip of ``split``; the arguments are those of :func:`find_hypotheses`.

    Returns:
        predictions in the order of the split, on every rank.
    """
    return best_predictions(split, find_hypotheses(model, split, processor, **settings))


def best_predictions(split: Split, found: list[list[Hypothesis]]) -> list[Prediction]:
    """The best hypothesis of each clip beside its reference."""
    texts, scores = [row[0].text for row in found], [row[0].score for row in found]
    return make_predictions(list(split.uids), list(split.texts), texts, scores)


def find_hypotheses(
    model: PoseTranslator,
    split: Split,
    processor: Any,
    *,
    batch_frames: int,
    rank: int = 0,
    world_size: int = 1,
    synced: bool = False,
    on_batch: Callable[[int], None] | None = None,
    n_best: int = 1,
    few_shapes: bool | None = None,
    graphs: bool = True,
    **settings: Any,
) -> list[list[Hypothesis]]:
    """Find the best texts for every clip of ``split``.

    Args:
        model: in evaluation mode; its generation configuration says how to search.
        split: the clips.
        processor: gives the tokenizer.
        batch_frames: largest number of padded frames in a batch.
        rank, world_size: which of how many ranks, or groups of them that hold one model, this is; all must call.
        synced: whether ranks must step together (ZeRO stage 3, where every step gathers weights from all ranks).
        on_batch: called with the number of clips that this rank has translated so far.
        n_best: hypotheses for each clip, at most as many as there are beams.
        few_shapes: whether batches are padded to a ladder of few lengths; None = on GPUs.
        graphs: whether the steps of the search are CUDA graphs, where ranks on GPUs need not step together.
        settings: override the model's own generation settings.

    Returns:
        for each clip, in the order of the split, its hypotheses, best first; on every rank.
    """
    device = next(model.parameters()).device
    rows: list[tuple[int, list[Hypothesis]]] = []
    tokenizer, config = processor.tokenizer, model.config
    on_ladder = device.type == "cuda" if few_shapes is None else few_shapes
    rungs = fitted_rungs(split.frames, model.pose_encoder.frames_per_position) if on_ladder else ()
    batches = evaluation_batches(
        split,
        tokenizer,
        batch_frames,
        rungs,
        rank=rank,
        world_size=world_size,
        prefix=config.prefix_template,
        max_prefix_tokens=config.max_prefix_tokens,
    )

    def search_in(batch: Batch, steps: StepGraphs | None) -> list[list[Hypothesis]]:
        first_tokens = language_tokens(tokenizer, batch.target_languages)
        return search(
            model,
            processor,
            **batch.inputs,
            first_tokens=None if first_tokens is None else torch.tensor(first_tokens, device=device),
            n_best=n_best,
            synced=synced,
            graphs=steps,
            **settings,
        )

    within = SearchWithinMemory(search_in, Batch.halves, graphs_of_search(model, wanted=graphs and not synced))
    is_alone = not synced and (not dist.is_initialized() or dist.get_world_size() == world_size)
    for batch in batches:
        batch = batch.to(device)
        found = within.find(batch) if is_alone else search_in(batch, within.graphs)
        clips = zip(batch.clips.tolist(), found, batch.is_filler.tolist(), strict=True)
        rows += [(clip, hypotheses) for clip, hypotheses, is_filler in clips if not is_filler]
        if on_batch:
            on_batch(len(rows))
    rows = _gather(rows, world_size)
    if [clip for clip, _ in rows] != list(range(len(split))):
        raise AssertionError(f"translated clips {len(rows)} of {len(split)}: each must come exactly once")
    return [hypotheses for _, hypotheses in rows]


def _gather(rows: list[tuple[int, list[Hypothesis]]], world_size: int) -> list[tuple[int, list[Hypothesis]]]:
    """All ranks' rows, sorted by clip."""
    if world_size > 1:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        copies = len(parts) // world_size  # consecutive ranks that hold one model together translate the same clips
        rows = [row for part in parts[::copies] for row in part]
    return sorted(rows, key=lambda row: row[0])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` runs without dropout and gradients; its mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
