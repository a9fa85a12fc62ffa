"""Where the clips of a recipe are: one corpus, or a mix of several; what is missing there or does not go together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolkit.errors import UserError
from toolkit.recipe.prompts import own_words, placeholders

if TYPE_CHECKING:
    from toolkit.recipe.schema import Data, MixPart, Recipe

# A table of our columns, the demo, or a public corpus (toolkit/corpus/published/presets.yaml).
Source = Literal[
    "table", "isign", "how2sign", "phoenix14t", "csl_daily", "openasl", "youtube_asl", "uni_sign", "glosl", "demo"
]
SplitBy = Literal["table", "video", "signer"]
TimeUnit = Literal["seconds", "milliseconds", "frames"]
PLACES = ("corpus", "table", "poses", "features")  # settings that say where clips are
MEAN, ALL = "mean", "all"  # values of evaluation.select_corpus besides the names of corpora
_NAME = re.compile(r"[\w.+-]+")


def weights_of(value: Any) -> float | list[float] | None:
    """A weight, or the two between which it changes: not negative, and one of them above 0.

    Raises:
        ValueError: it is neither; with a hint as its second argument.
    """
    hint = "write a number above 0, or two for a weight that changes over the run: weight: [1, 0.2]"
    pair = value if isinstance(value, (list, tuple)) else [value, value]
    if value is None:
        return None
    if len(pair) != 2 or any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in pair):
        raise ValueError("not a weight", hint)
    first, last = map(float, pair)
    if not (math.isfinite(first + last) and min(first, last) >= 0 and max(first, last) > 0):
        raise ValueError("a weight is zero, negative or infinite", hint)
    return first if first == last else [first, last]


def label_of(name: str | None, place: str | None) -> str:
    """The name of a corpus: the one that it is given, else that of its folder or table."""
    path = Path(place or "")
    return name or (path.stem if path.suffix else path.name)


def missing_data(recipe: Recipe) -> Iterator[UserError]:
    """What is missing, or given twice, about where the recipe's clips are; empty when nothing is."""
    data = recipe.data
    places = {"table": "FILE.csv", "poses": "FOLDER", "features": "FOLDER"}
    if data.source == "demo" or data.corpora:
        return
    if data.corpus:
        if both := [f"data.{key}" for key in places if getattr(data, key)]:
            message = f"data.corpus and {' and '.join(both)} both say where the clips are"
            yield UserError(message, "keep one of them")
        return
    # Features may stand beside poses, or instead of them.
    wanted = {key: what for key, what in places.items() if key == "table" or (key == "poses" and not data.features)}
    if missing := [f"data.{key}={what}" for key, what in wanted.items() if not getattr(data, key)]:
        message = f"recipe {recipe.name} does not say where its clips are"
        yield UserError(message, f"add {' '.join(missing)} (or data.corpus=FOLDER)")


def problems_of_mix(recipe: Recipe) -> Iterator[UserError]:
    """What does not go together in ``data.corpora`` and the settings about it, without looking at files."""
    data = recipe.data
    yield from _problems_of_selection(recipe)
    if not data.corpora:
        if data.temperature != 1:
            yield UserError(
                f"data.temperature={data.temperature:g} mixes corpora, and data.corpora names none",
                "leave it out, or list the corpora: data.corpora=[FOLDER, FOLDER]",
            )
        return
    if given := [f"data.{key}={getattr(data, key)}" for key in PLACES if getattr(data, key)]:
        yield UserError(f"data.corpora and {' and '.join(given)} both say where the clips are", "keep one of them")
    if data.source == "demo":
        yield UserError(
            "data.source=demo makes its own corpus, and data.corpora lists others",
            "add data.source=table, and to mix with the demo list its folder in data.cache",
        )
    for number, part in enumerate(data.corpora):
        yield from _problems_of_part(f"data.corpora.{number}", part)
    yield from _problems_of_weights(data)
    yield from _twice(data)
    of_prompts = [part for part in data.corpora if part.prefix is not None]
    if of_prompts and "prompt" not in placeholders(own_words(recipe.model.prefix, recipe.model.prompt)):
        yield UserError(
            f"the corpus {of_prompts[0].label} has a prefix, which model.prefix={recipe.model.prefix!r} leaves out",
            "name {prompt} in model.prefix, or set model.prefix=null",
        )


def _problems_of_part(key: str, part: MixPart) -> Iterator[UserError]:
    of_table = (part.table, part.poses, part.features)
    by_table = any(place is not None for place in of_table)
    if bool(part.corpus) == by_table or (by_table and not (part.table and (part.poses or part.features))):
        given = ", ".join(f"{name}={getattr(part, name)}" for name in PLACES if getattr(part, name)) or "nothing"
        yield UserError(
            f"{key} has {given} to say where its clips are",
            "give it corpus: FOLDER, or table: FILE.csv with poses: FOLDER",
        )
    elif not _NAME.fullmatch(part.label) or part.label in (MEAN, ALL):
        yield UserError(
            f"{key}: {part.label!r} cannot name a corpus in scores and files",
            f"set its name to letters, digits and .+-_, other than {MEAN} and {ALL}",
        )
    try:
        names_itself = part.prefix and "prompt" in placeholders(part.prefix)
    except ValueError as error:
        message, hint = error.args
        yield UserError(f"{key}: {message}", hint)
        return
    if names_itself:
        yield UserError(f"{key}: its prefix is the prompt, and names {{prompt}}", "name other conditions of a clip")


def _problems_of_weights(data: Data) -> Iterator[UserError]:
    parts = [part for part in data.corpora if part.splits is None or "train" in part.splits]
    without = [part.label for part in parts if part.weight is None]
    if 0 < len(without) < len(parts):
        yield UserError(
            f"data.corpora: {', '.join(without)} has no weight while others do",
            "give each of them a weight, or none: then clips are drawn by size and data.temperature",
        )
    elif not without and data.temperature != 1:
        yield UserError(
            f"data.temperature={data.temperature:g} is for corpora without weights, and all have one",
            "leave out data.temperature, or the weights",
        )
    for place, number in (("start", 0), ("end", -1)):
        weights = [part.weight[number] if isinstance(part.weight, list) else part.weight for part in parts]
        if parts and not without and not any(weights):
            yield UserError(f"data.corpora: all weights are 0 at the {place} of the run", "raise one of them there")


def _twice(data: Data) -> Iterator[UserError]:
    known: dict[str, str] = {}
    for number, part in enumerate(data.corpora):
        key, place, name = f"data.corpora.{number}", part.corpus or part.table, f"name {part.label}"
        path = str(Path(place).resolve()) if place else key
        if path in known:
            yield UserError(
                f"{key} is {known[path]} again: {place}", "list it once; its weight says how often clips are drawn"
            )
        elif name in known:
            yield UserError(
                f"{key} and {known[name]} are both called {part.label}", f"give one of them a name: {key}.name"
            )
        known |= {path: key, name: key}


def _problems_of_selection(recipe: Recipe) -> Iterator[UserError]:
    chosen, names = recipe.evaluation.select_corpus, [part.label for part in recipe.data.corpora]
    if chosen not in (MEAN, ALL, *names):
        known = ", ".join([MEAN, ALL, *names])
        yield UserError(f"evaluation.select_corpus={chosen} is no corpus of data.corpora", f"set it to one of {known}")


def with_prompt(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree in which ``model.prefix`` is ``{prompt}`` where a corpus has a prefix and the model has none."""
    data, model = tree.get("data"), tree.get("model")
    parts = data.get("corpora") if isinstance(data, dict) else None
    if not isinstance(parts, list) or not isinstance(model, dict):
        return tree
    if model.get("prefix") is not None or model.get("prompt") is not None:
        return tree
    has_prefix = any(isinstance(part, dict) and part.get("prefix") is not None for part in parts)
    return {**tree, "model": {**model, "prefix": "{prompt}"}} if has_prefix else tree
