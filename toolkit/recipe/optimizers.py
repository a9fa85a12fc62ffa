"""The recipe's optimizer as a section of the DeepSpeed JSON, and what each optimizer cannot be combined with.

What DeepSpeed 0.19.8 does with each, tried on two ranks:

* AdamW is torch's fused one, or DeepSpeed's CPUAdam where the JSON offloads the states.
* AdamW8bit and Lion are bitsandbytes', which run on GPUs and, slowly, on CPUs. DeepSpeed's own Lion would have to be
  compiled, and has no CPU backend unless the states are offloaded.
* Adafactor is torch's. Its second moments are factored by rows and columns, which ZeRO's flat partitions do not have.
* Muon is DeepSpeed's, with AdamW for all that is not a hidden matrix. DeepSpeed clips its orthogonalised update instead
  of the gradient, and at stage 1 with bf16 parameters it leaves the orthogonalisation out without a message.
"""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.cells import training_precision
from toolkit.recipe.schema import Training
from toolkit.recipe.tree import Tree, value_at

# The recipe's name -> the ``type`` in the DeepSpeed JSON.
OPTIMIZER_TYPES = {
    "adamw": "AdamW",
    "adamw8bit": "AdamW8bit",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "muon": "Muon",
}
# Those that DeepSpeed itself makes from its JSON; the others are made by ``toolkit/training/optimization``.
MADE_BY_DEEPSPEED = ("AdamW", "Adafactor")
MUON_MOMENTUM = 0.95  # Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/


def optimizer_section(training: Training, implementation: Tree, *, offloaded: bool) -> Tree:
    """The JSON's ``optimizer`` section; ``implementation`` are its own keys for how AdamW is carried out."""
    params: Tree = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    name = training.optimizer
    if name == "adafactor":
        return {"type": OPTIMIZER_TYPES[name], "params": params}
    params["betas"] = list(training.betas)
    if name == "muon":
        params |= {"momentum": MUON_MOMENTUM}
    if name != "lion":
        params["eps"] = training.eps
    if name == "adamw":
        if not offloaded and "torch_adam" not in implementation:
            # torch's fused AdamW runs on CPU and GPU; DeepSpeed's FusedAdam would have to be compiled first.
            # Offloaded states keep DeepSpeed's CPUAdam, which is made for them.
            implementation = {"torch_adam": True, "fused": True, **implementation}
        params |= implementation
    return {"type": OPTIMIZER_TYPES[name], "params": params}


def optimizer_keys(optimizer: str, *, stage: int, offloaded: bool) -> Tree:
    """Top-level keys without which DeepSpeed refuses this optimizer as untested.

    ``toolkit.training`` makes these optimizers; all of them work on ZeRO's flat partitions.
    """
    if OPTIMIZER_TYPES[optimizer] in MADE_BY_DEEPSPEED or stage == 0:
        return {}
    return {"zero_allow_untested_optimizer": True, **({"zero_force_ds_cpu_optimizer": False} if offloaded else {})}


def loop_clips(config: Tree) -> bool:
    """Whether the training loop clips gradients, and not DeepSpeed: at stage 0 with fp32 parameters and no loss scale.

    There DeepSpeed would take the norm again, which the loop has, and scale tensor by tensor.
    """
    return not value_at(config, "zero_optimization.stage") and training_precision(config) in ("fp32", "autocast")


def optimizer_problems(
    training: Training, config: Tree, *, stage: int, precision: str, offload: str | None
) -> Iterator[UserError]:
    """Why DeepSpeed refuses this optimizer here, or would train something else with it.

    ``precision`` is that of the parameters; ``offload`` the device that optimizer states are offloaded to, or None.
    """
    name = training.optimizer
    key = f"training.optimizer={name}"
    on_host = "ds.zero_optimization.offload_optimizer.device=cpu"
    if name == "adafactor" and stage:
        yield UserError(
            f"{key} needs ZeRO stage 0, not {stage}: it factors whole matrices, which ZeRO partitions, and its "
            "losses would change with the stage",
            "use --ds zero0, or set training.optimizer=adamw8bit",
        )
    if name == "adamw8bit" and offload:
        yield UserError(
            f"{key} keeps its states on the device, and DeepSpeed refuses it with "
            f"zero_optimization.offload_optimizer ({offload})",
            "set training.optimizer=adamw or ds.zero_optimization.offload_optimizer=null",
        )
    if name in ("lion", "muon") and offload == "nvme":
        yield UserError(f"{key} cannot swap its states to nvme", f"set training.optimizer=adamw or {on_host}")
    if name == "muon" and stage and training.gradient_clipping:
        yield UserError(
            f"{key} with ZeRO stage {stage} has its update clipped instead of the gradient",
            "set training.gradient_clipping=0, or use --ds zero0",
        )
    if name == "muon" and stage == 1 and precision != "fp32":
        yield UserError(
            f"{key} at ZeRO stage 1 with {precision} parameters is plain SGD in DeepSpeed", "use --ds zero2"
        )
    if name == "muon" and stage == 3 and value_at(config, "zero_optimization.reduce_scatter"):
        yield UserError(f"{key} at ZeRO stage 3 needs whole gradients", "set ds.zero_optimization.reduce_scatter=false")
    if training.ema and offload == "nvme":
        message = f"training.ema={training.ema} averages in memory what is on nvme"
        yield UserError(message, f"set training.ema=null or {on_host}")
    given = value_at(config, "optimizer.params")
    for implementation in given if isinstance(given, dict) and name != "adamw" else ():
        yield UserError(
            f"optimizer.params.{implementation} is for AdamW, and training.optimizer is {name}",
            f"set ds.optimizer.params.{implementation}=null",
        )
