"""From a recipe's name and the command line's overrides to a checked ``Recipe``.

A recipe is a YAML file; ``extends: NAME`` puts it on top of another one, key by key, and ``key=value`` overrides go on
top of all. Every wrong key and value is listed at once, with its file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from toolkit.errors import UserError
from toolkit.files import read_text
from toolkit.recipe.model_cards import ModelCard, load_model_yaml, model_names
from toolkit.recipe.paths import recipes_dir, shown
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, did_you_mean, leaves, merge, nearest, nested
from toolkit.recipe.yaml_text import parse_value, parse_yaml

__all__ = ["ModelCard", "load_model_yaml", "load_recipe", "model_names", "read_recipe", "recipe_names"]

# Sections for which a bare word says their `kind`.
NAMED_BY_KIND = ("pose_encoder", "quantization")
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")


@dataclass
class RecipeText:
    """A recipe before it is checked: the merged tree and where each of its keys comes from."""

    name: str
    tree: Tree = field(default_factory=dict)
    places: dict[tuple[str, ...], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, tree: Tree, places: dict[tuple[str, ...], str]) -> None:
        """Lay ``tree`` on top."""
        self.tree = merge(self.tree, tree)
        self.places.update(places)

    def place_of(self, path: tuple[str, ...]) -> str:
        """Where ``path``, or the nearest key that encloses it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return f"recipe {self.name}"


def recipe_names() -> list[str]:
    """The shipped recipes that can be trained (parents, whose names begin with ``_``, are left out)."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml") if not path.stem.startswith("_"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, ds: str | None = None) -> Recipe:
    """Read a recipe with everything it extends, put the overrides on top, and check it.

    Args:
        name_or_path: a name in ``recipes/``, or the path of a YAML file.
        overrides: ``key=value`` texts, values in YAML, e.g. ``training.learning_rate=1e-4``.
        ds: name or path of the DeepSpeed JSON to use instead of the recipe's own.

    Raises:
        UserError: no such recipe, a cycle of ``extends``, or wrong keys or values: all of them, each with its place.
    """
    recipe, text = read_recipe(name_or_path, overrides, ds=ds)
    if recipe is None:
        raise UserError(one_line(text.problems, f"recipe {text.name}"))
    return recipe


def read_recipe(
    name_or_path: str, overrides: Sequence[str] = (), *, ds: str | None = None
) -> tuple[Recipe | None, RecipeText]:
    """Like ``load_recipe``, but problems are handed back instead of raised, for a caller that adds its own.

    Returns:
        The recipe (None where something is wrong) and its text, with ``text.problems``.
    """
    path = find_recipe(name_or_path)
    text = RecipeText(name=path.stem)
    _lay(path, text, chain=())
    for override in overrides:
        _lay_override(override, text)
    if ds is not None:
        text.put({"deepspeed": ds}, {("deepspeed",): "command line"})
    text.tree = {"name": text.name, **text.tree}
    try:
        recipe = Recipe.model_validate(text.tree)
    except ValidationError as error:
        text.problems.extend(_in_words(details, text) for details in error.errors())
    return (None if text.problems else recipe), text


def one_line(problems: Sequence[str], about: str) -> str:
    """One line that lists every problem, numbered when there are several."""
    if len(problems) == 1:
        return problems[0]
    listed = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
    return f"{len(problems)} problems in {about}: {listed}"


def recipe_keys() -> list[str]:
    """Every dotted key that a recipe can set."""
    return sorted(_keys(Recipe, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name in model.model_fields:
        section = _section_at(model, name)
        if section:
            yield from _keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _section_at(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def find_recipe(name_or_path: str, near: Path | None = None) -> Path:
    """The file of a recipe.

    Args:
        name_or_path: a name in ``recipes/``, or a path.
        near: the folder of the recipe that extends it, which is looked at first.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path) if near is None else near / name_or_path
        if not path.is_file():
            raise UserError(f"recipe {path}: no such file; `python launch/recipes.py ls` lists the shipped recipes")
        return path
    for folder in (near, recipes_dir()):
        if folder is not None and (folder / f"{name_or_path}.yaml").is_file():
            return folder / f"{name_or_path}.yaml"
    match = nearest(name_or_path, recipe_names(), cutoff=0.4)
    hint = f"did you mean {match}? " if match else ""
    raise UserError(
        f"recipe {name_or_path!r} does not exist: {hint}`python launch/recipes.py ls` lists all; "
        "a recipe of your own is given by its path, e.g. --recipe my/recipe.yaml"
    )


def _lay(path: Path, text: RecipeText, chain: tuple[Path, ...]) -> None:
    """Lay the recipe at ``path`` onto ``text``, after everything that it extends."""
    real = path.resolve()
    if real in chain:
        names = " -> ".join(step.stem for step in (*chain[chain.index(real) :], real))
        raise UserError(f"{shown(path)}: extends goes in a circle: {names}; take one `extends` out")
    place = shown(path)
    tree, lines = parse_yaml(read_text(path, "a recipe"), place)
    if not isinstance(tree, dict):
        raise UserError(f"{place}: a recipe is a mapping of keys to values, e.g. `model: {{backbone: t5_small}}`")
    parent = tree.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{place} line {lines[('extends',)]}: extends takes the name or path of one recipe")
        _lay(find_recipe(parent, near=path.parent), text, (*chain, real))
        # A parent's name and description speak of the parent.
        for own in ("name", "description"):
            text.tree.pop(own, None)
    text.put(_short_forms(tree), {key: f"{place} line {line}" for key, line in lines.items()})


def _lay_override(override: str, text: RecipeText) -> None:
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        text.problems.append(f"command line: {override!r} is not key=value, e.g. training.epochs=20")
        return
    try:
        parsed = parse_value(value)
    except UserError as error:
        text.problems.append(f"command line: {key}: {error}")
        return
    tree = _short_forms(nested(tuple(key.split(".")), parsed))
    text.put(tree, {path[:end]: "command line" for path, _ in leaves(tree) for end in range(1, len(path) + 1)})


def _short_forms(tree: Tree, section: type[BaseModel] = Recipe) -> Tree:
    """What people write for short, said in full before merging, so that the parent's other settings stay.

    ``pose_encoder: linear`` means ``{kind: linear}`` (``quantization: nf4`` likewise), and a section whose keys are all
    commented out changes nothing, unless it is one that null turns off (``lora: null``).
    """
    full: Tree = {}
    for key, value in tree.items():
        inner = _section_at(section, key) if key in section.model_fields else None
        if inner is None:
            full[key] = value
        elif isinstance(value, dict):
            full[key] = _short_forms(value, inner)
        elif key in NAMED_BY_KIND and isinstance(value, str):
            full[key] = {"kind": value}
        elif value is not None or _may_be_null(section, key):
            full[key] = value
    return full


def _may_be_null(section: type[BaseModel], key: str) -> bool:
    return type(None) in get_args(section.model_fields[key].annotation)


def _in_words(details: Any, text: RecipeText) -> str:
    """One validation error as one sentence that says where, what and how to mend it."""
    location = tuple(str(step) for step in details["loc"])
    key = ".".join(location)
    place = text.place_of(location)
    kind, given = details["type"], details["input"]
    if kind == "extra_forbidden":
        return f"{place}: no key {key}{_suggestion(location)}"
    if kind == "missing":
        return f"{place}: {key} is required"
    if kind in ("model_type", "dict_type"):
        return f"{place}: {key}={given!r}: must be a section of keys and values"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    shown_value = "" if isinstance(given, dict) else f"={given!r}"
    return f"{place}: {key}{shown_value}: {message}"


def _suggestion(location: tuple[str, ...]) -> str:
    """The valid key nearest to a wrong one: in its own section, or the same word in another section."""
    *sections, word = location
    model: type[BaseModel] | None = Recipe
    for section in sections:
        model = _section_at(model, section) if model and section in model.model_fields else None
    here = list(model.model_fields) if model else []
    prefix = "".join(f"{section}." for section in sections)
    if nearest(word, here):
        return did_you_mean(word, here, prefix)
    elsewhere = [key for key in recipe_keys() if key.rsplit(".", 1)[-1] == word]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return did_you_mean(word, here, prefix)
