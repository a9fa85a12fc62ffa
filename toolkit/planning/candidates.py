"""Whether a backbone can be trained, and how; found from its configuration alone, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.models.adaptation.adapters import lora_targets
from toolkit.models.backbone import context_limit, empty_backbone, encoder_width, halves, position_limit, takes_vectors
from toolkit.models.backbone_config import backbone_config
from toolkit.planning.costs.counts import count_with
from toolkit.planning.costs.zero import zero_memory
from toolkit.planning.hardware import GIB
from toolkit.recipe.deepspeed.cells import cell_of
from toolkit.recipe.deepspeed.compatibility import ARCHITECTURES, refusal
from toolkit.recipe.deepspeed.json_file import ds_config_names, read_deepspeed
from toolkit.recipe.model_cards import card_of, card_published_as
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections.model import Lora, Quantization

STATES_SHARE = 2 / 3  # of a card; the rest is for activations and what else lives there
# Ways to train, from the most trained parameters to the least memory.
WAYS: dict[str, dict[str, Any]] = {
    "every weight": {},
    "LoRA": {"lora": Lora()},
    "LoRA on int8": {"lora": Lora(), "quantization": Quantization(kind="int8")},
    "LoRA on NF4": {"lora": Lora(), "quantization": Quantization(kind="nf4")},
}


@dataclass(frozen=True)
class Way:
    """One way to train a backbone with one DeepSpeed JSON.

    Attributes:
        name: one of ``WAYS``.
        deepspeed: a shipped JSON.
        trainable: numbers that train, without the pose encoder.
        device_gib: model states on each device, estimated by arithmetic.
        host_gib: model states in the host's memory for each rank.
        fits: whether a third of the card is left for activations.
    """

    name: str
    deepspeed: str
    trainable: int
    device_gib: float
    host_gib: float
    fits: bool


@dataclass(frozen=True)
class Candidate:
    """A backbone that can be trained.

    Attributes:
        backbone: the name that the user gave.
        architecture: HuggingFace ``model_type``.
        tested: whether the compatibility table, and so the tests, know this architecture.
        hidden_size: width of the vectors that the encoder takes.
        encoder_positions, decoder_positions: the most that it reads; None = no limit. A language model has these many
            for both together.
        parameters: of the backbone.
        lora_targets: layers that LoRA would adapt; empty where they must be named.
        ways: all allowed ways.
    """

    backbone: str
    architecture: str
    tested: bool
    hidden_size: int
    encoder_positions: int | None
    decoder_positions: int | None
    parameters: int
    lora_targets: list[str]
    ways: list[Way]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "inputs_embeds": True}


def examine(recipe: Recipe, card_gib: float, world_size: int) -> Candidate:
    """Look at the backbone of a recipe.

    Args:
        recipe: gives the model; its adapter and quantisation are ignored.
        card_gib: memory of each GPU, GiB.
        world_size: number of GPUs.

    Raises:
        UserError: it cannot be loaded, is neither an encoder-decoder nor a known language model, or reads no vectors.
    """
    asked = recipe.model.backbone
    model = recipe.model.model_copy(update={"backbone": card_published_as(asked) or asked})
    own = {"from_scratch": True} if card_of(model) else {}  # a card's dimensions need no hub
    model = model.model_copy(update={"lora": None, "quantization": None, "freeze": [], **own})
    recipe = recipe.model_copy(update={"model": model})
    config = backbone_config(model)
    backbone = empty_backbone(config)
    if not takes_vectors(backbone):
        raise UserError(
            f"model.backbone={model.backbone}: the encoder of a {config.model_type} reads token ids only (it takes no "
            "inputs_embeds), and poses are vectors",
            "choose another model; `python launch/recipes.py ls` lists some",
        )
    encoder, decoder = halves(backbone)
    limits = (position_limit(encoder), position_limit(decoder)) if encoder else (context_limit(backbone),) * 2
    return Candidate(
        backbone=asked,
        architecture=config.model_type,
        tested=config.model_type in ARCHITECTURES,
        hidden_size=encoder_width(config),
        encoder_positions=limits[0],
        decoder_positions=limits[1],
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        lora_targets=_targets(config, recipe),
        ways=list(_ways(config, recipe, card_gib, world_size)),
    )


def _targets(config: Any, recipe: Recipe) -> list[str]:
    model = recipe.model.model_copy(update={"lora": Lora()})
    try:
        return lora_targets(empty_backbone(config), model)
    except UserError:
        return []  # unknown: the recipe must name them


def _ways(config: Any, recipe: Recipe, card_gib: float, world_size: int) -> Iterator[Way]:
    for name, settings in WAYS.items():
        if settings and not _targets(config, recipe):
            continue
        model = recipe.model.model_copy(update=settings)
        chosen = recipe.model_copy(update={"model": model})
        counts = count_with(config, chosen)
        seen: set[tuple[int, str]] = set()
        for deepspeed in ds_config_names():
            json = read_deepspeed(deepspeed).config
            cell = cell_of(chosen, json, config.model_type)
            # Of those that place the states in the same way the first has no further options.
            if refusal(cell) or (cell.zero_stage, cell.offload) in seen:
                continue
            seen.add((cell.zero_stage, cell.offload))
            states = zero_memory(counts.weights, chosen, json, world_size)
            fits = states.device <= card_gib * GIB * STATES_SHARE
            yield Way(name, deepspeed, counts.trainable, states.device / GIB, states.host / GIB, fits)


def describe_candidate(candidate: Candidate, card_gib: float, world_size: int) -> Iterator[str]:
    """The lines that ``check-model`` prints."""
    positions = (candidate.encoder_positions, candidate.decoder_positions)
    poses, text = ("without limit" if limit is None else f"at most {limit:,}" for limit in positions)
    tested = "in the compatibility table" if candidate.tested else "not in the compatibility table: may work, untested"
    yield f"{candidate.backbone} can be trained behind poses"
    yield f"  architecture  {candidate.architecture}, {tested}"
    yield f"  takes         inputs_embeds of width {candidate.hidden_size:,}; poses {poses}, text {text}"
    yield f"  parameters    {candidate.parameters / 1e6:,.1f} M"
    targets = ", ".join(candidate.lora_targets) or "unknown: name layers in model.lora.targets"
    yield f"  LoRA targets  {targets}"
    cards = f"{world_size} GPU{'s' if world_size > 1 else ''} of {card_gib:g} GiB"
    yield f"  model states on {cards}, by arithmetic, where they leave a third of a card for activations:"
    for name in WAYS:
        ways = [way for way in candidate.ways if way.name == name]
        if not ways:
            continue
        fitting = [_size(way) for way in ways if way.fits]
        least = min(ways, key=lambda way: way.device_gib)
        listed = ", ".join(fitting) or f"none; the least is {_size(least)}"
        yield f"    {name:<12}  {ways[0].trainable / 1e6:,.1f} M trained: {listed}"
    yield f"  next          a model card of your own, or model.backbone={candidate.backbone} in a copy of a recipe"


def _size(way: Way) -> str:
    host = f" + {way.host_gib:.1f} of host memory" if way.host_gib else ""
    return f"{way.deepspeed} {way.device_gib:.1f}{host}"
