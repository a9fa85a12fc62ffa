from __future__ import annotations

import pytest

from toolkit.errors import UserError
from toolkit.recipe.load import load_recipe
from toolkit.recipe.prompts import CONDITIONS, fill, placeholders

TEMPLATE = "translate {language} to {target_language}: {context}"


def test_a_prefix_names_conditions_or_is_the_same_for_all() -> None:
    assert placeholders(TEMPLATE) == ["language", "target_language", "context"]
    assert placeholders("{context} and {context}") == ["context"]
    for same in (None, "", "translate to English:", "a {{brace}}"):
        assert placeholders(same) == []


def test_what_is_not_known_is_left_out() -> None:
    assert fill(TEMPLATE, {"language": "ins", "target_language": "Hindi"}) == "translate ins to Hindi:"
    assert fill(TEMPLATE, {}) == "translate to :"
    assert fill("{{{prompt}}}", {"prompt": "a {brace} stays"}) == "{a {brace} stays}"


@pytest.mark.parametrize("prefix", ["{signer}:", "{}", "{0}", "{language!r}", "{language:>9}", "{language.upper}"])
def test_a_prefix_that_names_no_condition_is_refused_with_those_that_there_are(prefix: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe("t5_small", [f"model.prefix='{prefix}'"])
    assert "prefix" in raised.value.message
    assert all(f"{{{name}}}" in raised.value.hint for name in CONDITIONS)


@pytest.mark.parametrize("prefix", ["{language", "language}", "{language}}"])
def test_a_brace_that_does_not_close_is_refused(prefix: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe("t5_small", [f"model.prefix='{prefix}'"])
    assert "{{" in raised.value.hint


def test_dropout_of_conditions_needs_a_prefix_that_names_one() -> None:
    assert load_recipe("t5_small", [f"model.prefix='{TEMPLATE}'", "model.condition_dropout=0.5"])
    with pytest.raises(UserError) as raised:
        load_recipe("t5_small", ["model.condition_dropout=0.5"])
    assert "model.prefix" in raised.value.hint
