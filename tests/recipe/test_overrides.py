"""key=value overrides, YAML scalars and merging, as properties."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.recipe.load import load_recipe
from toolkit.recipe.tree import leaves, merge, nested, without_nulls
from toolkit.recipe.yaml_text import dump_yaml, parse_value, parse_yaml

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x2FFF, exclude_categories=("C", "Z")), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PRINTABLE
KEYS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
TREES = st.recursive(
    st.dictionaries(KEYS, SCALARS, max_size=4), lambda inner: st.dictionaries(KEYS, SCALARS | inner, max_size=4)
)


@given(VALUES)
def test_what_json_writes_an_override_reads_back(value):
    assert parse_value(json.dumps(value, ensure_ascii=False)) == value


@given(VALUES)
def test_what_is_dumped_is_read_back(value):
    assert parse_yaml(dump_yaml(value), "test")[0] == value


@given(st.text(string.ascii_letters + string.digits + " :#-*&!%@,.?/|>_", min_size=1, max_size=30))
def test_unbracketed_text_is_one_scalar_and_never_an_error(text):
    assert not isinstance(parse_value(text), dict | list)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e8", 1e8),
        ("-3", -3),
        (".5", 0.5),
        ("true", True),
        ("off", "off"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("007", "007"),
        ("", None),
        ("null", None),
        ("2026-01-31", "2026-01-31"),
        ("translate to English:", "translate to English:"),
        ("a # b", "a # b"),
        ("'1e8'", "1e8"),
        ("[0.9, 0.98]", [0.9, 0.98]),
        ("{kind: conv}", {"kind": "conv"}),
    ],
)
def test_scalars_mean_what_people_mean(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@given(TREES)
def test_merging_with_nothing_or_itself_changes_nothing(tree):
    assert merge(tree, {}) == merge({}, tree) == merge(tree, tree) == tree


@given(TREES, TREES, TREES)
def test_merging_is_associative_where_no_value_hides_a_section(first, second, third):
    # Where a scalar stands over a section the order of merging matters, as it must; sections alone always agree.
    sections = [{f"s_{key}": {key: value} for key, value in leaves_of(tree)} for tree in (first, second, third)]
    a, b, c = sections
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


def leaves_of(tree):
    return {".".join(path): value for path, value in leaves(tree) if not isinstance(value, dict)}.items()


@given(TREES, TREES)
def test_every_leaf_on_top_survives_and_inputs_stay_as_they_were(base, over):
    before = json.dumps(base)
    merged = merge(base, over)
    for path, value in leaves(over):
        dict_at = merged
        for key in path:
            dict_at = dict_at[key]
        if value != {}:
            assert dict_at == value
    assert json.dumps(base) == before


@given(TREES)
def test_a_tree_is_the_merge_of_its_leaves(tree):
    built = {}
    for path, value in leaves(tree):
        built = merge(built, nested(path, value))
    assert built == tree


@given(TREES)
def test_no_null_remains(tree):
    assert all(value is not None for _, value in leaves(without_nulls(tree)))


@given(st.floats(min_value=1e-9, max_value=1e9), st.integers(min_value=1, max_value=10**9))
def test_numbers_reach_the_recipe_exactly(rate, steps):
    recipe = load_recipe("t5_small", [f"training.learning_rate={rate}", f"training.max_steps={steps}"])
    assert recipe.training.learning_rate == rate
    assert recipe.training.max_steps == steps


def test_numbers_written_with_an_exponent_become_whole_where_a_whole_number_is_wanted():
    recipe = load_recipe("t5_small", ["training.save_every=1e3", "run.dir=2024"])
    assert recipe.training.save_every == 1000 and isinstance(recipe.training.save_every, int)
    assert recipe.run.dir == "2024"


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("key", ["training.seed", "data.split_seed"])
def test_a_seed_that_no_generator_takes_is_named(key, seed):
    with pytest.raises(UserError, match=key) as caught:
        load_recipe("t5_small", [f"{key}={seed}"])
    assert key in caught.value.hint


@pytest.mark.parametrize("override", ["bogus", "=3", "a..b=1", ".a=1", "training.=1", "tr aining.epochs=3"])
def test_what_is_not_key_value_is_named(override):
    with pytest.raises(UserError) as caught:
        load_recipe("t5_small", [override])
    assert repr(override) in caught.value.message and "training.epochs=20" in caught.value.hint


def test_an_open_bracket_is_named():
    with pytest.raises(UserError, match=r"training\.betas"):
        load_recipe("t5_small", ["training.betas=[0.9, 0.98"])
