"""Traced passes against real ones on the CPU, and the extrapolation of depth and of the micro-batch against traces."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit.errors import UserError
from toolkit.models.backbone import layer_list
from toolkit.models.backbone_config import backbone_config, fit_dropout
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.models.loss import GPU_SCORES, translation_losses
from toolkit.planning import subject as subjects
from toolkit.planning.costs import tracing
from toolkit.planning.costs.counts import PACKED, adapted_translator
from toolkit.planning.costs.kernels import PackedLinear, as_on_gpu
from toolkit.planning.costs.tracing import shorten, trace
from toolkit.planning.subject import Subject
from toolkit.recipe.load import load_recipe

SHAPE = {"clips": 4, "frames": 60, "tokens": 9}


def empty(name: str, *overrides: str):
    recipe = load_recipe(name, [*overrides, "model.from_scratch=true"])
    config = backbone_config(recipe.model)
    fit_dropout(config, recipe.model)
    return adapted_translator(config, recipe)[0]


@pytest.mark.parametrize(
    "name", ["t5_small", "bart_large", "m2m100", "byt5_small", "t5_small model.backbone=smollm2_135m"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("on_cpu", [False, True], ids=["gpu", "cpu"])
def test_layers_that_are_left_out_count_as_if_they_were_traced(
    name: str, checkpointing: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exactly as each adds the same: what a stack has once, such as T5's position bias, is counted once."""
    settings = {**SHAPE, "dtype": torch.bfloat16, "checkpointing": checkpointing, "on_cpu": on_cpu}
    from_three = trace(shorten(empty(*name.split())), **settings)
    monkeypatch.setattr(tracing, "LAYERS", 99)
    whole = trace(shorten(empty(*name.split())), **settings)
    for figure in ("saved", "peak", "kernels", "flops"):
        assert getattr(from_three, figure) == getattr(whole, figure), figure
    assert from_three.peak_with_gradients == pytest.approx(whole.peak_with_gradients, rel=0.01)


def test_gradients_that_are_kept_come_while_activations_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """At their peak there are more activations than in the end, and fewer gradients."""
    monkeypatch.setattr(tracing, "LAYERS", 99)
    model = empty("t5_small")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    many, few = (
        trace(shorten(model), **{**SHAPE, "clips": clips}, dtype=torch.bfloat16, gathers=True) for clips in (64, 1)
    )
    table = max(parameter.numel() for parameter in model.parameters())  # its gradient is a sum of two
    assert 2 * numbers < few.peak_with_gradients < 2 * (numbers + table), "all gradients, and few activations"
    assert many.peak <= many.peak_with_gradients < many.peak + numbers
    assert all((peak.kept > peak.alone) is part.has_gradients for part, peak in many.peaks.items())


def features_of(folder: Path, *others: str) -> tuple[str, ...]:
    """Settings of a recipe whose clips have features of 768 numbers a frame, and poses unless ``others`` say not."""
    np.save(folder / "clip.npy", np.zeros((4, 768), np.float32))
    return f"data.features={folder}", "model.feature_encoder.dropout=0", *others


@pytest.mark.parametrize("inputs", [None, (), ("data.poses=poses", "model.fusion=concat")], ids=["poses", "features",
                                                                                                 "both"])  # fmt: skip
def test_saved_bytes_are_those_of_a_real_pass(inputs: tuple[str, ...] | None, tmp_path: Path) -> None:
    """Without dropout and attention the kernels of a CPU keep what those of a GPU keep."""
    overrides = ("model.dropout=0", "model.pose_encoder.dropout=0", "model.tiny=true")
    overrides += () if inputs is None else features_of(tmp_path, *inputs)
    traced = trace(shorten(empty("t5_small", *overrides)), **SHAPE, dtype=torch.float32)
    model = empty("t5_small", *overrides).to_empty(device="cpu").train()
    use_gpu_layers(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    clips, frames, tokens = SHAPE.values()
    shapes = model.config.input_shapes(clips, frames)
    assert set(shapes) == {"poses", "visible", "frame_mask"} | ({"video_features"} if inputs is not None else set())
    read = {
        name: torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.randn(shape).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    read["frame_mask"][0, 50:] = False
    with as_on_gpu(autocast=False), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        translation_losses(
            model,
            **read,
            labels=torch.randint(3, 30, (clips, tokens)),
            labelled=torch.arange(clips * tokens),
            special_ids=torch.tensor([0]),
            label_smoothing=0.1,
            scores_at_once=GPU_SCORES,
        )
    # What lives beside it: the inputs and the losses.
    assert traced.saved == pytest.approx(sum(saved.values()), rel=0.05)


def test_the_layers_of_a_gpu_are_traced() -> None:
    """They join the projections of an attention, unless stage 3 gathers each weight when it is used."""
    shortened = shorten(empty("t5_small", "model.dropout=0", "model.pose_encoder.dropout=0"))
    joined, apart = (trace(shortened, **SHAPE, dtype=torch.bfloat16, gathers=gathers) for gathers in (False, True))
    # Three weights of each self-attention and two of each cross-attention are copied into one.
    copied = 6 * (3 + 3 + 2) * 512 * 512 * 2
    assert joined.saved - apart.saved == pytest.approx(copied, rel=0.01)
    assert joined.kernels < apart.kernels


def test_compiled_feed_forward_layers_keep_one_tensor() -> None:
    """For ReLU and dropout together: as they are written ReLU's result is there, too, and a mask of a byte a number."""
    model = empty("t5_small")
    rows = {"encoder": 4 * model.pose_encoder.length(60), "decoder": 4 * 9}
    shortened = shorten(model)
    written = trace(shortened, **SHAPE, dtype=torch.bfloat16).saved
    for stacks in (("encoder",), ("encoder", "decoder")):
        compiled = trace(shortened, **SHAPE, dtype=torch.bfloat16, compiled=stacks).saved
        assert written - compiled == pytest.approx(6 * 2048 * 3 * sum(rows[name] for name in stacks), rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "is_bool", "own"), [(16, False, False), (16, True, True), (13, False, True), (13, True, True)]
)
def test_each_attention_keeps_a_mask_that_its_kernel_can_read(tokens: int, is_bool: bool, own: bool) -> None:
    query = torch.empty(2, 4, tokens, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(2, 1, tokens, tokens, device="meta", dtype=torch.bool if is_bool else torch.bfloat16)
    saved: list[torch.Tensor] = []
    with (
        as_on_gpu(autocast=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
    ):
        torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    (kept,) = (tensor for tensor in saved if tensor.shape == mask.shape)
    assert kept.dtype == torch.bfloat16
    assert (kept.untyped_storage()._cdata != mask.untyped_storage()._cdata) is own
    assert kept.stride(-2) % 8 == 0


def test_a_quarter_of_the_clips_takes_a_quarter() -> None:
    shortened = shorten(empty("t5_small"))
    small, large = (  # without weights that are joined, which no clip changes
        trace(shortened, **{**SHAPE, "clips": clips}, dtype=torch.bfloat16, gathers=True) for clips in (4, 16)
    )
    assert large.saved == pytest.approx(4 * small.saved, rel=0.02)


def test_features_behind_the_poses_cost_as_many_positions_again(tmp_path: Path) -> None:
    """As of so many more frames of poses; the encoder of features is small beside the backbone."""
    poses = trace(shorten(empty("t5_small")), **{**SHAPE, "frames": 120}, dtype=torch.bfloat16)
    both = {
        fusion: trace(
            shorten(empty("t5_small", *features_of(tmp_path, "data.poses=poses", f"model.fusion={fusion}"))),
            **SHAPE,
            dtype=torch.bfloat16,
        )
        for fusion in ("sum", "concat")
    }
    assert both["concat"].flops == pytest.approx(poses.flops, rel=0.1)
    assert both["sum"].flops < 0.75 * poses.flops


def test_adapters_train_with_fewer_saved_tensors() -> None:
    full = trace(shorten(empty("t5_base")), **SHAPE, dtype=torch.bfloat16)
    lora = trace(shorten(empty("t5_base", "model.lora.r=16")), **SHAPE, dtype=torch.bfloat16)
    assert lora.flops < 0.8 * full.flops


def test_the_model_is_as_it_was_after_a_trace() -> None:
    functional = torch.nn.functional
    before = (functional.dropout, functional.linear, functional.scaled_dot_product_attention, torch.matmul)
    shortened = shorten(empty("demo", "model.tiny=true"))
    trace(shortened, **SHAPE, dtype=torch.float32, autocast=True, ctc_weight=1.0)
    assert (functional.dropout, functional.linear, functional.scaled_dot_product_attention, torch.matmul) == before
    assert all(parameter.grad is None for parameter in shortened.model.parameters())
    assert len(layer_list(shortened.model.backbone.get_encoder())) <= tracing.LAYERS


def test_a_fault_of_a_pass_is_not_taken_for_a_model_that_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("demo", ["model.tiny=true"])
    subject = Subject.of(recipe, rows=40)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(subjects, "trace", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        subject.trace(2, 60, 9, {}, checkpointing=False)

    def by_values(*_: object, **__: object) -> None:
        raise NotImplementedError("aten::nonzero")

    monkeypatch.setattr(subjects, "trace", by_values)
    with pytest.raises(UserError):
        subject.trace(2, 60, 9, {}, checkpointing=False)


@pytest.mark.parametrize("name", ["t5_small", "demo"])
def test_a_pass_on_a_cpu_keeps_the_scores_of_its_attention(name: str) -> None:
    shortened = shorten(empty(name))
    # So many frames that scores, which grow with their square, outweigh what convolutions in fp32 keep without AVX-512.
    settings = {**SHAPE, "frames": 4800, "dtype": torch.bfloat16}
    gpu, cpu = trace(shortened, **settings), trace(shortened, **settings, on_cpu=True)
    assert cpu.saved > 1.2 * gpu.saved
    assert cpu.peak > gpu.peak
    again = trace(shortened, **settings)
    assert (again.saved, again.peak) == (gpu.saved, gpu.peak), "the model stays as it was"


def test_layers_in_nf4_keep_no_inputs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.cpu.linear.has_fast_bf16", lambda: False)
    lora, nf4 = (
        trace(shorten(empty("t5_base", "model.lora.r=16", *more)), **SHAPE, dtype=torch.bfloat16, on_cpu=True)
        for more in ((), ("model.quantization=nf4",))
    )
    assert nf4.saved < 0.95 * lora.saved


@pytest.mark.parametrize("on_cpu", [False, True], ids=["gpu", "cpu"])
def test_autocast_keeps_no_bf16_copies_of_packed_weights(on_cpu: bool) -> None:
    settings = {**SHAPE, "dtype": torch.float32, "autocast": True, "on_cpu": on_cpu}
    lora, nf4, int8 = (
        empty("t5_base", "model.lora.r=16", *more)
        for more in ((), ("model.quantization=nf4",), ("model.quantization=int8",))
    )
    copies = 2 * sum(module.weight.numel() for module in nf4.modules() if hasattr(module, PACKED))
    kept = [trace(shorten(model), **settings).saved for model in (lora, nf4, int8)]
    assert kept[1] < kept[0] - 0.8 * copies
    assert kept[2] > kept[1], "int8 keeps its inputs"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_layers_keep_what_those_of_bitsandbytes_keep(kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    real = (
        bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        if kind == "nf4"
        else bitsandbytes.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    )
    real.load_state_dict({"weight": torch.randn(128, 64)})
    stand_in = PackedLinear(64, 128, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    stand_in.keeps_input = kind == "int8"
    kept, types = [], []
    for layer in (real.to("cpu"), stand_in):
        vectors = 2 * torch.randn(3, 5, 64, dtype=torch.bfloat16, requires_grad=True)
        storage = weakref.ref(vectors.untyped_storage())
        output = layer(vectors)
        del vectors
        kept.append(storage() is not None)
        types.append(output.dtype)
        output.sum().backward()
    assert kept == [kind == "int8"] * 2
    assert types == [torch.bfloat16] * 2
