"""Steps of a search as real CUDA graphs: texts and scores are those of the search without."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from toolkit.corpus.packed import Corpus
from toolkit.decoding import step_graphs
from toolkit.decoding.decode_split import find_hypotheses
from toolkit.models import PoseProcessor, PoseTranslator


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_graphs_find_what_a_search_without_them_finds(
    translator: Callable[..., PoseTranslator],
    corpus: Corpus,
    processor: PoseProcessor,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    captured = []

    class Watched(step_graphs.CudaGraphs):
        def __call__(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
            captured.append(call)
            return super().__call__(call)

    monkeypatch.setattr(step_graphs, "CudaGraphs", Watched)
    model, split = translator(kind).cuda(), corpus.splits["test"]
    with caplog.at_level(logging.INFO, logger="toolkit"):
        plain, graphed = (
            find_hypotheses(model, split, processor, batch_frames=400, max_new_tokens=40, graphs=given)
            for given in (False, True)
        )
    said = [record.getMessage() for record in caplog.records if record.name.startswith("toolkit")]
    assert captured and not any("without CUDA graphs" in line for line in said), said
    assert [[one.text for one in row] for row in graphed] == [[one.text for one in row] for row in plain]
    scores = ([one.score for row in found for one in row] for found in (graphed, plain))
    assert next(scores) == pytest.approx(next(scores), abs=1e-3)
