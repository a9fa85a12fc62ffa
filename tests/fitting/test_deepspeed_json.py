"""``--ds auto``: what the plan recommends for the hardware that is there, and what a run keeps."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from toolkit.cluster.ranks import Ranks
from toolkit.errors import UserError
from toolkit.fitting import deepspeed_json
from toolkit.fitting.deepspeed_json import choose_json, fit_deepspeed
from toolkit.fitting.hardware import GIB, Card
from toolkit.planning.subject import Subject
from toolkit.recipe.resolve import resolve_named
from toolkit.recipe.schema import Recipe

SCRATCH = ["model.from_scratch=true"]
RANKS = Ranks(world_size=2, local_world_size=2)


def chosen(gib: float | None, *overrides: str, recipe: str = "t5_small", resumes: bool = True) -> tuple[str, str]:
    memory = None if gib is None else int(gib * GIB)
    return choose_json(recipe, [*SCRATCH, *overrides], RANKS, memory, 64 * GIB, resumes=resumes)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of one recipe share its traced passes."""

    class Shared:
        @staticmethod
        @cache
        def _of(text: str) -> Subject:
            return Subject.of(Recipe.model_validate_json(text))

        @staticmethod
        def of(recipe: Recipe) -> Subject:
            return Shared._of(recipe.model_dump_json())

    monkeypatch.setattr(deepspeed_json, "Subject", Shared)


def test_a_card_with_much_memory_gets_another_json_than_a_small_one() -> None:
    large, reason = chosen(80.0, recipe="t5_large")
    small, _ = chosen(9.0, "training.micro_batch_size=auto", recipe="t5_large")
    assert "2 GPUs of 80 GiB" in reason
    assert large != small
    assert small.startswith(("zero2", "zero3"))


def test_a_number_of_clips_must_fit() -> None:
    name, _ = chosen(6.0)
    with pytest.raises(UserError, match="micro-batches of 64 clips") as caught:
        chosen(2.0, "training.micro_batch_size=64", "training.global_batch_size=128")
    assert "training.micro_batch_size=auto" in caught.value.hint
    assert name


def test_a_card_that_is_too_small_is_an_error_with_advice() -> None:
    with pytest.raises(UserError, match="--ds auto") as caught:
        chosen(0.6)
    assert "lacks" in caught.value.message
    assert "larger" in caught.value.hint, "its context alone takes more, whatever the recipe says"


def test_a_run_that_resumes_keeps_its_json(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    overrides = [*SCRATCH, f"run.dir={run_dir}"]
    resolve_named("t5_small", overrides, 2, has_gpu=True, ds="zero3_offload", needs_data=False).save(run_dir)
    assert chosen(80.0, f"run.dir={run_dir}")[0] == "zero3_offload"
    assert chosen(80.0, f"run.dir={run_dir}", resumes=False)[0] != "zero3_offload"


def test_without_a_gpu_it_is_the_recipes_own() -> None:
    name, reason = chosen(None)
    assert name == resolve_named("t5_small", SCRATCH, 2, has_gpu=False, needs_data=False).recipe.deepspeed
    assert "none is here" in reason


def test_what_other_processes_hold_of_a_card_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(deepspeed_json, "cards", lambda: [Card("a", 80 * GIB, 70 * GIB), Card("a", 80 * GIB, 9 * GIB)])
    monkeypatch.setattr(
        deepspeed_json, "choose_json", lambda name, overrides, ranks, gpu, host, resumes: (asked.append(gpu), "")
    )
    fit_deepspeed("t5_small", [], Ranks())
    assert asked == [9 * GIB]
