"""The recipe's optimiser in the words of a DeepSpeed JSON, and where each optimiser cannot go.

What DeepSpeed 0.19.8 does with each, tried on two ranks:

* AdamW is torch's fused one, or DeepSpeed's CPUAdam where the JSON offloads the states.
* AdamW8bit and Lion are bitsandbytes', which run on GPUs and, slowly, on CPUs. DeepSpeed's own Lion would have to be
  compiled, and has no CPU backend unless the states are offloaded.
* Adafactor is torch's. Its second moments are factored by rows and columns, which ZeRO's flat pieces no longer have.
* Muon is DeepSpeed's, with AdamW for all that is not a hidden matrix. DeepSpeed clips its orthogonalised update in
  place of the gradient, and at stage 1 with bf16 parameters leaves the orthogonalisation out without a word.
"""

from __future__ import annotations

from typing import Any

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
    """The JSON's ``optimizer`` section.

    Args:
        training: the recipe's section.
        implementation: what the JSON says of how AdamW is carried out.
        offloaded: whether optimiser states lie outside the device.
    """
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
            # torch's own fused AdamW runs on CPU and GPU alike; DeepSpeed's FusedAdam would have to be compiled first.
            # Offloaded states keep DeepSpeed's CPUAdam, which is made for them.
            implementation = {"torch_adam": True, "fused": True, **implementation}
        params |= implementation
    return {"type": OPTIMIZER_TYPES[name], "params": params}


def optimizer_keys(optimizer: str, *, stage: int, offloaded: bool) -> Tree:
    """Top-level keys without which DeepSpeed refuses this optimiser, and needs not to.

    ``toolkit.training`` hands these optimisers over itself; all of them work on flat pieces, which is what the
    missing test of theirs would have been about.
    """
    if OPTIMIZER_TYPES[optimizer] in MADE_BY_DEEPSPEED or stage == 0:
        return {}
    return {"zero_allow_untested_optimizer": True, **({"zero_force_ds_cpu_optimizer": False} if offloaded else {})}


def optimizer_problems(
    training: Training, config: Tree, *, stage: int, precision: str, offload: str | None
) -> list[str]:
    """Why DeepSpeed refuses this optimiser here, or would train something else with it; empty when all is well.

    Args:
        training: the recipe's section.
        config: the DeepSpeed JSON.
        stage: ZeRO stage.
        precision: of the parameters: ``fp32``, ``bf16`` or ``fp16``.
        offload: device that optimiser states are offloaded to; None where they stay.
    """
    name = training.optimizer
    problems = []
    if name == "adafactor" and stage:
        problems.append(
            f"training.optimizer=adafactor needs ZeRO stage 0, not {stage}: it factors whole matrices, which ZeRO cuts "
            "into pieces, and its losses would change with the stage; use --ds zero0 or training.optimizer=adamw8bit"
        )
    if name == "adamw8bit" and offload:
        problems.append(
            f"training.optimizer=adamw8bit keeps its small states on the device, and DeepSpeed refuses it with "
            f"zero_optimization.offload_optimizer ({offload}): use training.optimizer=adamw, or "
            "ds.zero_optimization.offload_optimizer=null"
        )
    if name in ("lion", "muon") and offload == "nvme":
        problems.append(
            f"training.optimizer={name} cannot swap its states to nvme: use training.optimizer=adamw, or "
            "ds.zero_optimization.offload_optimizer.device=cpu"
        )
    if name == "muon":
        problems.extend(_muon_problems(training, config, stage, precision))
    if training.ema and offload == "nvme":
        problems.append(
            "training.ema averages in memory what nvme would hold: set training.ema=null, or "
            "ds.zero_optimization.offload_optimizer.device=cpu"
        )
    return problems + _implementation_problems(name, config) + _half_precision_problems(config, stage, offload)


def _muon_problems(training: Training, config: Tree, stage: int, precision: str) -> list[str]:
    problems = []
    if stage and training.gradient_clipping:
        problems.append(
            f"training.optimizer=muon with ZeRO stage {stage} would have its update clipped instead of the gradient: "
            "set training.gradient_clipping=0, or use --ds zero0"
        )
    if stage == 1 and precision != "fp32":
        problems.append(
            f"training.optimizer=muon at ZeRO stage 1 with {precision} parameters is plain SGD in DeepSpeed: "
            "use --ds zero2"
        )
    if stage == 3 and (config.get("zero_optimization") or {}).get("reduce_scatter"):
        problems.append(
            "training.optimizer=muon at ZeRO stage 3 needs whole gradients: "
            "set ds.zero_optimization.reduce_scatter=false"
        )
    return problems


def _implementation_problems(name: str, config: Tree) -> list[str]:
    section = config.get("optimizer")
    given: Any = section.get("params") if isinstance(section, dict) else None
    if name == "adamw" or not given:
        return []
    return [
        f"optimizer.params.{key} says how AdamW is carried out, and training.optimizer is {name}: "
        f"set ds.optimizer.params.{key}=null"
        for key in given
    ]


def _half_precision_problems(config: Tree, stage: int, offload: str | None) -> list[str]:
    """Where DeepSpeed asserts, once the model is there, that it cannot hold master weights or moments in 16 bits."""
    master, states = "bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"
    half = "fp16.fp16_master_weights_and_grads"
    asked = [
        key
        for key in (master, states, half)
        if value_at(config, key) and value_at(config, f"{key.split('.')[0]}.enabled")
    ]
    if not asked:
        return []
    if stage == 0:
        return [f"{' and '.join(asked)} need ZeRO stage 1, 2 or 3: set ds.zero_optimization.stage=2"]
    problems = []
    on_host = "ds.zero_optimization.offload_optimizer.device=cpu"
    if states in asked and master not in asked:
        problems.append(f"{states}=true needs {master}=true: set ds.{master}=true")
    if states not in asked and master in asked and not offload:
        problems.append(f"{master}=true with moments in fp32 needs them offloaded: set {on_host}, or ds.{states}=true")
    if states in asked and offload and value_at(config, "optimizer.params.fp32_optimizer_states") is not False:
        moments = "optimizer.params.fp32_optimizer_states"
        problems.append(f"{states}=true with offloaded moments needs {moments}=false: set ds.{moments}=false")
    if half in asked and not offload:
        problems.append(f"{half}=true needs offloaded moments: set {on_host}")
    return problems
