"""Padded clips of several lengths, and comparisons of a translator with transformers' own model, clip by clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.batching.collate import places_of_labels
from toolkit.decoding.beam_search import beam_search
from toolkit.models import PoseTranslator

FRAMES = (23, 9, 15, 4)
END = 1  # of every text
TEXTS = [[4, 5, 6, 7, 8, END], [9, END], [10, 11, 12, END], [END]]
# Settings of a search.
SEARCHES: list[dict[str, Any]] = [
    {"num_return_sequences": 4},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 6},
    {"length_penalty": 1.4},
    {"forced_eos_token_id": END, "early_stopping": True},
]


def padded_clips() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None]
    poses = torch.randn(len(FRAMES), max(FRAMES), 50, 3) * mask[..., None, None]
    return {"poses": poses, "visible": mask[..., None].expand(-1, -1, 50), "frame_mask": mask}


def vectors_of_poses(model: PoseTranslator, clips: dict[str, Tensor], clip: int) -> Tensor:
    """What the pose encoder makes of one clip without padding [positions, width]."""
    frames = FRAMES[clip]
    inputs = (clips[key][clip : clip + 1, :frames] for key in ("poses", "visible", "frame_mask"))
    vectors: Tensor = model.pose_encoder(*inputs)[0][0]
    return vectors


def labels_of(texts: list[list[int]]) -> Tensor:
    labels = torch.full((len(texts), max(map(len, texts))), -100)
    for row, text in enumerate(texts):
        labels[row, : len(text)] = torch.tensor(text)
    return labels


def check_logits(model: PoseTranslator, clips: dict[str, Tensor], expected: Callable[[int, list[int]], Tensor]) -> None:
    """Scores of ``TEXTS`` are those ``expected`` of a clip and its text [tokens, vocabulary]."""
    labels = labels_of(TEXTS)
    with torch.no_grad():
        found = model(**clips, labels=labels).logits
        labelled = places_of_labels(labels)
        torch.testing.assert_close(model(**clips, labels=labels, labelled=labelled).logits, found[labels != -100])
        for clip, text in enumerate(TEXTS):
            torch.testing.assert_close(found[clip, : len(text)], expected(clip, text), rtol=1e-5, atol=1e-5)


def check_search(
    model: PoseTranslator,
    clips: dict[str, Tensor],
    beams: int,
    inputs: Callable[[int], dict[str, Tensor]],
    begins: int = 0,
) -> None:
    """Texts and scores of all clips in one batch are those of transformers' ``generate`` for each clip.

    Args:
        beams: 1 searches greedily.
        inputs: of transformers' ``generate`` for a clip.
        begins: tokens before the texts that transformers leaves out.
    """
    settings = {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**clips, **settings, **({"custom_generate": beam_search} if beams > 1 else {}))
    texts = set()
    for clip in range(len(FRAMES)):
        with torch.no_grad():
            given = inputs(clip)
        theirs = model.backbone.generate(**given, generation_config=model.generation_config, **settings)
        expected = theirs.sequences[0].tolist()
        texts.add(tuple(expected))
        assert found.sequences[clip, begins : begins + len(expected)].tolist() == expected
        assert not found.sequences[clip, begins + len(expected) :].any()
        if beams > 1:
            torch.testing.assert_close(found.sequences_scores[clip], theirs.sequences_scores[0], atol=1e-4, rtol=1e-4)
    assert len(texts) > 1, "too much alike to show much"


def check_settings(model: PoseTranslator, clips: dict[str, Tensor], **more: Any) -> None:
    """A beam search of this model finds what HuggingFace's finds by the same settings."""
    settings = {"num_beams": 4, "return_dict_in_generate": True, "output_scores": True, **more}
    theirs, ours = model.generate(**clips, **settings), model.generate(**clips, **settings, custom_generate=beam_search)
    ends = more.get("eos_token_id", [END])
    assert texts_of(ours.sequences, ends) == texts_of(theirs.sequences, ends)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)


def texts_of(sequences: Tensor, ends: list[int]) -> list[list[int]]:
    """Each text up to its end; what follows is padding, for which HuggingFace writes ends where token 0 should pad."""
    rows = sequences[:, 1:].tolist()
    lengths = (next((place + 1 for place, token in enumerate(row) if token in ends), None) for row in rows)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]
