"""The heaviest batches of a run: from its corpus where it is prepared, else from the recipe's maxima."""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolkit.batching.epochs import mixture_of
from toolkit.batching.ladder import fitted_rungs, training_ladder
from toolkit.batching.lengths import rung_above, text_sizes
from toolkit.batching.order import evaluation_shapes, steps_per_epoch
from toolkit.batching.planned import PlannedEpoch
from toolkit.corpus.mixture.opening import open_prepared
from toolkit.corpus.packed import Corpus, Split
from toolkit.errors import UserError
from toolkit.recipe import batches
from toolkit.recipe.batches import clip_limit, most_batch_frames
from toolkit.recipe.resolve import padding_of
from toolkit.recipe.schema import Recipe

Passes = tuple[int, int, int]  # clips, padded frames and padded tokens of a micro-batch


@dataclass(frozen=True)
class Workload:
    """What a plan needs to know of the clips.

    Attributes:
        frames: to which the longest clip in training is padded, after augmentation.
        tokens: of the longest target, padded.
        later_frames: the same in the second micro-batch of a step.
        evaluated: clips and padded frames of generation batches, the largest ones.
        steps_per_epoch: optimizer steps; None without a corpus.
        source: where the figures come from, in words.
        shapes: all different micro-batches of a rank; None = too many to name.
        first_shapes, later_shapes: micro-batches of which one is the heaviest, the first of a step and the others;
            where there are none, each has its most frames and tokens.
        split: that the run trains on; None without a corpus.
    """

    frames: int
    tokens: int
    later_frames: int
    evaluated: tuple[tuple[int, int], ...]
    steps_per_epoch: int | None
    source: str
    shapes: tuple[Passes, ...] | None = None
    first_shapes: tuple[Passes, ...] = ()
    later_shapes: tuple[Passes, ...] = ()
    split: Split | None = None


def workload_of(recipe: Recipe, world_size: int) -> Workload:
    """From the recipe's prepared corpus, else from its maxima; ``source`` says which."""
    if recipe.data.corpus or recipe.data.corpora:
        try:
            if corpus := open_prepared(recipe.data):
                return from_corpus(recipe, corpus, world_size)
        except (UserError, KeyError) as error:
            reason = error.message if isinstance(error, UserError) else "it has no training split"
            assumed = from_maxima(recipe)
            return replace(assumed, source=f"{reason}; assumed instead: {assumed.source}")
    return from_maxima(recipe)


def from_maxima(recipe: Recipe) -> Workload:
    """A recipe without its corpus: every clip and every text as long as the recipe allows."""
    frames, tokens = recipe.data.max_frames, recipe.training.max_target_tokens
    clips = max(1, most_batch_frames(recipe.evaluation) // frames)
    source = f"the recipe's maxima, {frames} frames and {tokens} tokens in every clip (data.corpus names no corpus)"
    return Workload(frames, tokens, frames, ((clips, frames),), None, source)


def from_corpus(recipe: Recipe, corpus: Corpus, world_size: int, epochs: int = 2) -> Workload:
    """The heaviest micro-batches of the first epochs, in the order that the loader will take.

    Texts count as one token for each byte, at most ``training.max_target_tokens``: no tokenizer is loaded.
    """
    training, split = recipe.training, corpus.splits["train"]
    mixture, ladder = mixture_of(split, recipe), None
    if padding_of(training, has_gpu=True) == "ladder":  # a plan is for GPUs
        ladder = training_ladder(split.frames, recipe, mixture.typical_clips())
    longest, later, texts = 1, 1, text_sizes(split.texts, recipe)
    for epoch in range(epochs):
        planned = PlannedEpoch.of(split.frames, texts, mixture, recipe, ladder, epoch)
        for step in range(len(planned.order)):
            padded = [frames for _, frames in planned.shapes(step, 0, world_size, clip_limit(training), None)]
            longest, later = max(longest, padded[0]), max([later, *padded[1:2]])
    if mixture.epoch_clips < len(split) or len(mixture.parts) > 1:  # the longest clip may come in a later epoch
        longest = max(longest, rung_above(ladder.frames if ladder else (), int(split.frames.max())))
    tokens = min(training.max_target_tokens, 1 + max(len(text.encode()) for text in split.texts))
    held_out = next(
        (corpus.splits[name] for name in ("dev", "test", "train") if len(corpus.splits.get(name, ()))), split
    )
    rungs = fitted_rungs(held_out.frames, recipe.model.pose_encoder.frames_per_position)
    evaluated = sorted(evaluation_shapes(held_out.frames, most_batch_frames(recipe.evaluation), rungs))
    return Workload(
        longest,
        rung_above(ladder.tokens, tokens) if ladder else tokens,
        later,
        tuple({evaluated[0], evaluated[-1]}),
        steps_per_epoch(mixture.epoch_clips, training.global_batch_size),
        f"corpus {corpus.path}: {len(split):,} clips, at most {longest} frames{' with padding' if ladder else ''}",
        split=split,
    )


def with_smaller_evaluation(workload: Workload) -> Workload | None:
    """The workload with generation batches of half as many clips; None where they have one."""
    if all(clips == 1 for clips, _ in workload.evaluated):
        return None
    return replace(workload, evaluated=tuple((max(1, clips // 2), frames) for clips, frames in workload.evaluated))


def total_steps(recipe: Recipe, workload: Workload) -> int | None:
    """Optimizer steps of the run, where its corpus or ``training.max_steps`` says them."""
    if workload.steps_per_epoch is None:
        return recipe.training.max_steps
    return batches.total_steps(recipe.training, workload.steps_per_epoch)
