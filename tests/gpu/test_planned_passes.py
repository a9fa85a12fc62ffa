"""What torch's allocator holds in a forward and backward pass beside what a plan's trace says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from toolkit.cluster.devices import choose_device
from toolkit.models.backbone import set_checkpointing
from toolkit.models.backbone_config import backbone_config, fit_dropout, fit_rows
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.models.loss import GPU_SCORES, translation_losses
from toolkit.planning.costs.counts import adapted_translator
from toolkit.planning.costs.tracing import shorten, trace
from toolkit.recipe.load import load_recipe

CLIPS, FRAMES, TOKENS = 16, 96, 24
CASES = {
    "t5": ("t5_small",),
    "gated": ("mt5_base",),
    "lora": ("t5_small", "model.lora.r=4"),
    "stgcn": ("t5_small", "model.pose_encoder=stgcn"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_a_pass_holds_what_was_traced(case: str, autocast: bool, checkpointing: bool) -> None:
    name, *overrides = CASES[case]
    choose_device("cuda")  # with the kernels of a run
    recipe = load_recipe(name, [*overrides, "model.tiny=true", "model.from_scratch=true"])
    config = backbone_config(recipe.model)
    fit_dropout(config, recipe.model)
    fit_rows(config, 800)
    dtype = torch.float32 if autocast else torch.bfloat16
    sizes = {"clips": CLIPS, "frames": FRAMES, "tokens": TOKENS}
    empty = shorten(adapted_translator(config, recipe)[0])
    traced = trace(empty, **sizes, dtype=dtype, autocast=autocast, checkpointing=checkpointing)
    model = adapted_translator(config, recipe)[0].to_empty(device="cuda").to(dtype).train()
    use_gpu_layers(model)
    set_checkpointing(model.backbone, checkpointing)
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.uniform_(tensor, -0.05, 0.05) if tensor.is_floating_point() else tensor.zero_()
    with dropped_gradients(model):
        one_pass(model, dtype, autocast)  # libraries allocate their workspaces
        dropped = peak_of_a_pass(model, dtype, autocast)
    kept = peak_of_a_pass(model, dtype, autocast)
    # With gradients the peak of so small a model is in its pose encoder, whose convolutions copy what they read.
    for least, planned, measured in ((0.95, traced.peak, dropped), (0.85, traced.peak_with_gradients, kept)):
        assert least <= planned / measured <= 1.1, f"{planned / 2**20:.1f} MiB planned, {measured / 2**20:.1f} measured"


def peak_of_a_pass(model: nn.Module, dtype: torch.dtype, autocast: bool) -> int:
    """Most bytes at once, without those that were there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one_pass(model, dtype, autocast)
    return torch.cuda.max_memory_allocated() - before


def one_pass(model: nn.Module, dtype: torch.dtype, autocast: bool) -> None:
    """Forward and backward over a batch without padding."""
    shapes = model.config.input_shapes(CLIPS, FRAMES)
    inputs = {name: torch.ones(shape, dtype=kind, device="cuda") for name, (shape, kind) in shapes.items()}
    inputs["frame_mask"][0, FRAMES - 8 :] = False
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss, _ = translation_losses(
            model,
            **inputs,
            labels=torch.full((CLIPS, TOKENS), 7, device="cuda"),
            labelled=torch.arange(CLIPS * TOKENS, device="cuda"),
            special_ids=torch.tensor([0], device="cuda"),
            label_smoothing=0.1,
            scores_at_once=GPU_SCORES,
        )
    loss.backward()


@contextmanager
def dropped_gradients(model: nn.Module) -> Iterator[None]:
    """Within it the gradient of each weight goes as it comes, as the trace counts it."""

    def drop(weight: torch.Tensor) -> None:
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(drop) for weight in model.parameters() if weight.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
