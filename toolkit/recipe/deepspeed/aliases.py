"""Older spellings of a DeepSpeed JSON, and comments beside its keys, translated before any rule reads them.

DeepSpeed obeys its deprecated flags of offloading, so rules that read the current sections alone would miss them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.tree import Tree

Path = tuple[str, ...]
PlaceOf = Callable[[Path], str]  # how messages name the place of a key: its file, or "ds."

# DeepSpeed's deprecated flag -> the section that it stands for.
OFFLOAD_FLAGS = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}
PIN_MEMORY = "cpu_offload_use_pin_memory"
_COMMENT = re.compile(r"_*comments?\d*|(//|#).*", re.IGNORECASE)


def translated(config: Tree, place_of: PlaceOf, problems: list[UserError], notes: list[str]) -> Tree:
    """``config`` in current keys.

    A flag that is neither true nor false stays, and the check of types reports it. ``problems`` get what is given
    twice, ``notes`` what is read as something else.
    """
    config = _without_comments(config)
    if "bfloat16" in config:
        if "bf16" in config:
            problems.append(
                UserError(f"{place_of(('bfloat16',))}bfloat16 and bf16 are the same section", "set ds.bfloat16=null")
            )
        config = {"bf16": config["bfloat16"], **{key: value for key, value in config.items() if key != "bfloat16"}}
    if isinstance(config.get("zero_optimization"), bool):
        stage = int(config["zero_optimization"])
        where = f"{place_of(('zero_optimization',))}zero_optimization"
        notes.append(f"{where}={'true' if stage else 'false'} is read as zero_optimization.stage={stage}")
        config["zero_optimization"] = {"stage": stage}
    if isinstance(config.get("zero_optimization"), dict):
        config["zero_optimization"] = _offload(config["zero_optimization"], place_of, problems, notes)
    return config


def _offload(zero: Tree, place_of: PlaceOf, problems: list[UserError], notes: list[str]) -> Tree:
    zero = dict(zero)
    pinned = zero.get(PIN_MEMORY)
    flags = {flag: zero.pop(flag) for flag in OFFLOAD_FLAGS if isinstance(zero.get(flag), bool)}
    for flag in (flag for flag, value in flags.items() if value):
        section = OFFLOAD_FLAGS[flag]
        where = f"{place_of(('zero_optimization', flag))}zero_optimization.{flag}"
        if section in zero:
            message = f"{where}=true and zero_optimization.{section} are both given"
            problems.append(UserError(message, f"set ds.zero_optimization.{flag}=null"))
            continue
        zero[section] = {"device": "cpu", **({"pin_memory": pinned} if isinstance(pinned, bool) else {})}
        notes.append(f"{where}=true is read as zero_optimization.{section}.device=cpu")
    if isinstance(pinned, bool):
        del zero[PIN_MEMORY]
        if not any(flags.values()):
            where = f"{place_of(('zero_optimization', PIN_MEMORY))}zero_optimization.{PIN_MEMORY}"
            notes.append(f"{where} has no effect: write offload_optimizer.pin_memory or offload_param.pin_memory")
    return zero


def _without_comments(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_comments(inner) for key, inner in value.items() if not _COMMENT.fullmatch(key)}
