"""The token loss of many rows is compiled where layers are: the same loss and gradient, in a graph without a break."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from toolkit.models import compiled
from toolkit.models.compiled import CompiledLayers, row_functions, uncompiled
from toolkit.models.loss import AS_WRITTEN, RowFunctions, token_loss

VOCABULARY = 300


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for each graph that is captured; it runs as it was."""
    captured: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        captured.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(compiled, "BACKEND", keep)
    torch._dynamo.reset()
    yield captured
    torch._dynamo.reset()


def loss_and_slopes(rows: RowFunctions, count: int, kind: torch.dtype, smoothing: float) -> tuple[Tensor, Tensor]:
    """Of random logits, a row of which does not count; all rows but two at once."""
    draw = torch.Generator().manual_seed(count)
    logits = torch.randn(count, VOCABULARY, generator=draw).to(kind).requires_grad_()
    labels = torch.randint(VOCABULARY, (count,), generator=draw)
    labels[1] = -100
    loss = token_loss(logits, labels, smoothing, scores_at_once=(count - 2) * VOCABULARY, rows=rows)
    (0.3 * loss).backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.mark.parametrize(("kind", "smoothing"), [(torch.float32, 0.1), (torch.bfloat16, 0.1), (torch.float32, 0.0)])
def test_loss_and_gradient_are_those_without(graphs: list[str], kind: torch.dtype, smoothing: float) -> None:
    layers = CompiledLayers()
    for count in (5, 9, 33):
        expected = loss_and_slopes(AS_WRITTEN, count, kind, smoothing)
        found = loss_and_slopes(layers.rows, count, kind, smoothing)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 2, "one for losses and one for slopes, of any number of rows"
    assert "scatter" not in "".join(graphs), "its kernel reads and writes all scores once more"


def test_few_scores_are_not_worth_it(graphs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SCORES", 6 * VOCABULARY)
    layers = CompiledLayers(worth=1.0)
    loss_and_slopes(layers.rows, 7, torch.float32, 0.1)  # at most five rows at once
    assert not graphs
    loss_and_slopes(layers.rows, 8, torch.float32, 0.1)
    assert graphs


def test_it_is_compiled_with_the_layers_and_never_without(graphs: list[str]) -> None:
    model = nn.Linear(2, 2)
    assert row_functions(model) is AS_WRITTEN
    model.compiled_layers = layers = CompiledLayers()  # type: ignore[assignment]
    assert row_functions(model) is layers.rows
    with uncompiled(model):
        loss_and_slopes(row_functions(model), 5, torch.float32, 0.1)
    assert not graphs


def test_a_loss_that_cannot_be_compiled_is_computed_as_written(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph: object, inputs: object) -> None:
        raise OSError("no space left on this device")

    monkeypatch.setattr(compiled, "BACKEND", fail)
    layers = CompiledLayers()
    with caplog.at_level(logging.WARNING, "toolkit"):
        for _ in range(2):
            found = loss_and_slopes(layers.rows, 5, torch.float32, 0.1)
    torch.testing.assert_close(found, loss_and_slopes(AS_WRITTEN, 5, torch.float32, 0.1))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "no space left" in message
    assert layers.works, "layers are compiled all the same"


def test_where_a_layer_cannot_be_compiled_the_loss_is_not(graphs: list[str]) -> None:
    layers = CompiledLayers(works=False)
    loss_and_slopes(layers.rows, 5, torch.float32, 0.1)
    assert not graphs
