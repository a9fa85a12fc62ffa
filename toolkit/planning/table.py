"""A comparison as a text for people, and as the object that ``--json`` prints."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from toolkit.planning.comparison import ALL, Comparison, Row
from toolkit.planning.costs.vocabulary import planned_vocabulary
from toolkit.planning.hardware import GIB, Hardware, in_gib
from toolkit.planning.plan import Plan
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload, total_steps
from toolkit.recipe.catalogue import millions
from toolkit.recipe.schema import Recipe

# Whose memory lacks, in words.
OWNERS = {"GPU memory": "a rank's GPU memory", "host memory": "a node's memory", "NVMe": "a node's NVMe"}


def command_of(row: Row, recipe: Recipe, hardware: Hardware, words: Sequence[str]) -> str:
    """How to run what is recommended; a recipe that gives a number gets the largest that fits, ``auto`` stays.

    ``words`` are the recipe's name or path and the overrides.
    """
    launcher = f"deepspeed --num_gpus {hardware.ranks_per_node}"
    if hardware.nodes > 1:
        launcher = f"deepspeed --hostfile hostfile --num_nodes {hardware.nodes} --num_gpus {hardware.ranks_per_node}"
    micro: list[str] = []
    if recipe.training.micro_batch_size != "auto":
        words = [word for word in words if not word.startswith("training.micro_batch_size=")]
        micro = [f"training.micro_batch_size={row.max_micro_batch}"]
    name, *overrides = map(shlex.quote, words)
    return " ".join([launcher, f"launch/train.py --recipe {name} --ds {shlex.quote(row.name)}", *overrides, *micro])


def as_dict(
    comparison: Comparison, recipe: Recipe, hardware: Hardware, workload: Workload, words: Sequence[str]
) -> dict[str, Any]:
    """For ``--json``; sizes in GiB."""
    chosen = comparison.recommended
    return {
        "recipe": recipe.name,
        "hardware": hardware.in_words(),
        "vocabulary": planned_vocabulary(recipe).what or None,
        "workload": workload.source,
        "batch": comparison.batch,
        "target_tokens": {"of_a_text": workload.tokens, "of_a_step": _tokens_of_a_step(recipe, workload)},
        "steps": total_steps(recipe, workload),
        "jsons": [_row(row, comparison, hardware) for row in comparison.rows],
        "recommended": chosen and chosen.name,
        "reason": comparison.reason,
        "command": chosen and command_of(chosen, recipe, hardware, words),
        "idle": comparison.idle and asdict(comparison.idle),
        "recomputation": comparison.recomputation and asdict(comparison.recomputation),
        "advice": [
            {"change": item.change, "settings": item.settings, "gain_gib": _gib(item.gain), "fits": item.fits}
            for item in comparison.advice
        ],
    }


def _row(row: Row, comparison: Comparison, hardware: Hardware) -> dict[str, Any]:
    speed = comparison.relative_speed(row)
    shared = {"deepspeed": row.name, "fits": row.fits, "max_micro_batch": row.max_micro_batch}
    shared |= {"relative_speed": None if speed is None else round(speed, 3), "conflicts": row.conflicts or None}
    plan = row.plan
    if plan is None:
        return shared | {"per_rank_gib": None, "host_gib": None}
    return shared | {
        "lacking_gib": {name: _gib(size) for name, size in row.lacking.items()},
        "per_rank_gib": {name: _gib(size) for name, size in plan.items.items()} | {"total": _gib(plan.total)},
        "peak": plan.moment,
        "phases_gib": {name: _gib(size) for name, size in plan.phases.items()},
        "headroom_gib": _gib(hardware.gpu_memory - plan.total),
        "host_gib": _gib(plan.host),
        "pinned_gib": _gib(plan.pinned),
        "nvme_gib": _gib(plan.nvme),
        "checkpoint_gib": _gib(plan.checkpoint),
        "chosen": row.choice and asdict(row.choice.limits),
        "recomputes": row.recomputes,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation_steps": plan.accumulation_steps,
    }


def as_text(
    comparison: Comparison, subject: Subject, hardware: Hardware, workload: Workload, words: Sequence[str]
) -> str:
    """The table, the recommended run item by item, and the command."""
    return "\n".join(_lines(comparison, subject, hardware, workload, words))


def _lines(
    comparison: Comparison, subject: Subject, hardware: Hardware, workload: Workload, words: Sequence[str]
) -> Iterator[str]:
    recipe = subject.recipe
    every = sum(item.numel for item in subject.weights)
    trained = sum(item.numel for item in subject.weights if item.trained)
    yield f"plan of recipe {recipe.name} on {hardware.in_words()}"
    yield f"  model     {recipe.model.backbone}: {millions(every)} parameters, {millions(trained)} of them trained"
    if subject.vocabulary:
        yield f"  words     {subject.vocabulary}"
    yield f"  clips     {workload.source}"
    yield f"  texts     at most {workload.tokens} tokens each, {_tokens_of_a_step(recipe, workload):,} in a step"
    yield f"  batch     a step of {comparison.batch}"
    yield f"  steps     {_steps(recipe, workload)}"
    yield ""
    yield from _table(comparison, hardware)
    chosen = comparison.recommended
    shown = chosen or comparison.nearest
    if shown and shown.plan:
        yield ""
        yield from _items(shown.name, shown.plan, recipe)
    for row in comparison.rows:
        if row.conflicts:
            yield f"not possible: {row.name}: {row.conflicts}"
        elif row.lacking.keys() - {"GPU memory"}:  # that is the headroom
            hint = " (--nvme says how much there is)" if "NVMe" in row.lacking and hardware.nvme is None else ""
            yield f"does not fit: {row.name}: lacks {row.lacks}{hint}"
    yield ""
    if chosen:
        yield f"recommended: {chosen.name}: {comparison.reason}"
        yield f"  {command_of(chosen, recipe, hardware, words)}"
        if recipe.training.gradient_checkpointing == "auto":
            how = "recomputed" if chosen.recomputes else "kept"
            yield f"  its activations are {how}: that is faster among what fits"
        if chosen.choice:
            yield f"  its micro-batches have {chosen.choice.limits.in_words()}: {chosen.reason}"
        for note in (comparison.idle, comparison.recomputation):
            if note:
                yield f"note: {note.in_words()}"
        return
    useful = sorted((item for item in comparison.advice if item.is_useful), key=lambda item: -item.gain)
    if not shown or not useful:
        yield "nothing fits, and no setting of the recipe would save enough"
        return
    yield f"nothing fits; with {shown.name} each of these saves, of {OWNERS[next(iter(shown.lacking))]}:"
    for item in useful:
        verdict = "then it fits" if item.fits else "not enough" if item.change == ALL else "not enough alone"
        yield f"  {item.gain / GIB:>7.2f} GiB  {item.change} ({item.settings}): {verdict}"


def _items(name: str, plan: Plan, recipe: Recipe) -> Iterator[str]:
    """What a rank, a node and the disk hold."""
    passes = "1 micro-batch" if plan.accumulation_steps == 1 else f"{plan.accumulation_steps} micro-batches"
    yield f"a rank with {name}, {passes} of {plan.micro_batch_size} a step, GiB ({plan.moment}):"
    for item, size in sorted(plan.items.items(), key=lambda item: -item[1]):
        yield f"  {item:<32}{size / GIB:>8.2f}"
    yield f"  {'total':<32}{plan.total / GIB:>8.2f}"
    yield f"  by phase: {', '.join(f'{phase} {size / GIB:.2f}' for phase, size in plan.phases.items())}"
    pinned = f", {plan.pinned / GIB:.2f} of it pinned" if plan.pinned else ""
    yield f"  a node's processes take {plan.host / GIB:.2f} of its memory{pinned}"
    yield f"  a checkpoint takes {in_gib(plan.checkpoint)} of disk; recipes keep {recipe.training.keep_last}"


def _table(comparison: Comparison, hardware: Hardware) -> Iterator[str]:
    heading = ("DeepSpeed JSON", "fits", "GiB a rank", "headroom", "host GiB", "NVMe GiB", "micro-batch", "speed")
    rows: list[tuple[str, ...]] = [heading]
    for row in comparison.rows:
        if row.plan is None:
            rows.append((row.name, "-", *["-"] * 6))
            continue
        speed = comparison.relative_speed(row)
        rows.append(
            (
                row.name,
                "yes" if row.fits else "no",
                f"{row.plan.total / GIB:.2f}",
                f"{(hardware.gpu_memory - row.plan.total) / GIB:+.2f}",
                f"{row.plan.host / GIB:.1f}",
                f"{row.plan.nvme / GIB:.1f}",
                f"{row.max_micro_batch}",
                "-" if speed is None else f"{speed:.2f}",
            )
        )
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        first, *others = (
            f"{cell:<{width}}" if number == 0 else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(cells, wide, strict=True))
        )
        yield "  ".join([first, *others])


def _tokens_of_a_step(recipe: Recipe, workload: Workload) -> int:
    return recipe.training.global_batch_size * workload.tokens


def _steps(recipe: Recipe, workload: Workload) -> str:
    total = total_steps(recipe, workload)
    if total is None:
        return "known with the corpus"
    warmup = f"{int(recipe.training.warmup_ratio * total):,} of them warm-up"
    an_epoch = f", {workload.steps_per_epoch:,} an epoch" if workload.steps_per_epoch else ""
    return f"{total:,} in all, {warmup}{an_epoch}"


def _gib(size: float) -> float:
    return round(size / GIB, 3)
