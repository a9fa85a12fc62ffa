"""T5's layers for GPUs: fewer operator calls, and the same results whatever stands before their weights."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5DenseActDense

from tests.scripts import ROOT, load_script
from toolkit.models import gpu_layers
from toolkit.models.gpu_layers import use_gpu_layers

FEWER = 0.4  # of the operator calls, at least
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_heads": 4,
    "num_decoder_layers": 12,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}


def models(kind: str = "t5", layers: int = 12) -> tuple[Any, Any]:
    """Transformers' own, and a copy with layers for GPUs."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_layers": layers, "num_decoder_layers": layers}
    own: Any = {
        "t5": lambda: T5ForConditionalGeneration(T5Config(**sizes)),
        "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**sizes, feed_forward_proj="gated-gelu")),
    }[kind]()
    quick = copy.deepcopy(own)
    use_gpu_layers(quick)
    return own.train(), quick.train()


def loss_of(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, 9, 16, generator=generator)
    mask = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., 5:] = False
    labels = torch.randint(1, 50, (3, 7), generator=generator)
    states = model.encoder(inputs_embeds=vectors, attention_mask=mask)
    loss: Tensor = model(encoder_outputs=states, attention_mask=mask, labels=labels, use_cache=False).loss
    return loss


def same(own: Any, quick: Any, tolerance: float = 1e-5) -> None:
    """Losses and gradients of both."""
    losses = [loss_of(model) for model in (own, quick)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance)
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(quick.named_parameters(), own.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=100 * tolerance, atol=tolerance, msg=name)


def calls_of(model: Any, *, autocast: bool = False) -> Any:
    """Operator calls of a forward and a backward pass."""
    benchmark = load_script("benchmarks/operator_calls.py")
    with benchmark.calls_of_a_gpu(), benchmark.Calls() as calls:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model)
        loss.backward()
    return calls


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_they_need_fewer_operator_calls(kind: str, autocast: bool) -> None:
    own, quick = (calls_of(model, autocast=autocast) for model in models(kind))
    assert quick.total <= (1 - FEWER) * own.total
    assert quick.kernels < own.kernels


def test_projections_of_the_same_states_are_one_product() -> None:
    """Queries, keys and values of 2 layers in 2 stacks, keys and values of 2 layers: a forward and 2 backward."""
    own, quick = (calls_of(model).operators["aten.mm.default"] for model in models(layers=2))
    assert own - quick == 3 * (4 * 2 + 2 * 1)


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_they_compute_the_same_in_autocast(kind: str) -> None:
    own, quick = models(kind, layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_of(model) for model in (own, quick)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    assert losses[1].dtype == losses[0].dtype
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(quick.parameters(), own.parameters(), strict=True):
        assert mine.grad.dtype == theirs.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.1, atol=0.02)


def test_layers_with_hooks_are_called() -> None:
    """ZeRO stage 3 gathers a weight in a hook, and the first pass counts its FLOPs in hooks."""
    own, quick = models(layers=2)
    seen: list[str] = []
    linear = {name: module for name, module in quick.named_modules() if type(module) is torch.nn.Linear}
    for name, module in linear.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    same(own, quick)
    assert sorted(seen) == sorted(linear)


def test_adapters_are_called() -> None:
    own, quick = models(layers=2)
    for model in (own, quick):
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False), model)
    same(own, quick)
    assert sum(".lora_" in name and value.grad.any().item() for name, value in quick.named_parameters()) == 2 * 2 * 6


def adapted(rank: int, **settings: Any) -> tuple[Any, Any]:
    """A T5 with low-rank adapters of queries and values, all else frozen, and a copy with layers for GPUs."""
    own, _ = models(layers=2)
    config = LoraConfig(r=rank, target_modules=["q", "v"], init_lora_weights=False, **settings)
    inject_adapter_in_model(config, own)
    for name, weight in own.named_parameters():
        weight.requires_grad_(".lora_" in name)
    own.encoder.block[0].layer[0].layer_norm.weight.requires_grad_()  # so that states have gradients
    quick = copy.deepcopy(own)
    use_gpu_layers(quick)
    return own, quick


@pytest.mark.parametrize(("rank", "use_dora"), [(2, False), (8, False), (8, True)])
def test_low_rank_adapters_compute_the_same(rank: int, use_dora: bool) -> None:
    own, quick = adapted(rank, use_dora=use_dora)
    same(own, quick)
    for model in (own, quick):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.enable_adapters(False)
    assert loss_of(quick).item() == pytest.approx(loss_of(own).item(), rel=1e-6)


@pytest.mark.parametrize("rank", [2, 8])
def test_low_rank_adapters_compute_the_same_in_autocast(rank: int) -> None:
    own, quick = adapted(rank)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_of(model) for model in (own, quick)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3) and losses[1].dtype == losses[0].dtype
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(quick.parameters(), own.parameters(), strict=True):
        if theirs.grad is not None:
            assert mine.grad.dtype == theirs.grad.dtype == torch.float32
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.1, atol=0.02)


def test_low_rank_adapters_with_hooks_are_called() -> None:
    """ZeRO stage 3 gathers the adapters' weights in hooks."""
    own, quick = adapted(8)
    seen: list[str] = []
    for name, module in quick.named_modules():
        if ".lora_B.default" in name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    same(own, quick)
    assert len(seen) == len(set(seen)) == 2 * (2 + 2 * 2)


@pytest.mark.parametrize(("rank", "wide_passes"), [(2, 8), (8, 3)])
def test_low_rank_adapters_make_few_passes_over_wide_states(
    rank: int, wide_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of states as wide as the layer: PEFT writes two, scales one, adds both, and reads and scales the gradient.

    Here only products pass over them: one writes, and two read the gradient; with a rank that is not aligned two
    write, one adds, and three read.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    counting = importlib.import_module("traffic")
    own = torch.nn.Sequential(torch.nn.Linear(16, 2048, bias=False).requires_grad_(False))
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=["0"]), own)
    quick = copy.deepcopy(own)
    use_gpu_layers(quick)
    wide, moved = 3000 * 2048 * 4, []
    for model in (own, quick):
        states = torch.randn(3, 1000, 16, requires_grad=True)
        with counting.Traffic("cpu") as traffic:
            result = model(states)
            result.backward(torch.ones(result.shape))
        moved.append(sum(row["bytes"] for row in traffic.seen()["rows"] if row["kernel"] != "ones") / wide)
    assert moved[0] == pytest.approx(2 + 2 + 3 + 3 + 2, rel=0.1)
    assert moved[1] == pytest.approx(wide_passes, rel=0.1)


@pytest.mark.parametrize(
    ("rows", "states", "results", "is_joined"),
    [(2000, 256, 256, True), (200, 256, 256, False), (2000, 1024, 128, False), (200, 128, 1024, True)],
)
def test_low_rank_adapters_join_weights_where_that_moves_less_memory(
    rows: int, states: int, results: int, is_joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    counting = importlib.import_module("traffic")
    model = torch.nn.Sequential(torch.nn.Linear(states, results, bias=False).requires_grad_(False))
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["0"]), model)
    use_gpu_layers(model)
    moved, joined = {}, []
    decides = gpu_layers._are_worth_joining
    for is_one in (True, False):

        def note(*inputs: Tensor, is_one: bool = is_one) -> bool:
            joined.append(decides(*inputs))
            return is_one

        monkeypatch.setattr(gpu_layers, "_are_worth_joining", note)
        x = torch.randn(rows, states, requires_grad=True)
        with counting.Traffic("cpu") as traffic:
            result = model(x)
            result.backward(torch.ones(result.shape))
        moved[is_one] = sum(row["bytes"] for row in traffic.seen()["rows"])
    assert joined == [is_joined] * 2
    assert (moved[True] < moved[False]) is is_joined


def test_compiled_low_rank_adapters_are_one_graph_and_compute_the_same() -> None:
    own = torch.nn.Sequential(torch.nn.Linear(16, 32, bias=False).requires_grad_(False))
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["0"], lora_alpha=24, init_lora_weights=False), own)
    quick = copy.deepcopy(own)
    use_gpu_layers(quick)
    forwards = (own, torch.compile(quick, fullgraph=True, dynamic=True, backend="aot_eager"))
    found = []
    for model, forward in zip((own, quick), forwards, strict=True):
        states = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        result = forward(states)
        result.square().sum().backward()
        weights = [weight.grad for weight in model.parameters() if weight.requires_grad]
        found.append([result.detach(), states.grad, *weights])
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-4)


def test_frozen_projections_get_no_gradient() -> None:
    own, quick = models(layers=2)
    for model in (own, quick):
        for name, weight in model.named_parameters():
            weight.requires_grad_(".k." not in name)
    same(own, quick)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_relu_with_dropout_keeps_its_result_alone(autocast: bool) -> None:
    """Neither the ReLU's nor dropout's mask, which compiled layers keep otherwise: the result says both."""
    kept: list[set[torch.dtype]] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> Any:
        (returned,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        values = [node.meta["val"] for node in returned if isinstance(node, torch.fx.Node)]
        kept.append({value.dtype for value in values if isinstance(value, Tensor)})
        return graph.forward

    config = T5Config(**SIZES | {"dropout_rate": 0.3})
    layers = [T5DenseActDense(config), T5DenseActDense(config)]
    layers[1].load_state_dict(layers[0].state_dict())
    use_gpu_layers(layers[1])
    forwards = [
        layers[0],
        torch.compile(layers[1], fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=note)),
    ]
    states, found = torch.randn(5, 7, 16), []
    for layer, forward in zip(layers, forwards, strict=True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = forward(states)
        result.square().sum().backward()
        found.append([result.detach(), *(weight.grad for weight in layer.parameters())])
    torch._dynamo.reset()
    # In bf16 a CPU rounds the factor of dropout, too, in the backward pass of its own.
    torch.testing.assert_close(found[1], found[0], **({"rtol": 0.02, "atol": 0.1} if autocast else {}))
    assert torch.bool not in kept[0], "of the forward graph; the second is the backward graph's"


def test_the_bias_of_positions_is_cast_once_in_autocast() -> None:
    """The first layer casts it for all; each would cast a float32 one, and sum its gradient in float32."""
    _, quick = models(layers=2)
    attention = quick.encoder.block[0].layer[0].SelfAttention
    states, mask = torch.randn(2, 9, 16), torch.ones(2, 1, 1, 9, dtype=torch.bool)
    for autocast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, bias, _ = attention(states, mask)
        assert bias.dtype == dtype and bias.shape == (2, 4, 9, 9)


def test_compiled_layers_sum_gradients_of_the_bias_over_clips() -> None:
    """Each by itself: what they add up is as large as the scores of one clip."""
    own, quick = models(layers=2)
    returned: list[Tensor] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> Any:
        (values,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        returned.extend(node.meta["val"] for node in values if isinstance(node, torch.fx.Node))
        return graph.forward

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=note)
    for stack in (quick.encoder, quick.decoder):
        for block in stack.block:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend)
    same(own, quick)
    torch._dynamo.reset()
    biases = [value for value in returned if isinstance(value, Tensor) and value.dim() == 4]
    assert biases and all(len(value) == 1 for value in biases)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_gelu_is_one_call_in_the_type_of_its_products(autocast: bool) -> None:
    """A power, of which transformers makes it, is fp32 in autocast, and so is all that follows."""
    own, quick = models("mt5", layers=2)
    same(own, quick)
    calls = calls_of(quick, autocast=autocast).operators
    assert (
        calls["aten.gelu.default"] == calls["aten.gelu_backward.default"] == 4 and calls["aten.pow.Tensor_Scalar"] == 0
    )
    kinds = set()
    for stack in (quick.encoder, quick.decoder):
        for block in stack.block:
            block.layer[-1].DenseReluDense.act.register_forward_hook(lambda _, given, made: kinds.add(made.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_of(quick)
    assert kinds == {torch.bfloat16 if autocast else torch.float32}
