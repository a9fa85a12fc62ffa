"""Glosses of a run: whether its corpus has them, and what a CTC head that reads them has for a vocabulary."""

from __future__ import annotations

from toolkit.batching.glosses import gloss_vocabulary
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe


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
