"""Small translators whose layers are compiled, for tests of the graphs that are captured and of what runs without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo import config as graph_settings
from torch._functorch import config as gradient_settings
from torch.fx.experimental import _config as size_settings

from tests.written_corpora import write_corpus
from toolkit.batching.collate import Batch
from toolkit.corpus.packed import Clip, Corpus
from toolkit.models import PoseTranslator, compiled
from toolkit.models.build import build_processor, build_translator
from toolkit.models.loss import translation_losses
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.resolve import resolve_named

LORA = ("model.lora.r=4", "model.lora.dropout=0")
LINEAR = "model.pose_encoder=linear"
CHECKPOINTS = ("training.gradient_checkpointing=true",)
SMALL = (
    *("model.tiny=true", "model.tokenizer=bytes", "model.from_scratch=true", "ds.bf16.enabled=false"),
    *("model.dropout=0", "model.pose_encoder.dropout=0", "model.pose_encoder.hidden=16"),
)
SHAPES = [(2, 11, 7), (3, 16, 9), (4, 22, 5), (2, 33, 13)]  # clips, frames, tokens

Make = Callable[..., PoseTranslator]
Graphs = list[list[str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    numbers = np.random.default_rng(0)
    clips = [Clip(f"clip-{n}", "hi", numbers.normal(size=(9, 50, 3)).astype(np.float16)) for n in range(2)]
    folder = tmp_path_factory.mktemp("compiled") / "corpus"
    return write_corpus(folder, {"train": clips}, load_landmark_set("hands_body_50"), 10.0, NORMALISATION)


@pytest.fixture
def make(corpus: Corpus) -> Make:
    """Builds a small translator; the same weights for the same settings."""

    def make(name: str = "t5_small", *overrides: str) -> PoseTranslator:
        settings = [f"model.backbone={name}", *SMALL, *overrides]
        resolved = resolve_named("t5_small", settings, 1, has_gpu=True, needs_data=False)
        torch.manual_seed(0)
        return build_translator(resolved, corpus, build_processor(resolved.recipe, corpus).tokenizer).train()

    return make


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """The calls of each graph that is captured; graphs run as they were captured."""
    captured: Graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        captured.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call_")])
        return graph

    monkeypatch.setattr(compiled, "BACKEND", keep)
    torch._dynamo.reset()
    with (  # what `compile_layers` sets is as before after the test
        graph_settings.patch(recompile_limit=8, specialize_float=False),
        gradient_settings.patch(force_non_lazy_backward_lowering=False),
        size_settings.patch(use_duck_shape=True),
    ):
        yield captured
    torch._dynamo.reset()


def batch_of(clips: int, frames: int, tokens: int, *, padded: int = 3) -> Batch:
    """A batch whose first clip is shorter than the others."""
    numbers = torch.Generator().manual_seed(clips * 10_000 + frames * 100 + tokens)
    mask = torch.ones(clips, frames, dtype=torch.bool)
    mask[0, frames - padded :] = False
    return Batch(
        uids=[""] * clips,
        texts=[""] * clips,
        clips=torch.arange(clips),
        poses=torch.randn(clips, frames, 50, 3, generator=numbers),
        visible=torch.rand(clips, frames, 50, generator=numbers) > 0.2,
        frame_mask=mask,
        labels=torch.randint(5, 80, (clips, tokens), generator=numbers),
        labelled=torch.arange(clips * tokens),
        is_filler=torch.zeros(clips, dtype=torch.bool),
        num_clips=clips,
        num_frames=int(mask.sum()),
    )


def loss_of(model: PoseTranslator, batch: Batch) -> torch.Tensor:
    return translation_losses(
        model,
        batch.poses,
        batch.visible,
        batch.frame_mask,
        batch.labels,
        batch.labelled,
        torch.tensor([0, 1, 2]),
    )[0]


def loss_and_norm(model: PoseTranslator, batch: Batch) -> tuple[float, float]:
    """The loss of a batch and the norm of its gradient."""
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), float(torch.nn.utils.get_total_norm(gradients))
