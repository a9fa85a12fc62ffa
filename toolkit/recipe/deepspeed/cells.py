"""From a recipe and its DeepSpeed JSON to their cell of the compatibility table, and its refusal as an error."""

from __future__ import annotations

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.compatibility import Cell, alternatives, refusal
from toolkit.recipe.deepspeed.json_file import ds_config_names, read_deepspeed
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

BFLOAT = ("bfloat16", "bf16")
HALF = ("float16", "fp16", "half")
LISTED = 6  # alternatives that fit a line


def cell_of(recipe: Recipe, config: Tree, architecture: str | None) -> Cell:
    """The cell of a recipe with a DeepSpeed JSON, resolved or not; ``architecture`` is None before it is known."""
    model = recipe.model
    adapter = "none"
    if model.lora:
        adapter = "dora" if model.lora.dora else "rslora" if model.lora.rslora else "lora"
    return Cell(
        architecture=architecture,
        precision=training_precision(config),
        adapter=adapter,
        quantization=model.quantization.kind if model.quantization else "none",
        zero_stage=int(value_at(config, "zero_optimization.stage") or 0),
        offload=offload_of(config),
    )


def parameter_precision(config: Tree) -> str:
    """The type of the model's parameters: ``fp32``, ``bf16`` or ``fp16``."""
    for name in ("bf16", "fp16"):
        if value_at(config, f"{name}.enabled"):
            return name
    return "fp32"


def types_in_words(config: Tree) -> str:
    """The types of parameters and of products with a resolved DeepSpeed JSON."""
    autocast = autocast_type(config)
    return parameter_precision(config) + (f" with {autocast} autocast" if autocast else "")


def autocast_type(config: Tree) -> str | None:
    """The type in which matrix products of fp32 parameters are computed (torch_autocast), or None."""
    if not value_at(config, "torch_autocast.enabled"):
        return None
    return str(value_at(config, "torch_autocast.dtype")).removeprefix("torch.")


def training_precision(config: Tree) -> str:
    """One of ``compatibility.PRECISIONS``; products in fp16 count as fp16, which overflows either way."""
    autocast = autocast_type(config)
    if value_at(config, "fp16.enabled") or autocast in HALF:
        return "fp16"
    return "autocast" if autocast else parameter_precision(config)


def offload_of(config: Tree) -> str:
    """One of ``compatibility.OFFLOADS``."""
    devices = {what: offload_device(config, what) for what in ("optimizer", "param")}
    if "nvme" in devices.values():
        return "nvme"
    return "+".join(what for what, device in devices.items() if device) or "none"


def offload_device(config: Tree, what: str) -> str | None:
    """Where ``optimizer`` states or parameters (``param``) are offloaded to: ``cpu``, ``nvme``, or None."""
    device = value_at(config, f"zero_optimization.offload_{what}.device") or "none"
    return None if device == "none" else str(device)


def cell_problem(cell: Cell, backbone: str) -> UserError | None:
    """Why ``backbone`` cannot be trained in this cell and which settings can be; None where it can."""
    reason = refusal(cell)
    if reason is None:
        return None
    ways = [words for other in alternatives(cell) if (words := _as_settings(cell, other))]
    hint = f"nearest that work: {', or '.join(ways[:LISTED])}" if ways else "choose another model.backbone or --ds"
    return UserError(f"model.backbone={backbone}: {reason}", hint)


def _as_settings(cell: Cell, other: Cell) -> str | None:
    """What to write on the command line to change from one cell to another; None where no shipped JSON does it."""
    words: list[str | None] = []
    if (other.zero_stage, other.offload) != (cell.zero_stage, cell.offload):
        words.append(_json_for(other))
    if other.quantization != cell.quantization:
        words.append(f"model.quantization={'null' if other.quantization == 'none' else other.quantization}")
    if other.adapter != cell.adapter:
        settings = {"none": "model.lora=null", "lora": "model.lora.r=16"}
        words.append(settings.get(other.adapter, f"model.lora.{other.adapter}=true"))
    if other.precision != cell.precision:
        words.append(_PRECISION_SETTINGS[other.precision])
    given = [word for word in words if word]
    return " ".join(given) if len(given) == len(words) else None


# How to change from fp16 or autocast, the only precisions that are refused, to another one.
_PRECISION_SETTINGS = {
    "bf16": "ds.fp16.enabled=false ds.torch_autocast.enabled=false ds.bf16.enabled=true",
    "autocast": "ds.fp16.enabled=false ds.torch_autocast.enabled=true ds.torch_autocast.dtype=bfloat16",
    "fp32": "ds.fp16.enabled=false ds.torch_autocast.enabled=false",
}


def _json_for(cell: Cell) -> str | None:
    """The shipped JSON of that stage and offload."""
    for name in ds_config_names():
        config = read_deepspeed(name).config
        if (value_at(config, "zero_optimization.stage"), offload_of(config)) == (cell.zero_stage, cell.offload):
            return f"--ds {name}"
    return None
