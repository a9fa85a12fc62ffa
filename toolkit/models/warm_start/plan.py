"""What a run takes of a trained translator, from the configurations of both: no weights are read.

A part that does not fit is refused by name; a part that fits is mapped tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.batching.glosses import glosses_of, reads_glosses
from toolkit.corpus.mixture.opening import frame_of
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models.adaptation.extra_tokens import add_tokens
from toolkit.models.backbone import empty_backbone, encoder_width
from toolkit.models.backbone_config import backbone_config, fitted_config, published_ids
from toolkit.models.encoders import FeatureSettings, make_pose_encoder
from toolkit.models.translator import PoseTranslator
from toolkit.models.vocabulary.needed import full_tokenizer, run_tokenizer
from toolkit.models.warm_start.backbone import difference, part_of_each, token_dimension
from toolkit.models.warm_start.mapping import Axis, Mapping, by_name
from toolkit.models.warm_start.pose_encoder import Landmarks, compare, mappings
from toolkit.models.warm_start.source import KEY, Source, empty_source, read_source
from toolkit.models.warm_start.tokens import row_axis
from toolkit.poses.landmarks import LandmarkSet
from toolkit.recipe.model_cards import tokenizer_of
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections.model import BACKBONE_PARTS, PARTS, POSE_ENCODER_DEFAULTS, Part, PoseEncoder

PARTS_KEY = "model.init_parts"


@dataclass(frozen=True)
class Taken:
    """A line of the table: what becomes of one part."""

    part: Part
    what: str  # taken as it is, mapped, or left, in words


@dataclass(frozen=True)
class Plan:
    """What a run takes of a trained translator.

    Attributes:
        source: the translator.
        mappings: by the run's name of a tensor, how it comes from the source's; the others are left as they are made.
            Empty for token tables while the tokenizer is not known.
        table: one line a part.
        notes: how the run reads poses otherwise than the source.
        tokens: the rows of the run's token tables; None where the tokenizer is not known.
    """

    source: Source
    mappings: dict[str, Mapping]
    table: list[Taken]
    notes: list[str] = field(default_factory=list)
    tokens: Axis | None = None

    def lines(self) -> Iterator[str]:
        """The table, for people."""
        width = max(len(line.part) for line in self.table)
        yield from (f"{line.part:<{width}}  {line.what}" for line in self.table)
        yield from (f"note: {note}" for note in self.notes)


def check_warm_start(recipe: Recipe, corpus: Corpus | None = None) -> Plan:
    """The plan of a run before its tokenizer is made and before any process group; reads no weights.

    Without a prepared corpus the recipe says which landmarks there will be.

    Raises:
        UserError: the source cannot be read, or a part of it does not fit.
    """
    model, data = recipe.model, recipe.data
    assert model.init_from is not None
    landmark_set, num_features = (
        (corpus.landmark_set, corpus.metadata.num_features) if corpus else frame_of(recipe.data)
    )
    fps = corpus.metadata.fps if corpus else data.fps
    source, glosses = read_source(model.init_from), glosses_of(recipe, corpus) if corpus else None
    return make_plan(source, recipe, landmark_set, fps, _tokenizer_here(recipe, corpus), num_features, glosses)


def _tokenizer_here(recipe: Recipe, corpus: Corpus | None) -> PreTrainedTokenizerBase | None:
    """The run's tokenizer, where it takes no download, and no texts of a corpus that is not here."""
    kind = tokenizer_of(recipe.model)
    trims = recipe.model.vocabulary == "corpus"
    if (kind != "bytes" and not Path(kind).is_dir()) or (trims and corpus is None):
        return None
    if trims:
        assert corpus
        tokenizer = run_tokenizer(recipe, corpus, published_ids(recipe.model))
    else:
        tokenizer = full_tokenizer(recipe)
    add_tokens(tokenizer, recipe.model.extra_tokens)
    return tokenizer


def make_plan(
    source: Source,
    recipe: Recipe,
    landmark_set: LandmarkSet,
    fps: float,
    tokenizer: PreTrainedTokenizerBase | None,
    num_features: int = 0,
    glosses: Sequence[str] | None = None,
) -> Plan:
    """Map the source to a run with these landmarks, tokenizer and glosses (None where these are not known yet).

    ``num_features`` are the numbers of a frame that another network made of the run's clips.

    Raises:
        UserError: a part that is to be taken does not fit; the message names both sizes.
    """
    model = recipe.model
    config = fitted_config(model, tokenizer) if tokenizer is not None else backbone_config(model)
    backbone = empty_backbone(config, trust_remote_code=model.trust_remote_code)
    known = empty_source(source)
    if problem := difference(backbone, known.backbone, list(model.init_parts)):
        others = [part for part in model.init_parts if part not in BACKBONE_PARTS and part != "ctc_head"]
        if encoder_width(backbone.config) != encoder_width(known.backbone.config):
            others = []
        raise UserError(
            f"{KEY}={source.name}: its backbone is not that of model.backbone={model.backbone}: {problem}",
            f"set model.backbone to the source's{', or take less: ' if others else ''}"
            + (f"{PARTS_KEY}={_written(others)}" if others else ", and its sizes"),
        )
    axis = None
    rows = _table_rows(backbone)
    if tokenizer is not None:
        axis = row_axis(tokenizer, source.processor.tokenizer, rows, _table_rows(known.backbone))
    lines: dict[Part, Taken] = {}
    found: dict[str, Mapping] = {}
    for part in PARTS:
        if part not in model.init_parts:
            lines[part] = Taken(part, f"left: not in {PARTS_KEY}")
    notes = _memory_notes(source, known) if set(BACKBONE_PARTS) & set(model.init_parts) else []
    if "pose_encoder" in model.init_parts:
        landmarks = compare(landmark_set, source.landmark_set)
        mapped = _pose_encoder(source, recipe, backbone, landmark_set, known, num_features)
        found |= mapped
        lines["pose_encoder"] = Taken("pose_encoder", _in_words(mapped, landmarks))
        notes += _pose_notes(source, landmark_set, fps)
        notes += _feature_notes(source, recipe, num_features)
    parts = part_of_each(backbone)
    for part in BACKBONE_PARTS:
        if part not in model.init_parts:
            continue
        names = [name for name, its in parts.items() if its == part]
        if part == "embeddings":
            lines[part] = Taken(part, _rows_in_words(axis, tokenizer))
            if axis is not None:
                tensors = backbone.state_dict(keep_vars=True)
                found |= {f"backbone.{name}": _table(f"backbone.{name}", tensors[name], axis) for name in names}
        else:
            found |= {f"backbone.{name}": Mapping(f"backbone.{name}") for name in names}
            lines[part] = Taken(part, f"taken as it is: {len(names)} tensors")
    if "ctc_head" in model.init_parts:
        lines["ctc_head"], head = _ctc_head(source, recipe, backbone, axis, glosses)
        found |= head
    return Plan(source, found, [lines[part] for part in PARTS], notes, axis)


def _written(parts: list[Any]) -> str:
    return f"[{', '.join(parts)}]"


def _table_rows(backbone: PreTrainedModel) -> int:
    """Rows of the decoder's token table."""
    return int(backbone.get_output_embeddings().weight.shape[0])


def _table(name: str, tensor: torch.Tensor, axis: Axis) -> Mapping:
    if token_dimension(tensor, name.removeprefix("backbone.")) == 1:
        return Mapping(name, columns=axis, new="mean")
    return Mapping(name, rows=axis, new="mean")


def _rows_in_words(axis: Axis | None, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if axis is None or tokenizer is None:
        return "rows by token, counted when the run has its tokenizer; new tokens start as the mean of the rows"
    if axis.is_same:
        return f"taken as it is: {axis.size} rows"
    new, lost = len(axis.places) - axis.shared, axis.size - axis.shared
    text = f"{axis.shared} of {len(axis.places)} rows by token"
    text += f", {new} new ones start as the mean of the source's" if new else ""
    return text + (f"; {lost} rows of the source are left" if lost else "")


def _pose_encoder(
    source: Source,
    recipe: Recipe,
    backbone: PreTrainedModel,
    landmark_set: LandmarkSet,
    known: PoseTranslator,
    num_features: int,
) -> dict[str, Mapping]:
    """How the pose encoder's tensors come from the source's; raises UserError where the encoder is another one."""
    settings, theirs = recipe.model.pose_encoder, PoseEncoder.model_validate(source.config.pose_encoder)
    keys = ["kind", *POSE_ENCODER_DEFAULTS[settings.kind], *(["projection"] if settings.kind == "linear" else [])]
    keys = keys if settings.kind == theirs.kind else ["kind"]
    changed = [
        f"{key} {getattr(theirs, key)} there, {getattr(settings, key)} in the recipe"
        for key in keys
        if getattr(theirs, key) != getattr(settings, key)
    ]
    widths = [encoder_width(each.config) for each in (known.backbone, backbone)]
    if widths[0] != widths[1]:
        changed.append(f"it writes for a backbone of width {widths[0]} there, {widths[1]} in the recipe")
    if changed:
        others = [part for part in recipe.model.init_parts if part != "pose_encoder"]
        less = f", or leave it out: {PARTS_KEY}={_written(others)}" if others and widths[0] == widths[1] else ""
        raise UserError(
            f"{KEY}={source.name}: its pose encoder is another one: {'; '.join(changed)}",
            f"set model.pose_encoder to the source's settings{less}"
            if less
            else f"leave it out of {PARTS_KEY}, or choose a backbone and a pose encoder of the source's sizes",
        )
    with torch.device("meta"):
        encoder = make_pose_encoder(
            settings.model_dump(),
            num_points=landmark_set.num_points,
            num_channels=landmark_set.num_channels,
            width=widths[1],
            landmark_set=landmark_set,
            features=FeatureSettings(num_features, recipe.model.feature_encoder.model_dump()) if num_features else None,
        )
    # Beside features the encoder of the poses is one of two.
    ours, before = (
        "pose_encoder.poses." if number else "pose_encoder." for number in (num_features, source.config.num_features)
    )
    names = [f"pose_encoder.{name}" for name in encoder.state_dict()]
    of_features = [name for name in names if num_features and name.startswith("pose_encoder.features.")]
    found = {name: Mapping(name) for name in of_features if _has_same_features(source, recipe, num_features)}
    if landmark_set.num_points and source.landmark_set.num_points:
        of_poses = [name.removeprefix(ours) for name in names if name not in of_features]
        mapped = mappings(of_poses, landmark_set, source.landmark_set, settings.kind, settings.hidden)
        found |= {
            f"{ours}{name}": Mapping(f"{before}{mapping.source}", mapping.rows, mapping.columns)
            for name, mapping in mapped.items()
        }
    return found


def _has_same_features(source: Source, recipe: Recipe, num_features: int) -> bool:
    """Whether the source's encoder of features fits the run: it has as many inputs, and the same layers."""
    ours, theirs = recipe.model.feature_encoder.model_dump(), source.config.feature_encoder
    same = all(ours[key] == theirs.get(key) for key in ours if key != "dropout")
    return same and num_features == source.config.num_features


def _feature_notes(source: Source, recipe: Recipe, num_features: int) -> list[str]:
    known = source.config.num_features
    if num_features and not _has_same_features(source, recipe, num_features):
        there = f"reads {known} numbers a frame, or by other layers" if known else "reads none"
        return [f"the encoder of the {num_features} features is new: the source {there}"]
    return ["the source's encoder of features is left: this run has none"] if known and not num_features else []


def _in_words(mapped: dict[str, Mapping], landmarks: Landmarks) -> str:
    if not mapped:
        return "new: the source reads other inputs"
    if all(mapping.is_same for mapping in mapped.values()):
        return f"taken as it is: {len(mapped)} tensors, {landmarks.shared} landmarks"
    text = f"{landmarks.shared} landmarks by name"
    if landmarks.new:
        components = sorted({component for component, _ in landmarks.new})
        text += f", {len(landmarks.new)} new ones start small ({', '.join(components)})"
    return text + (f"; {landmarks.dropped} landmarks of the source are left" if landmarks.dropped else "")


def _pose_notes(source: Source, wanted: LandmarkSet, fps: float) -> list[str]:
    """Differences of what a value of a landmark means, which no mapping removes."""
    known, notes = source.landmark_set, []
    if source.processor.feature_extractor.fps != fps:
        notes.append(f"the source reads {source.processor.feature_extractor.fps:g} frames per second, this run {fps:g}")
    anchors = [
        {part: landmarks.points[place] for part, place in (landmarks.anchors or {}).items()}
        for landmarks in (wanted, known)
    ]
    shared = set(wanted.parts) & set(known.parts)
    others = sorted(part for part in shared if anchors[0].get(part) != anchors[1].get(part))
    if others:
        notes.append(f"{', '.join(others)}: coordinates are relative to another landmark than in the source")
    for what, one, other in (
        ("channels", ", ".join(known.channels), ", ".join(wanted.channels)),
        ("least confidence", f"{known.min_confidence:g}", f"{wanted.min_confidence:g}"),
    ):
        if one != other:
            notes.append(f"{what} of a landmark: {one} in the source, {other} in this run")
    return notes


def _memory_notes(source: Source, known: PoseTranslator) -> list[str]:
    if not source.has_adapter:
        return []
    size = sum(parameter.numel() for parameter in known.parameters()) * (source.config.dtype or torch.float32).itemsize
    return [
        f"the source has adapters or a quantised backbone: they are merged first, for which each rank that reads holds "
        f"{size / 2**30:.1f} GiB in host memory"
    ]


def _ctc_head(
    source: Source, recipe: Recipe, backbone: PreTrainedModel, axis: Axis | None, glosses: Sequence[str] | None
) -> tuple[Taken, dict[str, Mapping]]:
    part: Part = "ctc_head"
    if not recipe.training.ctc_weight:
        return Taken(part, "left: training.ctc_weight=0 has none"), {}
    if not source.config.ctc:
        return Taken(part, "new: the source has none"), {}
    if reads_glosses(recipe) != bool(source.config.ctc_vocabulary):
        reads = "glosses" if source.config.ctc_vocabulary else "tokens of the text"
        return Taken(part, f"new: the source's reads {reads}"), {}
    if encoder_width(backbone.config) != encoder_width(source.config.backbone_config()):
        raise UserError(
            f"{KEY}={source.name}: its CTC head reads width {encoder_width(source.config.backbone_config())}, the "
            f"recipe's {encoder_width(backbone.config)}",
            f"leave {part} out of {PARTS_KEY}",
        )
    if reads_glosses(recipe):
        axis = None if glosses is None else by_name(glosses, source.config.ctc_vocabulary)
        shared = "by gloss" if axis is None else f"{axis.shared} of {len(axis.places)} glosses by name"
        what = Taken(part, shared)
    else:
        what = Taken(part, _rows_in_words(axis, axis and source.processor.tokenizer))
    if axis is None:
        return what, {}
    # The blank is the last row, after those of the vocabulary.
    rows = Axis(torch.cat([axis.places, torch.tensor([axis.size])]), axis.size + 1)
    names = ("ctc_head.weight", "ctc_head.bias")
    return what, {name: Mapping(name, rows=rows, new="mean", tokens=axis.size) for name in names}
