"""What batches are padded to, and fillers, change neither the losses of a step nor its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config

from tests.small_configs import T5, translator_config
from tests.small_translators import corpus, processor
from toolkit.batching.collate import Batch
from toolkit.batching.loader import train_batches
from toolkit.corpus.packed import Corpus
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.models.loss import translation_losses
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Recipe

__all__ = ["corpus", "processor"]
SPECIAL = torch.tensor([0, 1])


def steps(corpus: Corpus, processor: PoseProcessor, padding: Any, micro: int, budget: int | None) -> list[list[Batch]]:
    """The steps of an epoch over the clips of the test split, 16 in each but the last."""
    training = {"global_batch_size": 16, "micro_batch_size": micro, "micro_batch_frames": budget, "workers": 0}
    sections = {"model": {"backbone": "t5_small"}, "training": training, "augmentation": {"speed": 0.3, "rotation": 5}}
    run = ResolvedRun(
        Recipe.model_validate({"name": "test", **sections}), {}, 1, micro, 1, Path("unused"), padding=padding
    )
    batches = train_batches(corpus.splits["test"], processor.tokenizer, run, landmark_set=corpus.landmark_set)
    return list(batches)


def losses_and_gradient(model: PoseTranslator, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed token loss and CTC loss of a step, and the gradient of both."""
    model.zero_grad()
    sums = torch.zeros(2)
    for batch in batches:
        losses = translation_losses(
            model, batch.poses, batch.visible, batch.frame_mask, batch.labels, batch.labelled, SPECIAL
        )
        sum(losses).backward()
        sums += torch.stack(losses).detach()
    return sums, torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("kind", ["linear", "conv", "conformer", "stgcn"])
def test_a_ladder_with_fillers_has_the_losses_of_the_longest_clips(
    corpus: Corpus, processor: PoseProcessor, kind: str
) -> None:
    torch.manual_seed(0)
    encoder = {"kind": kind, "hidden": 24, "layers": 2, "kernel": 5, "stride": 2, "heads": 2, "dropout": 0.0}
    config = translator_config(
        T5Config(**T5 | {"dropout_rate": 0.0}),
        ctc=True,
        pose_encoder=encoder | {"positions": True},
        landmark_set=corpus.landmark_set.to_dict(),
    )
    model = PoseTranslator(config).train()
    plain = steps(corpus, processor, "longest", 16, None)
    for micro, budget in ((16, None), (16, 300)):
        on_ladder = steps(corpus, processor, "ladder", micro, budget)
        for expected, found in zip(plain, on_ladder, strict=True):
            assert {batch.frame_mask.shape[1] for batch in found} != {batch.frame_mask.shape[1] for batch in expected}
            for ours, wanted in zip(
                losses_and_gradient(model, found), losses_and_gradient(model, expected), strict=True
            ):
                assert (ours - wanted).norm() <= 1e-5 * wanted.norm()
