"""Plans count the rows that a trimmed vocabulary will have, or say why they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.vocabulary.makers import saved, texts
from tests.models.warm_start.makers import HANDS, corpus_of
from tests.scripts import run_main
from toolkit.errors import UserError
from toolkit.models.vocabulary.needed import run_tokenizer
from toolkit.planning.costs.counts import count
from toolkit.planning.costs.vocabulary import planned_vocabulary
from toolkit.planning.subject import Subject
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import resolve_named
from toolkit.recipe.schema import Recipe

WIDTH = 768  # of mT5-Base, whose input and output tables are two


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    settings = ["model.from_scratch=true", f"model.tokenizer={saved('t5', folder)}", "model.vocabulary=corpus"]
    return load_recipe("mt5_base", [*settings, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    corpus_of(folder / "corpus", HANDS, texts()[:30])
    return folder


def test_the_rows_that_the_corpus_needs_are_counted(folder: Path) -> None:
    corpus = f"data.corpus={folder / 'corpus'}"
    recipe, full = recipe_of(folder, corpus), load_recipe("mt5_base", ["model.from_scratch=true"])
    vocabulary = planned_vocabulary(recipe)
    from toolkit.corpus.packed import Corpus

    assert vocabulary.rows == len(run_tokenizer(recipe, Corpus.open(folder / "corpus")))
    assert f"{vocabulary.rows} of " in vocabulary.what
    counted = [sum(weight.numel for weight in count(each).weights) for each in (recipe, full)]
    assert counted[1] - counted[0] == 2 * WIDTH * (250112 - vocabulary.rows)
    subject = Subject.of(recipe)
    assert sum(weight.numel for weight in subject.weights) == counted[0] and subject.vocabulary == vocabulary.what
    more = recipe_of(folder, corpus, "model.extra_tokens=['<loc>']", "model.lora.r=4")
    assert planned_vocabulary(more).rows == vocabulary.rows + 1


def test_what_is_missing_is_said_and_all_rows_are_counted(folder: Path) -> None:
    for overrides, word in ((["data.corpus=null"], "data.corpus"), ([f"data.corpus={folder / 'none'}"], "none")):
        vocabulary = planned_vocabulary(recipe_of(folder, *overrides))
        assert vocabulary.rows is None and word in vocabulary.what and "in full" in vocabulary.what
    assert planned_vocabulary(load_recipe("mt5_base", [])).what == ""


def test_check_and_plan_print_it(folder: Path) -> None:
    overrides = ["model.from_scratch=true", f"model.tokenizer={saved('t5', folder)}", "model.vocabulary=corpus"]
    overrides += [f"data.corpus={folder / 'corpus'}"]
    what = planned_vocabulary(recipe_of(folder, overrides[-1])).what
    done = run_main("launch/recipes.py", "check", "mt5_base", *overrides)
    assert done.returncode == 0 and f"vocabulary {what}" in done.stdout, done.stderr
    done = run_main("launch/plan.py", "--recipe", "mt5_base", "--ds", "zero2", *overrides, "--json")
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["vocabulary"] == what


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["model.from_scratch=true"], "bytes"),
        (["model.from_scratch=true", "model.tokenizer=train"], "train"),
        (["model.backbone=byt5_small"], "bytes"),
    ],
)
def test_a_vocabulary_that_has_nothing_to_trim_is_refused(overrides: list[str], word: str) -> None:
    settings = ["model.vocabulary=corpus", *overrides]
    with pytest.raises(UserError, match=rf"model\.vocabulary=corpus.*model\.tokenizer={word}"):
        resolve_named("t5_small", settings, 1, has_gpu=False, needs_data=False)


def test_a_margin_of_a_full_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"vocabulary_text=more\.txt.*full"):
        resolve_named("t5_small", ["model.vocabulary_text=more.txt"], 1, has_gpu=False, needs_data=False)
