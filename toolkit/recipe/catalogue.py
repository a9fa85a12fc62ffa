"""The list of all recipes, and a copy of one as the start of your own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import UserError
from toolkit.files import read_text, write_text_atomically
from toolkit.recipe.load import find_recipe, load_recipe, recipe_names
from toolkit.recipe.model_cards import card_of
from toolkit.recipe.paths import is_clone, recipes_dir
from toolkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Summary:
    """A recipe's row in the list, read without a model."""

    name: str
    model: str
    parameters: int | None  # of the backbone at full size; None = known only once the hub model is read
    trains: str  # of the backbone: all, or which adapter on which weights
    deepspeed: str
    description: str


def summarise(recipe: Recipe) -> Summary:
    """A recipe's row in the list; nothing is counted."""
    model, card = recipe.model, card_of(recipe.model)
    trains = "all"
    if model.lora:
        kind = "DoRA" if model.lora.dora else "rsLoRA" if model.lora.rslora else "LoRA"
        trains = f"{kind} r={model.lora.r}" + (f" on {model.quantization.kind}" if model.quantization else "")
    size = card.parameters if card else None
    return Summary(recipe.name, model.backbone, size, trains, recipe.deepspeed, recipe.description)


def catalogue() -> tuple[list[Recipe], list[UserError]]:
    """The recipes in ``recipes/``, and an error for each that cannot be read."""
    recipes, problems = [], []
    for name in recipe_names():
        try:
            recipe = load_recipe(name)
            card_of(recipe.model)
        except UserError as error:
            problems.append(UserError(f"recipe {name}: {error.message}", error.hint))
        else:
            recipes.append(recipe)
    return recipes, problems


def copy_recipe(name: str, new: str) -> Path:
    """Copy a recipe under a new name, comments and all, and return its path.

    ``new`` is a bare name, for ``recipes/NEW.yaml`` in a clone and ``NEW.yaml`` in the current folder otherwise, or a
    path that ends in ``.yaml``.

    Raises:
        UserError: no such recipe, or the new file exists.
    """
    source = find_recipe(name)
    if new.endswith((".yaml", ".yml")) or "/" in new:
        target = Path(new) if new.endswith((".yaml", ".yml")) else Path(f"{new}.yaml")
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*", new):
        target = (recipes_dir() if is_clone() else Path()) / f"{new}.yaml"
    else:
        raise UserError(
            f"{new!r} is not a recipe name", "use letters, digits, _ and -, or give a path that ends in .yaml"
        )
    if target.exists():
        raise UserError(f"{target} exists already", "choose another name")
    name_of_copy = target.stem if target.parent == recipes_dir() else str(target)
    text = read_text(source, "a recipe")
    # The command at the top of the copy should run the copy.
    write_text_atomically(target, re.sub(rf"(--recipe +){re.escape(source.stem)}\b", rf"\g<1>{name_of_copy}", text))
    return target


def millions(parameters: int | None) -> str:
    """A number of parameters in millions, for a table."""
    return "from the hub" if parameters is None else f"{parameters / 1e6:,.1f} M"
