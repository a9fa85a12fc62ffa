"""What training.compile becomes: where layers are compiled, where they cannot be, and what is refused."""

from __future__ import annotations

import pytest

from tests.recipe.resolving import error_of, run_of
from toolkit.errors import UserError
from toolkit.recipe.compilation import Compilation, compilation
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import padding_of


def compilation_of(*overrides: str, ds: str = "zero2", has_gpu: bool = True) -> Compilation:
    run = run_of("t5_small", *overrides, ds=ds, has_gpu=has_gpu)
    return compilation(run.recipe, run.deepspeed, has_gpu=has_gpu)


@pytest.mark.parametrize(
    ("overrides", "ds", "has_gpu", "compiles", "word"),
    [
        ([], "zero0", True, True, "auto"),
        ([], "zero1", True, True, "auto"),
        ([], "zero2_offload", True, True, "auto"),
        ([], "zero3", True, False, "stage 3"),
        (["ds.compile.deepcompile=true"], "zero1", True, False, "deepcompile"),
        ([], "zero2", False, False, "CPU"),
        (["model.lora.r=8", "training.gradient_checkpointing=true"], "zero2", True, True, "auto"),
        (["training.compile=false"], "zero2", True, False, "false"),
        (["model.backbone=led_base"], "zero2", True, False, "led"),
        (["model.quantization=nf4", "model.lora.r=8"], "zero2", True, False, "nf4"),
        (["training.compile=true"], "zero2", False, True, "true"),
        (["training.compile=true", "ds.compile.deepcompile=true"], "zero3", True, False, "deepcompile"),
    ],
)
def test_layers_are_compiled_where_they_can_be(
    overrides: list[str], ds: str, has_gpu: bool, compiles: bool, word: str
) -> None:
    found = compilation_of(*overrides, ds=ds, has_gpu=has_gpu)
    assert found.compiles is compiles
    assert word in found.in_words() and "\n" not in found.in_words()


@pytest.mark.parametrize(
    ("overrides", "ds", "word"),
    [
        ([], "zero3", "stage 3"),
        (["model.backbone=led_base"], "zero2", "led"),
        (["model.quantization=nf4", "model.lora.r=8"], "zero2", "nf4"),
    ],
)
def test_where_they_cannot_be_true_is_refused(overrides: list[str], ds: str, word: str) -> None:
    error = error_of("t5_small", "training.compile=true", *overrides, ds=ds, has_gpu=True)
    assert "training.compile=true" in error.message and word in error.message
    assert "training.compile=auto" in error.hint


@pytest.mark.parametrize("value", ["graph", "1", "null", "[true]"])
def test_another_value_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"training\.compile"):
        load_recipe("t5_small", [f"training.compile={value}"])


@pytest.mark.parametrize(
    ("overrides", "ds"),
    [
        ([], "zero0"),
        ([], "zero1"),
        (["ds.bf16.enabled=false"], "zero1"),
        (["ds.bf16.enabled=false", "ds.torch_autocast.enabled=true", "ds.torch_autocast.dtype=bfloat16"], "zero1"),
        (["model.lora.r=8"], "zero1"),
        (["training.padding=ladder"], "zero1"),
    ],
)
def test_passes_are_graphs_where_they_can_be(overrides: list[str], ds: str) -> None:
    run = run_of("t5_small", "training.compile=graphs", *overrides, ds=ds, has_gpu=True)
    found = compilation(run.recipe, run.deepspeed, has_gpu=True)
    assert found.graphs and found.compiles and "graphs" in found.in_words()
    assert padding_of(run.recipe.training, has_gpu=False) == "ladder", "a graph belongs to one shape"
    on_cpus = compilation(run.recipe, run.deepspeed, has_gpu=False)
    assert on_cpus.graphs and not on_cpus.compiles and "CPU" in on_cpus.in_words() and "\n" not in on_cpus.in_words()


@pytest.mark.parametrize(
    ("overrides", "ds", "word"),
    [
        ([], "zero2", "stage 2"),
        ([], "zero2_offload", "stage 2"),
        ([], "zero3", "stage 3"),
        (["ds.compile.deepcompile=true"], "zero1", "deepcompile"),
        (["ds.zero_optimization.offload_optimizer.device=cpu"], "zero1", "offload"),
        (["ds.torch_autocast=null", "ds.bf16.enabled=true"], "zero0", "bf16"),
        (["ds.timers.throughput.enabled=true"], "zero1", "timers"),
        (["ds.wall_clock_breakdown=true"], "zero1", "wall_clock_breakdown"),
        (["training.gradient_checkpointing=true"], "zero1", "gradient_checkpointing"),
        (["training.freeze_backbone_steps=5"], "zero1", "freeze_backbone_steps"),
        (["training.ctc_weight=0.3"], "zero1", "ctc_weight"),
        (["training.padding=longest"], "zero1", "longest"),
        (["model.quantization=nf4", "model.lora.r=8"], "zero1", "quantization"),
        (["model.backbone=led_base"], "zero1", "led"),
        (["model.backbone=longt5_base"], "zero1", "longt5"),
    ],
)
def test_where_they_cannot_graphs_are_refused(overrides: list[str], ds: str, word: str) -> None:
    error = error_of("t5_small", "training.compile=graphs", *overrides, ds=ds, has_gpu=True)
    assert "training.compile=graphs" in error.message and word in error.message
    assert "training.compile=auto" in error.hint


@pytest.mark.parametrize("value", [True, False, "auto", "graphs"])
def test_its_values_are_kept(value: bool | str) -> None:
    assert load_recipe("t5_small", [f"training.compile={value}".lower()]).training.compile == value
