"""What a DeepSpeed JSON gives and the recipe owns."""

from __future__ import annotations

import json
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.json_file import json_place
from toolkit.recipe.deepspeed.keys import OWNED
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, leaves, value_at


def take_ownership(config: Tree, recipe: Recipe, problems: list[UserError], notes: list[str]) -> None:
    """Remove what the recipe owns from ``config``; a value there is a problem, "auto" is none."""
    over = {".".join(path) for path, _ in leaves(recipe.ds)}
    given: dict[str, list[str]] = {}  # place -> keys with their values and owners
    for dotted, owner in OWNED.items():
        *sections, key = dotted.split(".")
        section = value_at(config, ".".join(sections)) if sections else config
        if not isinstance(section, dict) or key not in section:
            continue
        value = section.pop(key)
        if dotted == "scheduler":
            value = _schedule(value, recipe, notes)
        if value == "auto" or (dotted == "optimizer.type" and _same_optimizer(value, recipe)):
            continue
        is_over = any(path == dotted or path.startswith(f"{dotted}.") for path in over)
        shown_key = f"{'ds.' if is_over else ''}{dotted}={json.dumps(value)}"
        given.setdefault("" if is_over else f"{json_place(recipe.deepspeed)}: ", []).append(f"{shown_key} ({owner})")
    for place, values in given.items():
        problems.append(
            UserError(
                f"{place}{', '.join(values)}: recipe {recipe.name} owns what the DeepSpeed JSON gives here",
                'take it out of the JSON (or write "auto") and set the key in brackets',
            )
        )


def _same_optimizer(value: Any, recipe: Recipe) -> bool:
    """Whether DeepSpeed's name is that of the recipe's optimizer; its "Adam" decouples the decay as AdamW does."""
    name = str(value).lower()
    return recipe.training.optimizer == ("adamw" if name == "adam" else name)


def _schedule(scheduler: Any, recipe: Recipe, notes: list[str]) -> Any:
    """The values that a scheduler section sets; "auto" where it sets none, with a note."""
    if not isinstance(scheduler, dict) or not scheduler:
        return "auto"
    given = {".".join(path): value for path, value in leaves(scheduler) if value != "auto" and path[-1] != "type"}
    if given:
        return given
    place = json_place(recipe.deepspeed)
    notes.append(f"{place} leaves the scheduler to the recipe: training.schedule={recipe.training.schedule}")
    return "auto"
