"""The README of an exported model: how to use it, what it was trained on, how well it does, and what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from toolkit import __version__
from toolkit.errors import UserError
from toolkit.files import read_text
from toolkit.models.processor import PoseFeatureExtractor, PoseProcessor
from toolkit.models.translator import PoseTranslator
from toolkit.models.vocabulary.trimming import trimming_of
from toolkit.recipe.load import load_recipe
from toolkit.recipe.model_cards import ModelCard, card_of, reads_published
from toolkit.recipe.prompts import placeholders
from toolkit.recipe.resolve import RECIPE_FILE
from toolkit.recipe.schema import MixPart, Recipe
from toolkit.recipe.sections.model import Model
from toolkit.recipe.yaml_text import dump_yaml
from toolkit.scoring.metrics import SCORE_NAMES
from toolkit.scoring.table import HEADINGS, SOMETIMES, format_score

SCORES_FILE = "scores.json"
# Paths on the machine that trained are private, and of no use elsewhere.
_PLACES = {
    "data": ("corpus", "table", "poses", "features", "cache"),
    "run": ("dir",),
}

_TEXT = """\
---
{front_matter}
---

# {name}: a sign language translator

It translates the {seen} of a signing person into text. {description}

## How to use

It needs the sign language translation toolkit, version {version} or later; transformers alone does not know this kind
of model.

```python
import toolkit.auto  # registers the model with transformers
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{place}"), AutoProcessor.from_pretrained("{place}")
print(processor.batch_decode(model.generate(**processor({call})))[0])
```

In a clone of the toolkit, also for folders, archives, videos and long recordings with subtitles:

```
python launch/translate.py --model {place} {files}
```

## What it reads

{reads}

| | |
|---|---|
{inputs}

## What it was trained on

{data}

{lineage}## Scores

{scores}

## Limits

{limits}

## Recipe

{size}. All settings of the training, except paths:

<details><summary>recipe.yaml</summary>

```yaml
{recipe}```

</details>
"""


def model_card(
    run_dir: Path,
    name: str,
    model: PoseTranslator,
    processor: PoseProcessor,
    *,
    parameters: int,
    merged: bool = False,
    restored: bool = False,
) -> str:
    """The README of the model that a run trained.

    Args:
        run_dir: the run.
        name: the model's folder's name, or its id on the hub.
        model, processor: as the run saved them.
        parameters: how many numbers the exported model has.
        merged: whether its adapter is merged.
        restored: whether it has the tokens again that the run trimmed.

    Raises:
        UserError: the run's files are not readable.
    """
    recipe, extractor = load_recipe(str(run_dir / RECIPE_FILE)), processor.feature_extractor
    summary = _read_scores(run_dir)
    backbone = card_of(recipe.model)
    return _TEXT.format(
        front_matter=_front_matter(name, recipe, backbone, summary).to_yaml(),
        name=name.rpartition("/")[2],
        place=name,
        description=recipe.description or "",
        version=__version__,
        **_usage(extractor),
        inputs="\n".join(f"| {what} | {value} |" for what, value in _inputs(extractor).items()),
        data=_data(recipe, summary),
        lineage=_lineage(model.config.lineage),
        scores=_scores(summary),
        limits="\n".join(f"- {limit}" for limit in _limits(recipe, extractor)),
        size=_size(recipe, backbone, parameters)
        + _adaptation(recipe.model, name, merged=merged)
        + _vocabulary(processor.tokenizer, restored=restored),
        recipe=dump_yaml(_without_places(recipe)),
    )


def _read_scores(run_dir: Path) -> dict[str, Any]:
    """What ``scores.json`` of the run says, or nothing where the run has not finished."""
    path = run_dir / SCORES_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(read_text(path, "the scores of a run")))
    except ValueError as error:
        raise UserError(f"{path} is not readable: {error}", "remove it: the model card then has no scores") from error


def _front_matter(name: str, recipe: Recipe, backbone: ModelCard | None, summary: Mapping[str, Any]) -> ModelCardData:
    """What the hub reads: tags, the base model, and the scores of the first test split."""
    is_published = backbone and reads_published(recipe.model)
    results, source = [], "+".join(part.label for part in recipe.data.corpora) or recipe.data.source
    if summary:
        split, content = next(iter(summary["splits"].items()))
        results = [
            EvalResult(
                task_type="translation",
                task_name="sign language translation",
                dataset_type=source,
                dataset_name=source,
                dataset_split=split,
                metric_type=score,
                metric_name=HEADINGS.get(score, score),
                metric_value=round(value, 4),
            )
            for score, value in content["scores"].items()
            if value is not None
        ]
    return ModelCardData(
        library_name="transformers",
        tags=["sign-language-translation", "pose", "deepspeed"],
        base_model=backbone.hub_id if backbone and is_published else None,
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
    )


def _usage(extractor: PoseFeatureExtractor) -> dict[str, str]:
    """What a clip is to this model, and how it is given in Python and on the command line."""
    poses = "`.pose` files, MediaPipe Holistic or others that name the same landmarks"
    features = (
        f"feature files (`.npy`, `.npz`, `.h5`, `.safetensors`) with the {extractor.num_features} numbers a frame of "
        "the network that it was trained with"
    )
    in_python, on_line = 'video_features=["clip.npy"], features_fps=25', "--features-fps 25"
    if not extractor.num_features:
        return {"seen": "pose sequence", "call": '["clip.pose"]', "files": "clip.pose", "reads": f"{poses}."}
    if not extractor.landmark_set["points"]:
        usage = {"call": f"[None], {in_python}", "files": f"clip.npy {on_line}"}
        return {"seen": "video features", **usage, "reads": f"{features[0].upper()}{features[1:]}."}
    usage = {"call": f'["clip.pose"], {in_python}', "files": f"clip.pose --features clip.npy {on_line}"}
    return {"seen": "pose sequence and video features", **usage, "reads": f"{poses}, and {features}."}


def _inputs(extractor: PoseFeatureExtractor) -> dict[str, str]:
    landmarks = extractor.landmark_set
    longest = f"{extractor.max_frames} frames" if extractor.max_frames else "any"
    seconds = f" ({extractor.max_frames / extractor.fps:.0f} s)" if extractor.max_frames else ""
    named = placeholders(extractor.prefix_template)
    return {
        "landmark set": f"{landmarks['name']}: {len(landmarks['points'])} points by name, "
        f"channels {', '.join(landmarks['channels'])}",
        **({"features": f"{extractor.num_features} numbers a frame"} if extractor.num_features else {}),
        "frames per second": f"{extractor.fps:g}, whatever the file has",
        "longest clip": f"{longest}{seconds}; longer ones: {extractor.too_long}",
        "normalisation": extractor.normalisation,
        "missing landmarks": "given to the model as missing, never as zero",
        **({"conditions": _conditions(extractor.prefix_template, named)} if named else {}),
    }


def _conditions(template: str, named: Sequence[str]) -> str:
    """How to say what is known of a clip."""
    values = ", ".join(f'"{name}": "..."' for name in named)
    options = ", ".join(f"`--{name.replace('_', '-')}`" for name in named)
    return f"`{template}` stands before the poses: `processor([...], conditions=[{{{values}}}])`, or {options}"


def _data(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    data = recipe.data
    if data.corpora:
        source = f"A mix of {len(data.corpora)} corpora: {'; '.join(_part(part) for part in data.corpora)}."
    elif data.source == "demo":
        source = "The fingerspelling demo corpus, made of recorded letters (one signer, one clip a letter)."
    else:
        table = data.table or data.corpus
        source = f"`{Path(table).name}`" if table else "the table of its recipe"
        source = f"Source: {data.source}, {source}."
    splits = ", ".join(f"{name} {split['clips']:,} clips" for name, split in summary.get("splits", {}).items())
    together = (
        "No signer is in two splits."
        if data.split_by == "signer"
        else "Splits keep the clips of one source video together unless the corpus brings its own."
    )
    return f"{source} {together}" + (f" Scored on: {splits}." if splits else "")


def _part(part: MixPart) -> str:
    """One of several corpora, and how often it was drawn."""
    drawn = "by size" if part.weight is None else f"weight {part.weight:g}" if isinstance(part.weight, float) else ""
    if isinstance(part.weight, list):
        drawn = f"weight {part.weight[0]:g} at the start and {part.weight[1]:g} at the end"
    known = [value for value in (part.language, part.target_language) if value]
    return f"`{part.label}` ({', '.join([*known, drawn])})"


def _lineage(lineage: Mapping[str, Any] | None) -> str:
    """The translators that training started from, the nearest first; empty where it started from none."""
    if not lineage:
        return ""
    lines = ["## What it started from\n", "| model | step | scores |", "|---|---|---|"]
    ancestor: Mapping[str, Any] | None = lineage
    while ancestor:
        scores = ", ".join(
            f"{HEADINGS.get(name, name)} {format_score(name, value)}"
            for name, value in ancestor["scores"].items()
            if value is not None
        )
        step = "unknown" if ancestor["step"] is None else ancestor["step"]
        lines.append(f"| `{ancestor['source']}` | {step} | {scores or 'unknown'} |")
        ancestor = ancestor["lineage"]
    table = "\n".join(f"| {part} | {what} |" for part, what in lineage["table"].items())
    return "\n".join(lines) + f"\n\nWhat was taken of the first:\n\n| part | |\n|---|---|\n{table}\n\n"


def _scores(summary: Mapping[str, Any]) -> str:
    if not summary:
        return "The run has not been scored on a test split."
    names = [name for name in SCORE_NAMES if _belongs(name, summary)]
    lines = ["| | " + " | ".join(HEADINGS[name] for name in names) + " | clips |", "|---" * (len(names) + 2) + "|"]
    for split, content in summary["splits"].items():
        rows = {split: content["scores"]} | {
            f"{split}, floor: {kind} sentence": values for kind, values in content["floors"].items()
        }
        for label, values in rows.items():
            cells = [format_score(name, values.get(name)) for name in names]
            lines.append(f"| {label} | {' | '.join(cells)} | {content['clips']} |")
    signature = "\n".join(f"- {kind}: `{text}`" for kind, text in summary["signature"].items())
    return (
        "A floor is the score of a sentence that is chosen without looking at the signing. BLEU, chrF++ and ROUGE-L "
        "run from 0 to 100, higher is better; WER and CER are ratios, lower is better.\n\n"
        + "\n".join(lines)
        + f"\n\n{signature}"
    )


def _belongs(name: str, summary: Mapping[str, Any]) -> bool:
    """Whether a score has its column: reduced BLEU and the error rate of glosses only where they were computed."""
    return name not in SOMETIMES or any(split["scores"].get(name) is not None for split in summary["splits"].values())


def _limits(recipe: Recipe, extractor: PoseFeatureExtractor) -> list[str]:
    limits = [
        "Other sign languages, signers, topics and cameras than those of its corpus may give fluent nonsense. A wrong "
        "text looks as certain as a right one.",
        "It is no interpreter: do not use it where a person's health, rights or money depend on the translation.",
        "A recording longer than the longest clip must be split; `launch/translate.py` splits by time, not sentence.",
        "The licences of the data and of the base model apply to this model, too.",
    ]
    if recipe.data.source == "demo":
        limits.insert(0, "It spells letters of a few fingerspelling alphabets, for one signer: it is a demonstration.")
    if not extractor.num_features and "face" not in extractor.landmark_set.get("parts", {}):
        limits.insert(-2, "It does not see the face, which carries grammar and mouthings.")
    return limits


def _size(recipe: Recipe, backbone: ModelCard | None, parameters: int) -> str:
    start = "published weights" if reads_published(recipe.model) else "random weights"
    start = "a trained translator" if recipe.model.init_from else start
    licence = f" ({backbone.license})" if backbone else ""
    name = backbone.name if backbone else Path(recipe.model.backbone).name
    return f"{parameters / 1e6:,.1f} M parameters; backbone {name}{licence}, from {start}"


def _adaptation(settings: Model, name: str, *, merged: bool) -> str:
    """How a frozen backbone was adapted, in sentences."""
    text = ""
    if settings.lora:
        lora = settings.lora
        kind = ("DoRA" if lora.dora else "LoRA") + (" (rsLoRA scaling)" if lora.rslora else "")
        besides = f", {' and '.join(lora.train).replace('_', ' ')}" if lora.train else ""
        text += (
            f". Trained by {kind}, r = {lora.r}, alpha = {lora.alpha:g}: adapters in a frozen backbone; the pose "
            f"encoder{besides} trained in full. "
        )
        text += (
            "The adapter is merged into the weights"
            if merged
            else "The adapter is in `adapter/`: `AutoModel` loads it, too; for PEFT, "
            f'`PeftModel.from_pretrained(AutoModel.from_pretrained("{name}", adapter=None), "{name}/adapter")`'
        )
    if settings.quantization:
        text += (
            f". The backbone was held in {settings.quantization.kind} during training; the weights here are the "
            "numbers that those represented"
        )
    if settings.extra_tokens:
        text += f". Tokens added to the base model's: {', '.join(f'`{token}`' for token in settings.extra_tokens)}"
    return text


def _vocabulary(tokenizer: Any, *, restored: bool) -> str:
    """What became of a vocabulary that was trimmed to the training texts, in sentences."""
    trimming = trimming_of(tokenizer)
    if trimming is None:
        return ""
    text = f". It was trained with {trimming.in_words()}: those that the training texts needed. "
    if restored:
        return text + "The others are back, with the rows that training started from"
    return text + "Any other text is written by shorter tokens"


def _without_places(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    for section, keys in _PLACES.items():
        values[section] = {key: value for key, value in values[section].items() if key not in keys}
    for part, known in zip(values["data"]["corpora"], recipe.data.corpora, strict=True):
        part |= {"corpus": known.label, "name": known.label, "table": None, "poses": None, "features": None}
    for path in (
        "deepspeed",
        "model.backbone",
        "model.init_from",
        "model.tokenizer",
        "model.vocabulary_text",
        "data.landmarks",
    ):
        *sections, key = path.split(".")
        place = values
        for section in sections:
            place = place[section]
        if place[key] and Path(place[key]).is_absolute():
            place[key] = Path(place[key]).name
    return {key: value for key, value in values.items() if value != {}}
