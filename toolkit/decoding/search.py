"""Search for the texts of one batch of clips; every translation of the toolkit is made by this function.

It imports little, because ``launch/translate.py`` waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.decoding.beam_search import beam_search
from toolkit.decoding.step_graphs import StepGraphs
from toolkit.models.translator import PoseTranslator

# Later digits depend on the number of threads, and one rank and several must write the same files.
SCORE_DIGITS = 4


@dataclass(frozen=True)
class Hypothesis:
    """One text that the search found."""

    text: str  # detokenised
    score: float | None  # log-probability over length penalty; None for greedy search, which has none
    gloss: str | None = None  # what a CTC head that reads glosses has read of the clip


def search(
    model: PoseTranslator,
    processor: Any,
    poses: Tensor,
    visible: Tensor,
    frame_mask: Tensor,
    prefix_ids: Tensor | None = None,
    first_tokens: Tensor | None = None,
    video_features: Tensor | None = None,
    *,
    n_best: int = 1,
    synced: bool = False,
    graphs: StepGraphs | None = None,
    **settings: Any,
) -> list[list[Hypothesis]]:
    """Find the ``n_best`` texts for each clip of a batch, by our beam search or HuggingFace's other loops.

    Args:
        model: in evaluation mode.
        processor: turns tokens into texts.
        poses, visible, frame_mask, prefix_ids, first_tokens, video_features: as ``PoseTranslator.generate`` takes them.
        n_best: hypotheses of each clip, at most as many as there are beams.
        synced: whether ranks must step together (ZeRO stage 3, where every step gathers weights from all ranks).
        graphs: of beam search's steps; None runs them as they are written.
        settings: those of HuggingFace's ``generate``; they override the model's own.
    """
    beams = settings.get("num_beams", model.generation_config.num_beams) or 1
    samples = settings.get("do_sample", model.generation_config.do_sample)
    if beams > 1 and not samples:
        loop: dict[str, Any] = {"custom_generate": beam_search, "synced": synced, "graphs": graphs}
    else:
        loop = {"synced_gpus": synced}
    encoded: tuple[Tensor, Tensor] | None = None
    glosses: list[str | None] = [None] * len(poses)
    if model.config.ctc and model.config.ctc_vocabulary:
        with torch.no_grad():
            encoded = model.encode(poses, visible, frame_mask, prefix_ids, video_features)
        glosses = [*model.read_glosses(*encoded, prefix_ids)]
    found = model.generate(
        poses,
        visible,
        frame_mask,
        prefix_ids,
        first_tokens,
        video_features,
        encoded,
        return_dict_in_generate=True,
        output_scores=True,
        num_return_sequences=n_best,
        **loop,
        **settings,
    )
    # White space as in the texts of a corpus; a line of output is one text.
    texts = [" ".join(text.split()) for text in processor.batch_decode(found.sequences)]
    # Greedy search has no sequence scores.
    scores = getattr(found, "sequences_scores", None)
    values = (
        [round(value, SCORE_DIGITS) for value in scores.float().tolist()] if scores is not None else [None] * len(texts)
    )
    hypotheses = list(map(Hypothesis, texts, values, [gloss for gloss in glosses for _ in range(n_best)]))
    return [hypotheses[start : start + n_best] for start in range(0, len(hypotheses), n_best)]
