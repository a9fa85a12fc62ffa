"""Every cell of the compatibility table that is claimed to work is trained on two ranks; every recipe, too.

`make test` trains a cover in which each architecture stands, and any two of the other settings that go together, and
some recipes; `make test-nightly` trains all.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rank_workers import prepared, run_worker
from toolkit.cluster.ops import is_built, use_extensions_dir
from toolkit.recipe.deepspeed.cells import cell_of
from toolkit.recipe.deepspeed.compatibility import ARCHITECTURES, ZERO_STAGES, Cell, cells, needs_gpu, refusal
from toolkit.recipe.deepspeed.json_file import load_deepspeed
from toolkit.recipe.load import load_recipe, recipe_names
from toolkit.recipe.model_cards import card_of

sys.path.insert(0, str(Path(__file__).parent))
from cells import AXES, card_of_architecture, combinations, overrides_of, small_cover

CLAIMED = [cell for cell in cells() if refusal(cell) is None]
ON_CPU = [cell for cell in CLAIMED if not needs_gpu(cell)]
COVER = small_cover(ON_CPU)


def cell_of_recipe(name: str) -> Cell:
    recipe = load_recipe(name)
    card = card_of(recipe.model)
    assert card
    return cell_of(recipe, load_deepspeed(recipe.deepspeed, recipe.ds), card.architecture)


RECIPES_OWN = [cell_of_recipe(name) for name in recipe_names()]
BY_NIGHT = [cell for cell in ON_CPU if cell not in COVER]
ON_GPU = [cell for cell in CLAIMED if needs_gpu(cell)]
RECIPES_BY_DAY = ("mbart50", "qwen2_5_7b_qlora", "t5_3b_qlora", "transformer")
ONE_BATCH = [
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "model.dropout=0",
    "model.pose_encoder.dropout=0",
]
WHOLE_RUN = [
    "training.max_steps=4",
    "training.warmup_ratio=0",
    "training.global_batch_size=24",
    "training.micro_batch_size=6",
    "training.eval_every=99",
    "evaluation.num_beams=2",
    "evaluation.max_new_tokens=4",
]


@pytest.fixture(scope="module")
def train_cells(
    fork: Callable[..., Any], settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, dict[str, Any]]]:
    """Trains the cells and the recipes of a list in one start, and gives what each came to."""
    corpus = prepared(settings)[-1]
    shared = [
        corpus,
        "model.tiny=true",
        "model.pose_encoder.hidden=64",  # tiny leaves it as it is, and it would take most of the time
        "training.learning_rate=3e-3",
        "training.workers=0",
    ]

    def train(chosen: list[Cell], recipes: list[str], ranks: int) -> dict[str, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("cells")
        run_dir = f"run.dir={folder / 'run'}"
        return run_worker(
            fork,
            "tests/end_to_end/cells_worker.py",
            folder,
            ranks=ranks,
            corpus=corpus.partition("=")[2],
            cells={str(cell): [*shared, run_dir, *ONE_BATCH, *overrides_of(cell)] for cell in chosen},
            recipes={name: [*shared, *WHOLE_RUN] for name in recipes},
        )

    return train


@pytest.fixture(scope="module")
def by_day(train_cells: Callable[..., dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return train_cells([cell for cell in COVER if can_run(cell)], list(RECIPES_BY_DAY), ranks=2)


@pytest.mark.parametrize("cell", COVER, ids=str)
def test_a_cell_that_is_claimed_trains_saves_and_loads(by_day: dict[str, dict[str, Any]], cell: Cell) -> None:
    if not can_run(cell):
        pytest.skip("op async_io is not built: apt-get install libaio-dev, python launch/doctor.py build-ops async_io")
    check(by_day[str(cell)])


@pytest.mark.parametrize("name", RECIPES_BY_DAY)
def test_a_recipe_trains_as_it_stands(by_day: dict[str, dict[str, Any]], name: str) -> None:
    check(by_day[f"recipe {name}"])


@pytest.mark.nightly
def test_every_recipe_trains_as_it_stands(train_cells: Callable[..., dict[str, dict[str, Any]]]) -> None:
    outcomes = train_cells([], recipe_names(), ranks=2)
    wrong = {name: outcome for name, outcome in outcomes.items() if problem(outcome)}
    assert not wrong, json.dumps(wrong, indent=1)[:8000]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["t5_3b_lora", "nllb_600m"])
def test_a_recipe_trains_by_its_command(
    run: Callable[..., Any], settings: list[str], tmp_path: Path, name: str
) -> None:
    steps = ["training.max_steps=2", "training.epochs=9", "training.eval_every=99", f"run.dir={tmp_path / name}"]
    done = run("launch/train.py", "--recipe", name, "--json", *settings, *steps, ranks=2)
    assert done.code == 0, done.out[-4000:] + done.err[-4000:]
    assert done.json["steps"] == 2


# A start for each stage of each architecture: what DeepSpeed leaves behind of its engines fills the memory in the end.
@pytest.mark.nightly
@pytest.mark.parametrize("stage", ZERO_STAGES, ids=lambda stage: f"zero{stage}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_other_cells_train_save_and_load(
    train_cells: Callable[..., dict[str, dict[str, Any]]], architecture: str, stage: int
) -> None:
    own = [cell for cell in BY_NIGHT if (cell.architecture, cell.zero_stage) == (architecture, stage)]
    chosen = [cell for cell in own if can_run(cell)]
    outcomes = train_cells(chosen, [], ranks=2)
    wrong = {name: outcome for name, outcome in outcomes.items() if problem(outcome)}
    assert not wrong, f"{len(wrong)} of {len(chosen)}: {json.dumps(wrong, indent=1)[:8000]}"


@pytest.mark.gpu
def test_cells_that_need_a_gpu_train_save_and_load(train_cells: Callable[..., dict[str, dict[str, Any]]]) -> None:
    outcomes = train_cells(small_cover(ON_GPU), [], ranks=1)
    wrong = {name: outcome for name, outcome in outcomes.items() if problem(outcome)}
    assert not wrong, json.dumps(wrong, indent=1)[:8000]


def test_cells_of_recipes_are_claimed_and_claimed_cells_have_a_model_card() -> None:
    assert all(refusal(cell) is None for cell in RECIPES_OWN)
    for cell in CLAIMED:
        assert card_of_architecture(cell.architecture or "")
        assert overrides_of(cell)


def test_the_cover_holds_every_combination() -> None:
    wanted = set(itertools.chain.from_iterable(map(combinations, ON_CPU)))
    assert wanted == set(itertools.chain.from_iterable(map(combinations, COVER)))
    assert len(COVER) < 60 and len(AXES) == 6


def can_run(cell: Cell) -> bool:
    """Whether this machine has what the cell needs besides a CPU."""
    use_extensions_dir()
    return cell.offload != "nvme" or is_built("async_io")


def problem(outcome: dict[str, Any]) -> str | None:
    if "error" in outcome:
        return str(outcome["traceback"])
    losses = outcome["losses"]
    if not losses[-1] < losses[0]:
        return f"the loss did not fall: {losses}"
    return None if outcome["restored"] else "loading did not bring the saved weights back"


def check(outcome: dict[str, Any]) -> None:
    assert problem(outcome) is None
