"""Where a rehearsal on a GPU starts: the largest size that the plan says to fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from huggingface_hub import constants

from toolkit.fitting.hardware import GIB
from toolkit.fitting.planned_size import planned_size, room_for_activations
from toolkit.fitting.shapes import Lengths, sizes
from toolkit.recipe.resolve import ResolvedRun, resolve_named


def test_more_room_holds_more_clips() -> None:
    run = resolve_named(
        "t5_small",
        ["model.from_scratch=true", "training.micro_batch_size=auto", "training.global_batch_size=512"],
        1,
        has_gpu=True,
        needs_data=False,
    )
    lengths = Lengths(512, 300, 90, ["word " * 40], ["word"])
    found = [planned_size(run, lengths, sizes(512), int(room * GIB)) for room in (0.1, 3.0, 6.0, 200.0)]
    assert found[0] == 1, "a rehearsal decides where the plan finds none to fit"
    assert 1 < found[1] < found[2] < 512
    assert found[3] == 512


def test_room_for_activations_is_said_where_they_are_recomputed() -> None:
    lengths = Lengths(128, 300, 90, ["word " * 20], ["word"])

    def found(recomputes: str, gib: float) -> str | None:
        setting = f"training.gradient_checkpointing={recomputes}"
        run = resolve_named("t5_large", ["model.from_scratch=true", setting], 1, has_gpu=True, needs_data=False)
        return room_for_activations(run, lengths, 128, int(gib * GIB))

    assert found("false", 140) is None and found("true", 14) is None, "neither has anything to gain"
    whole, less = found("true", 140), found("true", 40)
    assert whole and "training.gradient_checkpointing=false" in whole and "of 128:" in whole
    assert less and ("of 64:" in less or "of 32:" in less)


def test_a_model_that_cannot_be_planned_starts_with_the_largest(
    resolve: Callable[..., ResolvedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a hub that cannot be reached is asked again and again
    run = resolve("training.micro_batch_size=auto", "model.backbone=nobody/nothing", "model.from_scratch=true")
    assert planned_size(run, Lengths(4, 30, 20, ["a"], ["a"]), sizes(4), 80 * GIB) == 4
