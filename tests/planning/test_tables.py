"""docs/models.md says what cards, recipes, arithmetic and rules say today."""

from __future__ import annotations

from pathlib import Path

from toolkit.planning.tables import TABLES, with_tables

MODELS_MD = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_tables_are_up_to_date() -> None:
    text = MODELS_MD.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in text for name in TABLES)
    assert with_tables(text) == text, "update them: python launch/recipes.py docs"
