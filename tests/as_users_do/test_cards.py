"""Every model card's published weights and tokenizer, from the hub, on two ranks, whole and under ZeRO-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.as_users_do.conftest import User
from tests.as_users_do.published import FORMS, ROOT
from tests.end_to_end.conftest import Finished
from tests.hidden_gpus import python_path
from tests.rank_workers import run_worker
from toolkit.corpus.prepare import ensure_corpus
from toolkit.recipe.load import load_recipe

WORKER = Path(__file__).with_name("cards_worker.py")


@pytest.fixture(scope="module")
def loaded(at_first_contact: User, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each card and strategy; one start, because starting two ranks costs more than loading."""
    user, folder = at_first_contact, tmp_path_factory.mktemp("cards")
    corpus = ensure_corpus(load_recipe("t5_small", [*user.data, f"data.cache={folder}"]).data)

    def run(script: str, plan: Path, *, ranks: int) -> Finished:
        # The toolkit of the clone, the tests of this repository.
        return user.run(script, plan, ranks=ranks, PYTHONPATH=python_path(user.clone, ROOT))

    return run_worker(run, str(WORKER), folder, ranks=2, corpus=str(corpus), hub=str(user.hub.root))


@pytest.mark.parametrize("ds", ["zero1", "zero3"])
@pytest.mark.parametrize("card", FORMS)
def test_a_card_loads_what_was_published(loaded: dict[str, dict[str, Any]], card: str, ds: str) -> None:
    outcome = loaded[f"{card} {ds}"]
    assert "error" not in outcome, outcome["error"]
    assert outcome["partitioned"] == (ds == "zero3")
    assert outcome["differing"] == []
    assert (outcome["text"], outcome["unknown"]) == ("good day", False)
    # How outputs are searched for is the recipe's, whatever was published.
    assert outcome["beams"] == 5
    assert (outcome["forced"] is not None) == (card in ("bart_large", "led_base", "mbart50", "m2m100", "nllb_600m"))


def test_a_file_comes_once_however_many_ranks_ask_for_it(
    loaded: dict[str, dict[str, Any]], at_first_contact: User
) -> None:
    asked = at_first_contact.hub.asked
    large = [line for line in asked if line.startswith("GET /store/")]
    assert large
    assert len(large) == len(set(large)), sorted(line for line in set(large) if large.count(line) > 1)
