"""One rank of test_backbone_weights.py: fills models in every form that two ranks can hold, and writes the results."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, distributed
from transformers import AutoConfig, PreTrainedModel

from tests.rank_workers import joined
from toolkit.cpu.allocator import return_freed_memory
from toolkit.models.loading.backbone_weights import Placement, published_backbone, random_backbone
from toolkit.models.loading.weights import count_weights, whole_state_dict
from toolkit.recipe.sections.model import Quantization

CPU = torch.device("cpu")


def main() -> None:
    return_freed_memory()
    with joined() as worker:
        worker.write(results_of(worker.plan))


def results_of(plan: dict[str, Any]) -> dict[str, Any]:
    """Whether each form holds the right weights, and the memory that building a large model takes, by case."""
    zero3 = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}
    results: dict[str, Any] = {}
    for name, values in plan["configs"].items():
        config = AutoConfig.for_model(name, **values)
        for dtype in (torch.float32, torch.bfloat16):
            whole = random_backbone(config, Placement(dtype, CPU), seed=1)
            partitioned = random_backbone(config, Placement(dtype, CPU, zero3), seed=1)
            assert all(parameter.numel() == 0 for parameter in partitioned.parameters()), (
                "each rank keeps its partition"
            )
            results[f"{name} {dtype}"] = same(whole.state_dict(), whole_state_dict(partitioned, keep=True))
        nf4 = Quantization(kind="nf4")
        whole, partitioned = (
            random_backbone(config, Placement(torch.bfloat16, CPU, zero, nf4), seed=1) for zero in (None, zero3)
        )
        results[f"{name} nf4"] = same(dequantised(whole), dequantised(partitioned))
    folder, config = plan["published"], AutoConfig.from_pretrained(plan["published"])
    whole = published_backbone(folder, config, Placement(torch.float32, CPU))
    for what, quantization in (("published", None), ("published nf4", nf4)):
        whole, partitioned = (
            published_backbone(folder, config, Placement(torch.bfloat16, CPU, zero, quantization))
            for zero in (None, zero3)
        )
        read = dequantised if quantization else (lambda model: whole_state_dict(model, keep=True))
        results[what] = same(read(whole), read(partitioned))
    large = AutoConfig.for_model("t5", **plan["large"])
    results["memory"] = memory(large, Placement(torch.bfloat16, CPU, zero3))
    results["memory nf4"] = memory(large, Placement(torch.bfloat16, CPU, None, nf4))
    return results


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two models are equal on every rank."""
    equal = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    everywhere = torch.tensor(int(equal))
    distributed.all_reduce(everywhere, op=distributed.ReduceOp.MIN)
    return bool(everywhere.item())


def dequantised(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight as the layers compute with it."""
    import deepspeed

    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            state = getattr(parameter, "quant_state", None)
            values = parameter.data if state is None else bitsandbytes.functional.dequantize_4bit(parameter.data, state)
            weights[name] = values.clone()
    return weights


def memory(config: Any, placement: Placement) -> dict[str, float]:
    """MiB that all ranks together grow by at most while a model is built, and MiB of one whole copy in bf16."""
    gc.collect()  # models before this one would give way during the build
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier cases have freed would be filled first, and nothing would grow
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    model = random_backbone(config, placement, seed=1)
    grown = torch.tensor(resident("VmHWM") - before, dtype=torch.float64)
    distributed.all_reduce(grown)
    return {"grown": grown.item(), "copy": count_weights(model.parameters()) * 2 / 2**20}


def resident(key: str) -> float:
    """MiB of memory by that name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
