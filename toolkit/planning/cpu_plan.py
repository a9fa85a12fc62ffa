"""What a run on CPUs will need: as ``plan.py``, for ranks whose weights, activations and copies share one memory."""

from __future__ import annotations

from toolkit.cpu import linear
from toolkit.cpu.allocator import most_kernels
from toolkit.planning.costs.counts import weights_of_rank
from toolkit.planning.costs.cpu_ranks import cpu_moments
from toolkit.planning.costs.zero import Items, before_split
from toolkit.planning.hardware import CPU_COMPILER, CPU_KERNEL, CPU_LIBRARIES, CPU_OBJECTS, CPU_PEFT
from toolkit.planning.plan import CHECKPOINT_BYTES, PHASES, Plan, passes_of
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload
from toolkit.recipe.resolve import ResolvedRun

# What a heap that keeps freed memory holds besides, at most: a share of what comes and goes in a phase, and of the
# kernels, which stay between blocks that go. Measured with glibc 2.36, where a freed block does not serve an aligned
# request of its own size, and all of torch's are aligned.
HEAP_LOSS = dict.fromkeys(
    (
        "activations",
        "buckets",
        "copies of the update",
        "generation",
        "measuring the processor's speed",
        "weights before they are flattened",
    ),
    1.0,
) | {"kernels of matrix products": 0.25}


def make_cpu_plan(
    subject: Subject,
    resolved: ResolvedRun,
    workload: Workload,
    *,
    ranks_per_node: int | None = None,
    micro_batch_size: int | None = None,
    checkpointing: bool | None = None,
    keeps: bool = False,
) -> Plan:
    """Plan a run on CPUs; its items are of a rank's resident set, and ``host`` is what all ranks of a node take.

    Args:
        subject: of the run's recipe.
        resolved: decides the placement.
        workload: the longest clips.
        ranks_per_node: None = all are on one.
        micro_batch_size, checkpointing: instead of the recipe's.
        keeps: whether freed memory stays with the process (``toolkit/cpu/allocator.py``) and not with the system.

    Raises:
        UserError: the model cannot be traced.
    """
    recipe, config = resolved.recipe, resolved.deepspeed
    clips, accumulation, recompute = passes_of(resolved, micro_batch_size, checkpointing)
    first, later = (
        subject.trace(clips, frames, workload.tokens, config, recompute, on_cpu=True)
        for frames in (workload.frames, workload.later_frames)
    )
    zero, moments = cpu_moments(
        weights_of_rank(subject.weights, resolved.tensor_parallel_size),
        recipe,
        config,
        resolved.data_parallel_size,
        micro_batches=accumulation,
        first=first,
        later=later,
    )
    always = moments["update"] | {"gradients": zero.kept_gradients, "copies of the update": 0.0}
    translation = subject.translation(config, workload)
    generation = translation.working
    of_save = {name: size for name, size in zero.in_save.items() if name not in always}
    moments |= {
        "evaluation": always | of_save | {"generation": generation, "gathered weights": zero.whole},
        "save": always | of_save | {"gathered weights": zero.single},
    }
    if resolved.tensor_parallel_size > 1:
        moments["splitting of layers"] = before_split(subject.weights, recipe, config)
    uses_kernels = bool(first.bf16_products) and linear.has_fast_bf16()
    # Kernels are kept from one micro-batch to the next; each token of a search has products of its own.
    kept = {name: most_kernels() if uses_kernels else 0 for name in moments}
    kept["start"] = 0
    if uses_kernels and workload.shapes is not None:
        trained_with = min(most_kernels(), len(subject.bf16_products(workload.shapes, config, recompute)))
        kept |= {name: trained_with for name in moments if name not in PHASES}
    for name, items in moments.items():
        items["kernels of matrix products"] = float(kept[name] * CPU_KERNEL)
        if keeps:
            items["free blocks of the heap"] = sum(share * items.get(name, 0.0) for name, share in HEAP_LOSS.items())
    imported = CPU_PEFT if recipe.model.lora else CPU_COMPILER if resolved.zero_stage else 0
    moments = {name: _complete(items, imported, starts=name == "start") for name, items in moments.items()}
    totals = {name: sum(items.values()) for name, items in moments.items()}
    largest = max(totals, key=lambda name: totals[name])
    phases = {name: totals[name] for name in PHASES if name in totals}
    phases["step"] = max(total for name, total in totals.items() if name not in PHASES)
    ranks = ranks_per_node or resolved.world_size
    trained = sum(item.numel for item in subject.weights if item.trained)
    return Plan(
        deepspeed=recipe.deepspeed,
        micro_batch_size=clips,
        accumulation_steps=accumulation,
        items=moments[largest],
        moment=largest,
        phases={name: phases[name] for name in PHASES},
        host=ranks * totals[largest],
        pinned=0.0,
        nvme=0.0,
        checkpoint=trained * CHECKPOINT_BYTES,
        zero=zero,
        pass_=first,
    )


def _complete(items: Items, imported: int, *, starts: bool) -> Items:
    """With what a process holds besides tensors; items of nothing are left out."""
    process = {
        "libraries": float(CPU_LIBRARIES),
        "libraries that ZeRO and PEFT import": float(imported),
        "other objects": float(CPU_OBJECTS[0 if starts else 1]),
    }
    return {name: size for name, size in (items | process).items() if size}
