"""Special tokens that a recipe adds to a tokenizer, and their rows in the token tables.

The tables get rows for them when the backbone is made. Where the tables train, so do the new rows. Where they are
frozen (with LoRA, on a quantised backbone, by ``model.freeze``) the new rows are zero there, and a small table of their
own trains: an ordinary parameter to ZeRO-3 and DeepSpeed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from toolkit.errors import UserError
from toolkit.models.adaptation.adapters import token_tables
from toolkit.models.backbone import decoder_config, encoder_config
from toolkit.models.translator import PoseTranslator
from toolkit.recipe.sections.model import Model

# What configurations call the number of rows of their token tables.
ROW_KEYS = ("vocab_size", "decoder_vocab_size")


class NewRows(nn.Module):
    """Rows of a frozen token table that train: vectors of the new tokens, and their scores where the table is tied.

    They complete the table's result in a forward hook, so that the table keeps its class and the name of its weight:
    transformers ties it, PEFT adapts it and files name it by these.

    ``first`` is the id of the first new token, ``values`` are the rows [tokens, width], and ``names`` are the weights,
    as the translator names them, whose rows these are.
    """

    def __init__(self, first: int, values: Tensor, names: Sequence[str]) -> None:
        super().__init__()
        self.first = first
        self.names = list(names)
        self.hooks: list[RemovableHandle] = []
        self.weight = nn.Parameter(values)

    def forward(self, seen: Tensor, result: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Add the new tokens to a result of the frozen table.

        Args:
            seen: the table's input: token ids [...], or hidden states [..., width].
            result: its result, zero for the new tokens: vectors [..., width], or scores [..., vocabulary].
            scale: by which the table multiplies its vectors.
        """
        count = len(self.weight)
        if seen.is_floating_point():
            result[..., self.first : self.first + count] += nn.functional.linear(seen, self.weight)
            return result
        places = seen - self.first
        is_new = (places >= 0) & (places < count)
        vectors = nn.functional.embedding(places.clamp(0, count - 1), self.weight) * scale
        return result + (vectors * is_new.unsqueeze(-1)).to(result.dtype)

    def follow(self, module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """The forward hook of a frozen table."""
        return self(inputs[0], result, getattr(module, "embed_scale", 1.0))


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add special tokens to a tokenizer; raise UserError where it knows one of them already."""
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise UserError(f"model.extra_tokens: the tokenizer has {', '.join(known)} already", "drop those that it has")
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)


def reserve_rows(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Give a backbone's configuration a row for each of these tokens, which the tokenizer has."""
    if not tokens:
        return
    rows = _first_id(tokenizer, tokens) + len(tokens)
    for part, key in _row_settings(config):
        setattr(part, key, max(rows, getattr(part, key)))


def table_rows(config: PreTrainedConfig) -> set[int]:
    """How many rows the token tables of a backbone have."""
    return {getattr(part, key) for part, key in _row_settings(config)}


def _row_settings(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    for part in {id(part): part for part in (config, encoder_config(config), decoder_config(config))}.values():
        for key in ROW_KEYS:
            if getattr(part, key, None) is not None:
                yield part, key


def widened(values: Tensor, like: Tensor) -> Tensor:
    """A published token table (or bias over tokens) with zeros for the rows that ``like`` has more of."""
    if values.shape == like.shape:
        return values
    wide = values.new_zeros(like.shape)
    wide[tuple(slice(size) for size in values.shape)] = values
    return wide


def add_rows(
    model: PoseTranslator, settings: Model, tokenizer: PreTrainedTokenizerBase, known: Sequence[bool] | None = None
) -> None:
    """Initialise the rows of new tokens; all ranks call this when ZeRO-3 has partitioned the tables.

    Each starts as the mean of all rows before them (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
    Language Models"): it changes the other tokens' probabilities least. Rows that are ``known`` keep their values,
    which a trained translator gave.
    """
    if not settings.extra_tokens:
        return
    first, count = _first_id(tokenizer, settings.extra_tokens), len(settings.extra_tokens)
    tables: dict[int, Any] = {id(module.weight): module.weight for module in token_tables(model)}
    frozen = tables_are_frozen(settings)
    apart = nn.ModuleDict()
    owners: dict[int, NewRows] = {}
    for key, weight in tables.items():
        with _whole(weight), torch.no_grad():
            added = weight[first : first + count]
            mean = weight[:first].mean(dim=0, dtype=torch.float32).to(weight.dtype)
            is_known = torch.tensor(known or [False] * count, device=weight.device)
            values = torch.where(is_known.unsqueeze(1), added, mean)
            added.copy_(torch.zeros_like(values) if frozen else values)
        if frozen:
            names = [name for name, other in model.named_parameters(remove_duplicate=False) if other is weight]
            owners[key] = NewRows(first, values, names)
            apart[str(len(apart))] = owners[key]
    if owners:
        model.new_rows = apart
        for module in token_tables(model):
            rows = owners[id(module.weight)]
            rows.hooks.append(module.register_forward_hook(rows.follow))


def tables_are_frozen(settings: Model) -> bool:
    """Whether the recipe leaves the backbone's token tables as they are."""
    if settings.lora:
        return "embeddings" not in settings.lora.train
    return settings.quantization is not None or "embeddings" in settings.freeze


def fold_rows(model: PoseTranslator, weights: dict[str, Tensor]) -> None:
    """Move trained rows into their tables, among the whole weights of the model."""
    for name, rows in _apart(model).items():
        trained = weights.pop(f"new_rows.{name}.weight")
        for table in rows.names:
            weights[table][rows.first : rows.first + len(trained)] = trained


def unfolded(model: PoseTranslator, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """The inverse of :func:`fold_rows`, for weights that ``read`` gives one by one, new rows in their tables.

    Returns:
        the same for the names and values of the model itself.
    """
    apart = _apart(model)

    def count(rows: NewRows) -> int:
        return int(getattr(rows.weight, "ds_shape", rows.weight.shape)[0])  # whole, where it is partitioned

    def read_apart(name: str) -> Tensor:
        if is_new_row(name):
            rows = apart[name.split(".")[1]]
            return read(rows.names[0]).narrow(0, rows.first, count(rows))
        values = read(name)
        for rows in apart.values():
            if name in rows.names:
                values = values.clone()
                values.narrow(0, rows.first, count(rows)).zero_()
        return values

    return read_apart


def is_new_row(name: str) -> bool:
    """Whether a weight holds new rows apart from their table."""
    return name.startswith("new_rows.")


def merge_rows(model: PoseTranslator) -> None:
    """Move trained rows into the tables of a whole model and remove their own tables."""
    weights = {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}
    fold_rows(model, weights)
    for rows in _apart(model).values():
        for hook in rows.hooks:
            hook.remove()
    if _apart(model):
        del model.new_rows


def _apart(model: PoseTranslator) -> dict[str, NewRows]:
    return dict(getattr(model, "new_rows", {}).items())


def _first_id(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> int:
    ids: list[Any] = tokenizer.convert_tokens_to_ids(list(tokens))
    assert ids == list(range(ids[0], ids[0] + len(tokens))), f"{tokens} were not added one after the other: {ids}"
    return int(ids[0])


@contextlib.contextmanager
def _whole(weight: nn.Parameter) -> Iterator[None]:
    """Within it a weight that ZeRO-3 may have partitioned is whole, and all ranks get what rank 0 writes into it."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        yield
