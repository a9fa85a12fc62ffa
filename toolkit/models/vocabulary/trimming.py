"""A tokenizer with fewer tokens, which remembers what they are in the full one.

The memory is an entry of ``tokenizer_config.json``: wherever the tokenizer goes, so goes the number of each of its
tokens in the full vocabulary, by which rows of published tables are found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from toolkit.errors import UserError, first_line
from toolkit.models.vocabulary.files import NotTrimmable, check_files, trim_files

ENTRY = "trimmed_vocabulary"  # of tokenizer_config.json
KEY = "model.vocabulary=corpus"


@dataclass(frozen=True)
class Trimming:
    """What was left of a vocabulary.

    Attributes:
        fingerprint: of the full vocabulary.
        tokens: of the full vocabulary.
        kept: the full vocabulary's id of each token, by its id now; tokens that were added later are not among them.
    """

    fingerprint: str
    tokens: int
    kept: tuple[int, ...]

    @property
    def new_ids(self) -> dict[int, int]:
        """The id now of each token that was kept, by its id in the full vocabulary."""
        return {old: new for new, old in enumerate(self.kept)}

    def in_words(self) -> str:
        """How much was kept, as a phrase."""
        return f"{len(self.kept):,} of {self.tokens:,} tokens"


def trimming_of(tokenizer: Any) -> Trimming | None:
    """What was left of a tokenizer's vocabulary; None where it was not trimmed."""
    entry = tokenizer.init_kwargs.get(ENTRY)
    if entry is None:
        return None
    return Trimming(entry["fingerprint"], entry["tokens"], tuple(_ids_of(entry["kept"])))


def forget_trimming(tokenizer: Any) -> Any:
    """The same tokenizer, whose vocabulary counts as a full one from now on; changes it."""
    tokenizer.init_kwargs.pop(ENTRY, None)
    return tokenizer


def fingerprint_of(tokenizer: Any) -> str:
    """A hash of a vocabulary: its tokens and their ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return xxhash.xxh3_128(json.dumps(vocabulary).encode()).hexdigest()


def check_trimmable(tokenizer: Any, name: str) -> None:
    """Raise UserError where a tokenizer cannot be trimmed; ``name`` is for the message."""
    with TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        with _explained(name):
            check_files(Path(place))


def trimmed(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], name: str
) -> tuple[PreTrainedTokenizerBase, Trimming]:
    """A tokenizer with these tokens, and those without which it could not write every text that it can now.

    Tokens keep their order. Texts of these tokens are tokenised as before.

    Raises:
        UserError: the tokenizer cannot be trimmed; ``name`` is for the message.
    """
    needed = set(tokenizer.convert_ids_to_tokens(sorted(set(ids))))
    needed |= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    with TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer.save_pretrained(folder)
        with _explained(name):
            trim_files(folder, needed)
        try:
            # As users load it: some classes make parts of a tokenizer again.
            smaller: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{KEY}: the tokenizer {name!r} cannot be loaded again when it is trimmed: {first_line(error)}",
                "set model.vocabulary=full",
            ) from error
    full, tokens = tokenizer.get_vocab(), smaller.convert_ids_to_tokens(range(len(smaller)))
    smaller.name_or_path = tokenizer.name_or_path
    trimming = Trimming(fingerprint_of(tokenizer), len(tokenizer), tuple(full[token] for token in tokens))
    smaller.init_kwargs[ENTRY] = {
        "fingerprint": trimming.fingerprint,
        "tokens": trimming.tokens,
        "kept": _written(trimming.kept),
    }
    return smaller, trimming


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Within it a tokenizer that cannot be trimmed raises the user's error."""
    try:
        yield
    except NotTrimmable as error:
        raise UserError(
            f"{KEY}: the tokenizer {name!r} cannot be trimmed: {error}", "set model.vocabulary=full"
        ) from error


def _written(ids: Sequence[int]) -> str:
    """Ids as runs: ``0-258 260 312-313``."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _ids_of(runs: str) -> Iterator[int]:
    for run in runs.split():
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)
