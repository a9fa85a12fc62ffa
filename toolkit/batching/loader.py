"""The stream of batches of one rank: worker processes read the memory map, augment and collate ahead of the model.

Nothing here depends on the number of workers: the order is fixed before they start, and whatever is random about a clip
follows from the seed, the epoch and the clip alone.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from toolkit.batching.collate import Batch, collate
from toolkit.batching.order import (
    Indices,
    epoch_order,
    evaluation_order,
    micro_batches,
    micro_batches_by_frames,
    share_of_rank,
)
from toolkit.poses.augmentation import augment, draw_lengths, is_off

if TYPE_CHECKING:
    from toolkit.corpus.packed import Split
    from toolkit.poses.landmarks import LandmarkSet
    from toolkit.recipe.resolve import ResolvedRun
    from toolkit.recipe.schema import Recipe

# Batches that each worker keeps ready: enough to ride out a slow read, few enough to bound memory.
PREFETCHED_BATCHES = 4
MAX_REFERENCE_TOKENS = 512


def train_batches(
    split: Split,
    tokenizer: Any,
    resolved: ResolvedRun,
    *,
    landmark_set: LandmarkSet,
    epoch: int,
    start_step: int = 0,
    rank: int = 0,
) -> Iterator[list[Batch]]:
    """One rank's share of an epoch, from ``start_step`` to its end.

    Targets are cut to ``training.max_target_tokens``; ``collate.find_cut_texts`` says how many that are.

    Args:
        split: the training split.
        tokenizer: a HuggingFace tokenizer.
        resolved: batch arithmetic, seed, augmentation and number of workers.
        landmark_set: the corpus's landmarks; augmentation needs to know hands and mirror images.
        epoch: which epoch, from 0.
        start_step: optimizer steps of this epoch that are done already.
        rank: which of ``resolved.world_size`` ranks this is.

    Yields:
        for each optimizer step a list of batches: as many as its clips need under the limits of the recipe, on every
        rank the same number.
    """
    recipe = resolved.recipe
    training = recipe.training
    augmenter = None if is_off(recipe.augmentation) else Augmenter(split.frames, recipe, landmark_set, epoch)
    # Clips meet others that are as long as they are once augmented: a changed speed costs no padding.
    frames = augmenter.lengths[:, 1] if augmenter else split.frames
    order = epoch_order(frames, training.global_batch_size, training.seed, epoch)[start_step:]

    def cut(clips: Indices) -> list[Indices]:
        world_size, size, budget = resolved.world_size, training.micro_batch_size, training.micro_batch_frames
        if budget is None:
            return micro_batches(clips, rank, world_size, size)
        return micro_batches_by_frames(clips, frames, rank, world_size, size, budget)

    # The loader runs ahead of the steps, so each follows the cuts at its own pace.
    cuts, cuts_ahead = itertools.tee(map(cut, order))
    shares = itertools.chain.from_iterable(cuts_ahead)
    batches = _load(split, tokenizer, shares, training.max_target_tokens, training.workers, augmenter)
    for step in cuts:
        yield [next(batches) for _ in step]


def evaluation_batches(
    split: Split,
    tokenizer: Any,
    batch_frames: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    max_target_tokens: int = MAX_REFERENCE_TOKENS,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every clip of a split exactly once over all ranks, longest first, nothing augmented.

    The batches are the same for every number of ranks, which deal them out among themselves; every rank gets the same
    number of batches, the last of which may be one filler.

    Args:
        split: any split.
        tokenizer: a HuggingFace tokenizer.
        batch_frames: largest number of padded frames in a batch (a longer clip comes alone).
        rank, world_size: which of how many ranks this is.
        max_target_tokens: longer references are cut in ``labels``; ``texts`` keeps them whole.
        workers: loader processes; 0 loads in this one.
    """
    shares = share_of_rank(evaluation_order(split.frames, batch_frames), rank, world_size)
    yield from _load(split, tokenizer, shares, max_target_tokens, workers, None)


class Augmenter:
    """Augments a batch such that what happens to a clip follows from (seed, epoch, clip), whichever batch it is in."""

    def __init__(self, frames: NDArray[np.integer], recipe: Recipe, landmark_set: LandmarkSet, epoch: int) -> None:
        self.settings = recipe.augmentation
        self.landmark_set = landmark_set
        self.key = (recipe.training.seed, epoch)
        # Streams of their own: the order of the epoch draws from (seed, epoch), clips from (seed, epoch, 2, clip).
        rng = np.random.default_rng((*self.key, 1))
        self.lengths = draw_lengths(frames, self.settings, rng, max_frames=recipe.data.max_frames)

    def __call__(self, batch: Batch) -> Batch:
        generators = [np.random.default_rng((*self.key, 2, clip)) for clip in batch.clips.tolist()]
        batch.poses, batch.visible, batch.frame_mask = augment(
            batch.poses,
            batch.visible,
            batch.frame_mask,
            self.settings,
            self.landmark_set,
            self.lengths[batch.clips.numpy()],
            generators,
        )
        batch.num_frames = int(batch.frame_mask[~batch.is_filler].sum())
        return batch


class _Batches(Dataset[Batch]):
    """Maps the indices of a micro-batch to the batch; this is what runs in the worker processes."""

    def __init__(self, split: Split, tokenizer: Any, max_target_tokens: int, augmenter: Augmenter | None) -> None:
        self.split = split
        self.tokenizer = tokenizer
        self.max_target_tokens = max_target_tokens
        self.augmenter = augmenter

    def __getitem__(self, indices: Indices) -> Batch:
        clips = [self.split.clip(i if i >= 0 else ~i) for i in indices.tolist()]
        batch = collate(clips, indices.tolist(), self.tokenizer, max_target_tokens=self.max_target_tokens)
        return self.augmenter(batch) if self.augmenter else batch


def _load(
    split: Split,
    tokenizer: Any,
    shares: Iterable[Indices],
    max_target_tokens: int,
    workers: int,
    augmenter: Augmenter | None,
) -> Iterator[Batch]:
    # Forked workers tokenise small batches, each alone; threads gain nothing there, and without a word from us the
    # tokenizers library prints a warning for every worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader: DataLoader[Batch] = DataLoader(
        _Batches(split, tokenizer, max_target_tokens, augmenter),
        batch_size=None,
        sampler=shares,
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
        # By default every new iterator draws from the global generator, and a resumed run, which makes one in the
        # middle of an epoch, would drop out other units than the run that it continues.
        generator=torch.Generator(),
    )
    return iter(loader)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A request to stop often goes to all processes of a job, but only the main one decides what it means: it saves,
    # then closes the workers.
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent and parent.pid
    threading.Thread(target=_end_with_the_parent, args=[parent.pid], daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    """End when the parent is dead, or says so by SIGTERM, by which Python ends the workers of an epoch left half-way.

    torch's workers see by themselves that the parent died, but then wait for somebody to read what they have prepared.
    """
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, 2.0)
        if told and told.si_pid == parent:
            break
    os._exit(0)
