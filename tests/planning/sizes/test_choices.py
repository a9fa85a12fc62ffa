"""Which micro-batches a plan says to be the fastest of those that fit, on corpora with clips as long as iSign's."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Part
from toolkit.fitting.planned_size import planned_candidates
from toolkit.planning.comparison import compare
from toolkit.planning.hardware import GIB, Hardware
from toolkit.planning.sizes.choices import AS_FAST, Candidate, fastest, reason
from toolkit.planning.sizes.first_epoch import FirstEpoch
from toolkit.planning.sizes.pass_cost import PassCost
from toolkit.planning.sizes.shapes import Limits, lengths_of
from toolkit.planning.subject import Subject
from toolkit.planning.table import as_dict, as_text
from toolkit.planning.workload import Workload
from toolkit.recipe.resolve import ResolvedRun, resolve_named

SCRATCH = ("model.from_scratch=true", "model.tokenizer=train", "data.corpus=not-read")
KEPT = "training.gradient_checkpointing=false"
LARGE = int(75 * GIB)


class Clips:
    """Lengths and texts of a training split: log-normal as in benchmarks/training_corpus.py, and no poses."""

    def __init__(self, count: int) -> None:
        draw = np.random.default_rng(0)
        self.frames = draw.lognormal(np.log(90), 0.6, count).clip(16, 300).astype(np.int32)
        self.texts = ["w" * size for size in draw.normal(40, 20, count).clip(4, 110).astype(int)]
        self.parts = (Part("corpus", range(count)),)

    def __len__(self) -> int:
        return len(self.frames)


@cache
def clips(count: int) -> Any:
    return Clips(count)


def resolved(recipe: str, *settings: str, ds: str = "zero1", ranks: int = 1) -> ResolvedRun:
    return resolve_named(recipe, [*SCRATCH, *settings], ranks, has_gpu=True, ds=ds)


@cache
def candidates(recipe: str, count: int, *settings: str, ranks: int = 1, room: int = LARGE) -> list[Candidate]:
    run, split = resolved(recipe, *settings, ranks=ranks), clips(count)
    of = Ranks(world_size=ranks, local_world_size=ranks)
    return planned_candidates(run, of, lengths_of(run, split), split, room)


def test_a_large_model_takes_two_passes_of_a_few_clips_that_pad_much_in_one() -> None:
    found = candidates("t5_large", 2048, KEPT)
    chosen, largest = fastest(found), found[0]
    assert (chosen.size, largest.size) == (64, 128)
    padded = [FirstEpoch(resolved("t5_large", KEPT), clips(2048)).padded_frames(one.limits).sum() for one in found]
    assert padded[found.index(chosen)] < 0.97 * padded[0]
    assert chosen.seconds and largest.seconds and chosen.seconds < largest.seconds / AS_FAST
    assert "less time" in reason(chosen, found) and "largest" in reason(largest, found)


def test_a_corpus_whose_batches_pad_little_takes_the_largest_or_is_within_a_per_cent() -> None:
    found = candidates("t5_large", 100_000, KEPT)
    chosen, best = fastest(found), min(one.seconds or 0.0 for one in found)
    assert chosen == found[0] and chosen.size == 128
    assert chosen.seconds and chosen.seconds <= AS_FAST * best


@pytest.mark.parametrize("count", [2048, 100_000])
def test_a_small_model_that_waits_for_launches_takes_the_largest(count: int) -> None:
    found = candidates("t5_small", count)
    assert fastest(found) == found[0] and found[0].limits == Limits(128, None)


def test_graphs_launch_nothing_and_so_a_small_model_may_pad_less() -> None:
    found = candidates("t5_small", 2048, "training.compile=graphs")
    written = candidates("t5_small", 2048)
    smallest = [one.seconds or 0.0 for one in (found[-1], written[-1])]
    assert fastest(found).size < 128 and smallest[0] < 0.2 * smallest[1]


def test_only_what_fits_is_a_candidate() -> None:
    most = [one.size for one in candidates("t5_large", 2048, KEPT, room=20 * GIB)]
    assert 1 <= max(most) < 64 and set(most) == {size for size in most if size <= max(most)}
    one, two = (candidates("t5_large", 2048, KEPT, room=room * GIB) for room in (1, 75))
    assert [len(one), one[0].size, one[0].seconds] == [1, 1, None], "a rehearsal decides where the plan finds none"
    assert {item.limits for item in candidates("t5_large", 2048, KEPT, room=20 * GIB)} < {item.limits for item in two}


def test_the_larger_of_equally_fast_ones_is_taken() -> None:
    large, middle, small = (
        Candidate(size, Limits(size, None), seconds) for size, seconds in ((4, 1.0), (2, 0.995), (1, 0.9))
    )
    assert fastest([large, middle]) == large
    assert fastest([large, middle, small]) == small
    assert fastest([Candidate(4, Limits(4, None)), Candidate(2, Limits(2, None))]).size == 4, "of unknown speed"


def test_activations_are_recomputed_where_that_makes_steps_faster() -> None:
    auto = "training.gradient_checkpointing=auto"
    roomy, tight = candidates("t5_large", 2048, auto), candidates("t5_large", 2048, auto, room=16 * GIB)
    assert not fastest(roomy).recomputes and {one.recomputes for one in roomy} == {False, True}
    chosen = fastest(tight)
    kept = [one for one in tight if not one.recomputes]
    assert chosen.recomputes and kept, "few clips fit with activations that are kept, and launches take longer"
    assert chosen.seconds and chosen.seconds < min(one.seconds or 0.0 for one in kept) / AS_FAST
    assert chosen.size > max(one.size for one in kept) and "with activations that are kept" in reason(chosen, tight)
    graphs = candidates("t5_large", 2048, auto, "training.compile=graphs")
    assert not any(one.recomputes for one in graphs)


def test_a_pass_costs_what_a_trace_of_it_counts() -> None:
    for recipe, settings in (("t5_base", ()), ("qwen2_5_7b_qlora", ())):
        run = resolved(recipe, *settings, ds="zero2")
        subject = Subject.of(run.recipe)
        cost = PassCost.of(subject, run.deepspeed, (1, 288, 128), False)
        for passes in ((8, 288, 128), (8, 144, 32), (32, 96, 48), (8, 48, 24)):
            traced, found = subject.traced(*passes, run.deepspeed, False), cost.trace(passes)
            assert found.flops == pytest.approx(traced.flops, rel=0.03)
            assert found.kernels == pytest.approx(traced.kernels, rel=0.03)


def test_a_plan_of_a_corpus_says_what_a_run_chooses() -> None:
    run, split, hardware = resolved("t5_large", KEPT), clips(2048), Hardware(1, LARGE)
    lengths = lengths_of(run, split)
    tokens = lengths.most_tokens(run.recipe)
    workload = Workload(lengths.longest, tokens, lengths.longest, ((28, 288),), 16, "2,048 clips", split=split)
    subject = Subject.of(run.recipe)
    words = ["t5_large", *SCRATCH]
    row = compare(subject, {"zero1": run}, hardware, workload, "zero1").rows[0]
    chosen = fastest(candidates("t5_large", 2048, KEPT))
    assert row.choice == chosen and row.seconds == chosen.seconds and row.clips == 64 and row.max_micro_batch == 128
    comparison = compare(subject, {"zero1": run}, hardware, workload, "zero1")
    assert chosen.limits.in_words() in as_text(comparison, subject, hardware, workload, words)
    listed = as_dict(comparison, run.recipe, hardware, workload, words)["jsons"][0]
    assert listed["chosen"] == {"clips": chosen.limits.clips, "frames": chosen.limits.frames}
    number = resolved("t5_large", KEPT, "training.micro_batch_size=16")
    assert compare(subject, {"zero1": number}, hardware, workload, "zero1").rows[0].choice is None
