"""Where a rehearsal on a GPU starts where there is no plan, and what a run might gain by keeping its activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from huggingface_hub import constants

from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.fitting.hardware import GIB
from toolkit.fitting.planned_size import planned_candidates, room_for_activations
from toolkit.planning.sizes.shapes import Lengths, Limits
from toolkit.recipe.resolve import ResolvedRun, resolve_named


def test_room_for_activations_is_said_where_they_are_recomputed() -> None:
    lengths = Lengths(128, 300, 90, ["word " * 20], ["word"])

    def found(recomputes: str, gib: float) -> str | None:
        setting = f"training.gradient_checkpointing={recomputes}"
        run = resolve_named("t5_large", ["model.from_scratch=true", setting], 1, has_gpu=True, needs_data=False)
        return room_for_activations(run, lengths, Limits(128, None), int(gib * GIB))

    assert found("false", 140) is None and found("true", 14) is None, "neither has anything to gain"
    whole, less = found("true", 140), found("true", 40)
    assert whole and "training.gradient_checkpointing=false" in whole and "of 128:" in whole
    assert less and ("of 64:" in less or "of 32:" in less)


def test_a_model_that_cannot_be_planned_starts_with_the_largest(
    resolve: Callable[..., ResolvedRun], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a hub that cannot be reached is asked again and again
    run = resolve("training.micro_batch_size=auto", "model.backbone=nobody/nothing", "model.from_scratch=true")
    lengths = Lengths(4, 30, 20, ["a"], ["a"])
    found = planned_candidates(run, Ranks(), lengths, corpus.splits["train"], 80 * GIB)
    assert [(one.size, one.seconds) for one in found] == [(size, None) for size in (4, 2, 1)]
