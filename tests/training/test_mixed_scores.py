"""A mix is scored corpus by corpus and together; one of them, or their mean, picks the best model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.written_mixes import write_one, write_three
from toolkit.checkpointing import run_directory
from toolkit.corpus.mixture.opening import open_corpora
from toolkit.corpus.packed import Corpus
from toolkit.decoding.search import Hypothesis
from toolkit.errors import UserError
from toolkit.evaluation import inputs
from toolkit.evaluation.splits import _score_split, splits_to_test
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Evaluation
from toolkit.scoring.metrics import mean_of, score
from toolkit.training.evaluating import Evaluated
from toolkit.training.overfit import few_clips
from toolkit.training.start import check_corpus, check_selection

Resolve = Callable[..., ResolvedRun]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return write_three(tmp_path)


@pytest.fixture
def resolved(folders: list[Path], resolve: Resolve) -> ResolvedRun:
    return resolve(*listed(folders))


@pytest.fixture
def corpus(resolved: ResolvedRun) -> Corpus:
    return open_corpora(resolved.recipe.data)


def test_a_test_split_has_the_scores_that_each_corpus_has_by_itself(corpus: Corpus, folders: list[Path]) -> None:
    """Translations of small are right, and of large wrong."""

    def scored(of: Corpus) -> dict[str, dict[str, float | None]]:
        split = of.splits["test"]
        texts = [text if text.startswith("small") else "no idea at all" for text in split.texts]
        results = _score_split(of, split, [[Hypothesis(text, 0.0)] for text in texts], Evaluation())
        return {
            name: result.scores.values() | {"floor": result.floors["constant"].chrf} for name, result in results.items()
        }

    found = scored(corpus)
    assert list(found) == ["test", "test@large", "test@small"]
    for path in folders[:2]:
        assert found[f"test@{path.name}"] == scored(Corpus.open(path))["test"]
    assert found["test@small"]["chrf"] == 100 and 0 < (found["test"]["chrf"] or 0) < 100
    assert splits_to_test(corpus) == ["test"]


def test_the_mean_or_a_named_corpus_picks_the_best_model() -> None:
    first, second = score(["a b c d"] * 3, ["a b c d"] * 3), score(["x"], ["a b c d"])
    together = score(["a b c d"] * 3 + ["x"], ["a b c d"] * 4)
    evaluated = Evaluated([], together, {"one": first, "two": second})
    assert evaluated.selected("two") is second and evaluated.selected("all") is together
    mean = evaluated.selected("mean")
    assert mean.bleu4 == pytest.approx((100 + (second.bleu4 or 0)) / 2) and mean.cer == pytest.approx(
        (second.cer or 0) / 2
    )
    assert mean.clips == 4 and mean_of([score(["x"], ["x"]), first]).bleu4 is None
    assert Evaluated([], together).selected("mean") is together
    assert evaluated.figures("dev")["dev@one_chrf"] == 100 and "two: chrf" in evaluated.line("chrf")


def test_a_corpus_without_dev_clips_picks_no_model(corpus: Corpus, resolved: ResolvedRun, resolve: Resolve) -> None:
    chosen = listed([Path(part.corpus or "") for part in resolved.recipe.data.corpora])
    check_selection(resolve(*chosen, "evaluation.select_corpus=small").recipe, corpus)
    with pytest.raises(UserError, match="synthetic"):
        check_selection(resolve(*chosen, "evaluation.select_corpus=synthetic").recipe, corpus)


def test_corpora_give_the_clips_to_overfit_in_turn(corpus: Corpus) -> None:
    few = few_clips(corpus, 5).splits["train"]
    assert [uid.split("-train-") for uid in few.uids] == [
        *(["large", "0"], ["small", "0"], ["synthetic", "0"], ["large", "1"], ["small", "1"])
    ]


def listed(folders: list[Path], *weights: int) -> list[str]:
    parts: list[dict[str, Any]] = [{"corpus": str(path)} for path in folders]
    for part, weight in zip(parts, weights, strict=False):
        part["weight"] = weight
    return ["data.source=table", f"data.corpora={json.dumps(parts)}"]


def test_a_run_resumes_with_its_corpora_wherever_they_are(
    corpus: Corpus, resolved: ResolvedRun, resolve: Resolve, folders: list[Path], tmp_path: Path
) -> None:
    run_directory.start(resolved, corpus)
    environment = json.loads((resolved.run_dir / "environment.json").read_text())
    assert environment["corpora"] == {path.name: str(path) for path in folders}
    (tmp_path / "elsewhere").mkdir()
    moved = [path.rename(tmp_path / "elsewhere" / path.name) for path in folders]
    now = resolve(*listed(moved))
    run_directory.check_same_run(now)
    check_corpus(open_corpora(now.recipe.data), now.run_dir)

    for key, other in (
        (r"data\.corpora\.1\.weight", resolve(*listed(moved, 1, 2, 3))),
        (r"data\.epoch_clips", resolve(*listed(moved), "data.epoch_clips=9")),
    ):
        with pytest.raises(UserError, match=key):
            run_directory.check_same_run(other)

    others = write_one(tmp_path / "other" / "synthetic", {"train": 21})
    changed = resolve(*listed([*moved[:2], others.path]))
    run_directory.check_same_run(changed)
    with pytest.raises(UserError) as refusal:
        check_corpus(open_corpora(changed.recipe.data), changed.run_dir)
    assert str(changed.run_dir) in refusal.value.message


def test_a_model_is_scored_on_the_corpora_of_its_run(
    corpus: Corpus, resolve: Resolve, folders: list[Path], tmp_path: Path
) -> None:
    """Wherever they are; and one of them by itself, with what the recipe says of it."""
    parts = [{"corpus": str(path), "language": path.name} for path in folders]
    resolved = resolve("data.source=table", f"data.corpora={json.dumps(parts)}")
    run_directory.start(resolved, open_corpora(resolved.recipe.data))
    recipe = inputs.recipe_of(resolved.run_dir)
    whole = inputs.open_corpus(resolved.run_dir, recipe, None, is_local_main=True)
    assert list(whole.members) == ["large", "small", "synthetic"] and len(whole.splits["test"]) == 6
    assert (
        inputs.default_out_folder(resolved.run_dir, whole) == resolved.run_dir / "evaluation" / "large+small+synthetic"
    )
    alone = inputs.open_corpus(resolved.run_dir, recipe, str(folders[1]), is_local_main=True)
    assert [clip.language for clip in alone.splits["test"]] == ["small", "small"]

    seen = tmp_path / "seen"
    environment = json.loads((resolved.run_dir / "environment.json").read_text())
    environment["corpora"]["small"] = str(folders[1].rename(seen))
    (resolved.run_dir / "environment.json").write_text(json.dumps(environment))
    again = inputs.open_corpus(resolved.run_dir, recipe, None, is_local_main=True)
    assert again.members["small"].path == seen and list(again.splits["test"].uids) == list(whole.splits["test"].uids)
