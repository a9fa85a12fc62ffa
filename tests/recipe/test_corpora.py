"""What a recipe may say about several corpora."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import RECIPE_FILE, resolve_named
from toolkit.recipe.schema import Recipe

TWO = "data.corpora=[corpora/a, corpora/b]"


def resolved(*overrides: str, recipe: str = "t5_small") -> Recipe:
    return resolve_named(recipe, [*overrides], 2, has_gpu=False, needs_data=True).recipe


def test_a_bare_path_is_a_corpus_and_names_it() -> None:
    first, second = resolved("data.corpora=[corpora/a, {table: t/b.csv, poses: p, weight: null}]").data.corpora
    assert (first.corpus, first.label) == ("corpora/a", "a")
    assert (second.table, second.label) == ("t/b.csv", "b")


def test_texts_in_the_list_stay_as_they_are_written() -> None:
    part = resolved("data.corpora=[{corpus: 2024, name: 1.10, language: 12}]").data.corpora[0]
    assert (part.corpus, part.name, part.language) == ("2024", "1.10", "12")


def test_a_saved_recipe_is_read_back(tmp_path: Path) -> None:
    run = resolve_named(
        "t5_small",
        ["data.corpora=[{corpus: a, weight: [1, 0.2], prefix: 'a {language}:'}, {corpus: b, weight: 3}]"],
        1,
        has_gpu=False,
    )
    run.save(tmp_path)
    assert load_recipe(str(tmp_path / RECIPE_FILE)) == run.recipe
    assert [part.weight for part in run.recipe.data.corpora] == [[1.0, 0.2], 3.0]


def test_the_prefix_of_a_corpus_stands_where_the_models_names_the_prompt() -> None:
    with_prefix = "data.corpora=[{corpus: a, prefix: 'from a:'}, b]"
    assert resolved(with_prefix).model.prefix == "{prompt}"
    assert resolved(with_prefix, "model.prefix='{language} {prompt}'").model.prefix == "{language} {prompt}"
    assert resolved(TWO).model.prefix is None
    with pytest.raises(UserError, match="prefix"):
        resolved(with_prefix, "model.prefix=translate:")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.corpora=[a, ./a]"], ["data.corpora.1", "data.corpora.0", "again"]),
        (["data.corpora=[x/a, y/a]"], ["data.corpora.1", "called a"]),
        (["data.corpora=[{corpus: a, weight: 0}, {corpus: b, weight: 1}]"], ["data.corpora.0.weight", "zero"]),
        (["data.corpora=[{corpus: a, weight: -1}, {corpus: b, weight: 1}]"], ["data.corpora.0.weight", "negative"]),
        (["data.corpora=[{corpus: a, weight: [0, 0]}]"], ["data.corpora.0.weight", "zero"]),
        (["data.corpora=[{corpus: a, weight: [1, 2, 3]}]"], ["data.corpora.0.weight"]),
        (["data.corpora=[{corpus: a, weight: true}]"], ["data.corpora.0.weight"]),
        (["data.corpora=[{corpus: a, weight: [1, 0]}, {corpus: b, weight: [2, 0]}]"], ["end"]),
        (["data.corpora=[{corpus: a, weight: 1}, b]"], ["b has no weight"]),
        (["data.corpora=[{corpus: a, weight: 1}]", "data.temperature=2"], ["temperature", "weights"]),
        (["data.corpus=a", "data.temperature=2"], ["temperature"]),
        ([TWO, "data.temperature=0"], ["temperature"]),
        ([TWO, "data.epoch_clips=0"], ["epoch_clips"]),
        ([TWO, "data.corpus=c"], ["data.corpora", "data.corpus=c"]),
        (["data.corpora=[{corpus: a, table: b.csv, poses: p}]"], ["data.corpora.0"]),
        (["data.corpora=[{table: b.csv}]"], ["data.corpora.0", "b.csv"]),
        (["data.corpora=[{weight: 2}]"], ["data.corpora.0", "nothing"]),
        (["data.corpora=[{corpus: a, wieght: 2}]"], ["data.corpora.0.wieght", "weight"]),
        (["data.corpora=[{corpus: a, name: mean}]"], ["mean"]),
        (["data.corpora=[{corpus: 'my corpus'}]"], ["my corpus", "name"]),
        (["data.corpora=[{corpus: a, prefix: '{signer}:'}]"], ["data.corpora.0", "signer"]),
        (["data.corpora=[{corpus: a, prefix: '{prompt}:'}]"], ["data.corpora.0", "prompt"]),
        ([TWO, "evaluation.select_corpus=c"], ["select_corpus=c", "mean, all, a, b"]),
        (["data.corpus=a", "evaluation.select_corpus=a"], ["select_corpus=a"]),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        resolved(*overrides)
    error = refusal.value
    assert "\n" not in error.message and "\n" not in error.hint
    assert all(word in f"{error.message} {error.hint}" for word in words), error.lines


def test_the_mix_of_the_documentation_resolves(tmp_path: Path) -> None:
    path = tmp_path / "my_mix.yaml"
    page = (Path(__file__).resolve().parents[2] / "docs" / "transfer.md").read_text(encoding="utf-8")
    path.write_text(page.split("```yaml\n# my_mix.yaml\n")[1].split("```")[0])
    recipe = resolved(recipe=str(path))
    assert [part.weight for part in recipe.data.corpora] == [1.0, 2.0, [2.0, 0.2]]
    assert (recipe.model.prefix, recipe.evaluation.select_corpus) == ("{prompt}", "mine")


def test_the_demo_is_no_part_of_a_mix_by_its_source() -> None:
    with pytest.raises(UserError, match=r"data\.source=demo"):
        resolved(TWO, recipe="demo")
    assert resolved(TWO, "data.source=table", recipe="demo").data.corpora


def test_a_corpus_that_is_only_scored_needs_no_weight() -> None:
    overrides = "data.corpora=[{corpus: a, weight: 1}, {corpus: b, splits: [test]}]"
    assert len(resolved(overrides).data.corpora) == 2
