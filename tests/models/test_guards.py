"""What is asked before each call of a compiled layer, which the host of a GPU pays for."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo import config as graph_settings
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._functorch import config as gradient_settings
from torch.fx.experimental import _config as size_settings
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block

from toolkit.models import compiled
from toolkit.models.compiled import compile_layers
from toolkit.models.gpu_layers import use_gpu_layers

LAYERS = 4  # of encoder and decoder each


class Translator(nn.Module):
    """What of a translator is compiled: a T5 with dropout, and a pose encoder without layers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4, "vocab_size": 20, "dropout_rate": 0.1}
        self.backbone = T5ForConditionalGeneration(T5Config(**sizes, num_layers=LAYERS, decoder_start_token_id=0))
        self.pose_encoder = nn.Identity()

    def forward(self, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.backbone(inputs_embeds=vectors, labels=labels, use_cache=False).loss
        return loss


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs run as they were captured; what `compile_layers` sets is as before after the test."""
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, _: graph)
    torch._dynamo.reset()
    with (
        graph_settings.patch(recompile_limit=8, specialize_float=False),
        gradient_settings.patch(force_non_lazy_backward_lowering=False),
        size_settings.patch(use_duck_shape=True),
    ):
        yield
    torch._dynamo.reset()


def guards_of_a_pass(*, specialized: bool) -> list[str]:
    """The conditions of each graph of T5's layers for GPUs."""
    torch._dynamo.reset()
    model = Translator().train()
    use_gpu_layers(model)
    compile_layers(model)
    graph_settings.specialize_float &= specialized
    model(torch.randn(3, 9, 16), torch.randint(1, 20, (3, 7))).backward()
    layer = T5Block.forward.__wrapped__  # within transformers' own for gradient checkpointing
    return [str(entry.guard_manager) for entry in _debug_get_cache_entry_list(layer.__code__)]


def test_no_number_of_a_layer_is_compared_by_python() -> None:
    """As shares of dropout and the epsilon of a norm would be, each time that a layer is called."""
    counts = []
    for specialized in (True, False):
        guards = [conditions.splitlines() for conditions in guards_of_a_pass(specialized=specialized)]
        counts.append(
            [sum(bool(re.search(r"LAMBDA_GUARD: L\['self'\]\S* == ", line)) for line in lines) for lines in guards]
        )
    assert [len(found) for found in counts] == [4, 4], "the first layers and the others, in encoder and decoder"
    assert counts[0] == [0] * 4 and min(counts[1]) > 4
