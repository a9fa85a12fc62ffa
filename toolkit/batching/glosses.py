"""Glosses as targets of the CTC head: whether a run has them, their vocabulary, and the ids of a batch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe


def gloss_vocabulary(glosses: Iterable[str]) -> list[str]:
    """The different glosses of clips, whose glosses are separated by spaces, in the order of their characters."""
    return sorted({gloss for of_clip in glosses for gloss in of_clip.split()})


def gloss_ids(glosses: Sequence[str], vocabulary: Mapping[str, int], is_filler: Tensor, padding: int) -> Tensor:
    """The places of the glosses of clips in the vocabulary: int64 [clips, glosses], padded; a filler has none.

    Raises:
        KeyError: a gloss is not in the vocabulary, which is that of these clips.
    """
    fillers = is_filler.tolist()
    rows = [
        [] if filler else [vocabulary[gloss] for gloss in of_clip.split()]
        for of_clip, filler in zip(glosses, fillers, strict=True)
    ]
    ids = np.full((len(rows), max(1, *map(len, rows))), padding, np.int64)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = values
    return torch.from_numpy(ids)


def reads_glosses(recipe: Recipe) -> bool:
    """Whether the CTC head of a run of this recipe reads glosses."""
    return recipe.training.ctc_weight > 0 and recipe.training.ctc_target == "gloss"


def glosses_of(recipe: Recipe, corpus: Corpus) -> list[str]:
    """The vocabulary of the CTC head; empty where it reads tokens of the text, or there is none."""
    return gloss_vocabulary(corpus.splits["train"].values("gloss")) if reads_glosses(recipe) else []


def check_glosses(recipe: Recipe, corpus: Corpus) -> None:
    """See that every clip has glosses where the CTC head reads them.

    Raises:
        UserError: a clip has none.
    """
    if not reads_glosses(recipe):
        return
    for name, split in corpus.splits.items():
        without = [clip for clip, glosses in enumerate(split.values("gloss")) if not glosses.strip()]
        if without:
            raise UserError(
                f"{corpus.path}: {len(without)} of {len(split)} clips of split {name} have no gloss, such as "
                f"'{split.uids[without[0]]}', and training.ctc_target=gloss needs those of all",
                "fill the column gloss (or map one: data.columns.gloss=NAME) and prepare the corpus again, or set "
                "training.ctc_target=text",
            )
