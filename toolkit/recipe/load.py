"""From a recipe's name and the command line's overrides to a checked ``Recipe``.

A recipe is a YAML file; ``extends: NAME`` merges it into another one, key by key, and ``key=value`` overrides are
merged last. Every wrong key and value is listed at once, with its file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from toolkit.errors import UserError, as_one
from toolkit.files import read_text
from toolkit.recipe.corpora import with_prompt
from toolkit.recipe.deepspeed.keys import text_keys
from toolkit.recipe.paths import recipes_dir, shown
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, did_you_mean, leaves, merge, nearest, nested
from toolkit.recipe.yaml_text import parse_value, parse_yaml

# Sections for which a bare word says their `kind`.
NAMED_BY_KIND = ("pose_encoder", "feature_encoder", "quantization")
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")


@dataclass
class RecipeText:
    """A recipe before it is checked: the merged tree and where each of its keys comes from."""

    name: str
    tree: Tree = field(default_factory=dict)
    places: dict[tuple[str, ...], str] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)

    def merge(self, tree: Tree, places: dict[tuple[str, ...], str]) -> None:
        """Let the values of ``tree`` replace those that are here."""
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
    """Read a recipe with everything it extends, merge the overrides into it, and check it.

    Overrides are ``key=value`` texts with values in YAML, e.g. ``training.learning_rate=1e-4``; ``ds`` is the name or
    path of the DeepSpeed JSON to use instead of the recipe's own.

    Raises:
        UserError: no such recipe, a cycle of ``extends``, or wrong keys or values: all of them, each with its place.
    """
    recipe, text = read_recipe(name_or_path, overrides, ds=ds)
    if recipe is None:
        raise as_one(text.problems, f"recipe {text.name}")
    return recipe


def read_recipe(
    name_or_path: str, overrides: Sequence[str] = (), *, ds: str | None = None
) -> tuple[Recipe | None, RecipeText]:
    """Like ``load_recipe``, but wrong keys and values are returned, for a caller that adds problems of its own.

    Returns:
        The recipe (None where something is wrong) and its text, with ``text.problems``.
    """
    path = find_recipe(name_or_path)
    text = RecipeText(name=path.stem)
    _merge_file(path, text, chain=())
    for override in overrides:
        _merge_override(override, text)
    if ds is not None:
        text.merge({"deepspeed": ds}, {("deepspeed",): "command line"})
    text.tree = with_prompt({"name": text.name, **text.tree})
    try:
        recipe = Recipe.model_validate(text.tree)
    except ValidationError as error:
        text.problems.extend(_problem(details, text) for details in error.errors())
    return (None if text.problems else recipe), text


def recipe_keys() -> list[str]:
    """Every dotted key that a recipe can set."""
    return sorted(".".join(path) for path, _ in _fields(Recipe))


def _fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and annotation of every key that is no section."""
    for name, about in model.model_fields.items():
        section = _section_at(model, name)
        if section:
            yield from _fields(section, (*path, name))
        else:
            yield (*path, name), about.annotation


def _section_at(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _holds_text(annotation: Any) -> bool:
    """Whether a value of this type is a text, or a list or dictionary of texts."""
    inner = get_args(annotation)
    if get_origin(annotation) in (dict, Literal):
        inner = inner[1:] if get_origin(annotation) is dict else ()
    return annotation is str or any(map(_holds_text, inner))


_TEXTS = {path for path, annotation in _fields(Recipe) if _holds_text(annotation)} | {
    ("ds", *path) for path in text_keys()
}


def _takes_text(path: tuple[str, ...]) -> bool:
    path = _without_numbers(path)
    return any(path[:length] in _TEXTS for length in range(1, len(path) + 1))


def _without_numbers(path: tuple[str, ...]) -> tuple[str, ...]:
    """A path without the places in lists."""
    return tuple(step for step in path if not step.isdigit())


def find_recipe(name_or_path: str, near: Path | None = None) -> Path:
    """The file of a recipe, by its name or path; ``near``, the folder of one that extends it, is looked at first.

    Raises:
        UserError: there is none; the hint gives the nearest name.
    """
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path) if near is None else near / name_or_path
        if not path.is_file():
            raise UserError(f"recipe {path}: no such file", "list the shipped recipes: python launch/recipes.py ls")
        return path
    for folder in (near, recipes_dir()):
        if folder is not None and (folder / f"{name_or_path}.yaml").is_file():
            return folder / f"{name_or_path}.yaml"
    otherwise = "list all: python launch/recipes.py ls; or give the path of your own, e.g. --recipe my/recipe.yaml"
    raise UserError(
        f"recipe {name_or_path!r} does not exist", did_you_mean(name_or_path, recipe_names(), otherwise, cutoff=0.4)
    )


def _merge_file(path: Path, text: RecipeText, chain: tuple[Path, ...]) -> None:
    """Merge the recipe at ``path`` into ``text``, after everything that it extends."""
    real = path.resolve()
    if real in chain:
        names = " -> ".join(step.stem for step in (*chain[chain.index(real) :], real))
        raise UserError(f"{shown(path)}: extends forms a cycle: {names}", "remove one `extends`")
    place = shown(path)
    tree, lines = parse_yaml(read_text(path, "a recipe"), place, _takes_text)
    if not isinstance(tree, dict):
        raise UserError(
            f"{place}: not a mapping of keys to values", "write keys and values, e.g. `model: {backbone: t5_small}`"
        )
    parent = tree.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(
                f"{place} line {lines[('extends',)]}: extends={parent!r} is not a recipe",
                "write the name or the path of one recipe, e.g. `extends: _isign`",
            )
        _merge_file(find_recipe(parent, near=path.parent), text, (*chain, real))
        # A parent's name and description are about the parent.
        for own in ("name", "description"):
            text.tree.pop(own, None)
    text.merge(_short_forms(tree), {key: f"{place} line {line}" for key, line in lines.items()})


def _merge_override(override: str, text: RecipeText) -> None:
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        problem = UserError(f"command line: {override!r} is not key=value", "write e.g. training.epochs=20")
        text.problems.append(problem)
        return
    path = tuple(key.split("."))
    try:
        parsed = parse_value(value, lambda inner: _takes_text((*path, *inner)))
    except UserError as error:
        text.problems.append(UserError(f"command line: {key}: {error.message}", error.hint))
        return
    tree = _short_forms(nested(path, parsed))
    text.merge(tree, {path[:end]: "command line" for path, _ in leaves(tree) for end in range(1, len(path) + 1)})


def _short_forms(tree: Tree, section: type[BaseModel] = Recipe) -> Tree:
    """Short forms written out before merging, so that the parent's other settings stay.

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
        elif value is not None or type(None) in get_args(section.model_fields[key].annotation):
            full[key] = value
    return full


def _problem(details: Any, text: RecipeText) -> UserError:
    """One of pydantic's validation errors as one of ours."""
    location = tuple(str(step) for step in details["loc"])
    key = ".".join(location)
    place = text.place_of(location)
    kind, given = details["type"], details["input"]
    if kind == "extra_forbidden":
        return UserError(f"{place}: {key} is not a setting", _suggestion(location))
    if kind == "missing":
        return UserError(f"{place}: {key} is missing", f"set {key}")
    if kind in ("model_type", "dict_type"):
        return UserError(f"{place}: {key}={given!r} is not a section", f"set one of its keys: {key}.KEY=VALUE")
    if kind == "value_error":  # raised by a validator of the schema
        message, hint = details["ctx"]["error"].args
        shown_value = "" if isinstance(given, dict) else f"={given!r}"
        return UserError(f"{place}: {key}{shown_value}: {message}", hint)
    bounds = "be a valid integer" if kind == "int_parsing_size" else details["msg"].removeprefix("Input should ")
    return UserError(f"{place}: {key}={given!r} is not a valid value", f"set {key}: it must {bounds}")


def _suggestion(location: tuple[str, ...]) -> str:
    """The valid key nearest to a wrong one: in its own section, or the same word in another section."""
    *sections, word = _without_numbers(location)
    model: type[BaseModel] | None = Recipe
    for section in sections:
        model = _section_at(model, section) if model and section in model.model_fields else None
    here = list(model.model_fields) if model else []
    prefix = "".join(f"{section}." for section in sections)
    elsewhere = [key for key in recipe_keys() if key.rsplit(".", 1)[-1] == word]
    if elsewhere and not nearest(word, here):
        return f"did you mean {' or '.join(elsewhere)}?"
    otherwise = "take it out; `python launch/recipes.py show t5_small` lists every key"
    return did_you_mean(word, here, otherwise, prefix=prefix)
