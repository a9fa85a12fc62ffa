"""Model states that one rank holds, in bytes, by arithmetic: numbers × bytes of each.

Model states are parameters, gradients, and the optimizer's master copy and moments (Rajbhandari et al. 2020, "ZeRO").
Activations, the CUDA context and fragments come on top and are not estimated here; a card counts as large enough when
the states leave a third of it free.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.planning.counts import Counts
from toolkit.recipe.deepspeed.cells import offload_device, parameter_precision
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

GIB = 2**30
STATES_SHARE = 2 / 3  # of a card; the rest is for activations and what else lives there

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
# A weight and its share of the scales: one per row in int8; one per 64 weights in NF4, itself packed (Dettmers et al.
# 2023, section 3: 0.127 bits a weight).
PACKED_BYTES = {"int8": 1.0, "nf4": (4 + 0.127) / 8}
# Moments of an optimizer, in numbers per trained number, and the bytes of each.
MOMENTS = {"adamw": (2, 4.0), "adamw8bit": (2, 1.0), "lion": (1, 4.0), "muon": (1, 4.0), "adafactor": (0, 4.0)}


@dataclass(frozen=True)
class States:
    """Bytes that one rank holds.

    Attributes:
        parameters: on its device.
        gathered: on its device, at most: parameters that stage 3 has gathered for use.
        gradients: on its device.
        optimizer: master copy and moments on its device.
        buckets: on its device, for communication.
        host: in the host's memory, for this rank: what is offloaded there, not what goes to a disk.
    """

    parameters: float
    gathered: float
    gradients: float
    optimizer: float
    buckets: float
    host: float

    @property
    def device(self) -> float:
        """All that lies on the device."""
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.buckets

    def fits(self, card_gib: float) -> bool:
        """Whether a card of so many GiB holds them and leaves a third for activations."""
        return self.device <= card_gib * GIB * STATES_SHARE

    def sum_of_terms(self) -> str:
        """The terms in GiB, largest first, and their sum."""
        terms = {
            "parameters": self.parameters,
            "gathered parameters": self.gathered,
            "gradients": self.gradients,
            "master copy and moments": self.optimizer,
            "buckets": self.buckets,
        }
        listed = sorted((size, name) for name, size in terms.items() if size >= GIB / 100)
        total = " + ".join(f"{size / GIB:.2f} {name}" for size, name in reversed(listed))
        return f"{total} = {self.device / GIB:.1f} GiB"


def model_states(counts: Counts, recipe: Recipe, config: Tree, world_size: int) -> States:
    """What one rank holds.

    Args:
        counts: of the recipe's model.
        recipe: names optimizer and quantisation.
        config: the DeepSpeed JSON, resolved or not.
        world_size: number of ranks.
    """
    stage = int(value_at(config, "zero_optimization.stage") or 0)
    states_on, parameters_on = offload_device(config, "optimizer"), offload_device(config, "param")
    number = BYTES[parameter_precision(config)]
    lean = bool(value_at(config, "bf16.bf16_master_weights_and_grads"))
    trained = counts.trainable + counts.pose_encoder

    kind = recipe.model.quantization.kind if recipe.model.quantization else None
    parameters = (trained + counts.frozen) * number + counts.packed * (PACKED_BYTES[kind] if kind else 0)
    accumulated = value_at(config, "data_types.grad_accum_dtype")
    gradient = BYTES[accumulated] if accumulated and not lean else number
    # Stage 0 in fp32 updates the parameters themselves; every other way keeps a copy to update.
    master = 0.0 if stage == 0 and number == BYTES["fp32"] else number if lean else BYTES["fp32"]
    moments, moment = MOMENTS[recipe.training.optimizer]
    if value_at(config, "bf16.bf16_optimizer_states"):
        moment = min(moment, BYTES["bf16"])

    gradients = trained * gradient / (world_size if stage >= 2 else 1)
    optimizer = trained * (master + moments * moment) / (world_size if stage >= 1 else 1)
    gathered = buckets = 0.0
    if stage == 3:
        # A single rank gathers its parameters from one partition, and that makes a copy, too.
        live = float(value_at(config, "zero_optimization.stage3_max_live_parameters") or 1e9)
        gathered = min(live * number, parameters)
        parameters /= world_size
    if stage >= 1:
        sizes = ("reduce_bucket_size", "allgather_bucket_size" if stage < 3 else "stage3_prefetch_bucket_size")
        buckets = (
            sum(min(float(value_at(config, f"zero_optimization.{size}") or 5e8), trained) for size in sizes) * number
        )
    return States(
        parameters=0.0 if parameters_on else parameters,
        gathered=gathered,
        gradients=0.0 if states_on else gradients,
        optimizer=0.0 if states_on else optimizer,
        buckets=buckets,
        host=(parameters if parameters_on == "cpu" else 0.0) + (gradients + optimizer if states_on == "cpu" else 0.0),
    )
