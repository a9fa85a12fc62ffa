"""A language model behind poses: it reads `[prompt, poses, separator]` as vectors and writes the text after them.

The last token of the separator is the start token of the text, as an encoder-decoder has one. The text's tokens follow
the clip's own prefix at once, and padding stands behind everything in training and before everything in generation, so
that positions, causal masks and sliding windows are those of the clip alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS


def is_language_model(config: PreTrainedConfig) -> bool:
    """Whether ``config`` is of one of the known language models, which read clips as a prefix and have no encoder."""
    return config.model_type in LANGUAGE_MODELS


def score_after_prefixes(
    model: PreTrainedModel, prefixes: Tensor, mask: Tensor, ids: Tensor, rows: Tensor | None
) -> Tensor:
    """Scores of the next tokens.

    Args:
        model: has weights.
        prefixes: vectors of each clip [clips, positions, width], padding behind them.
        mask: bool [clips, positions].
        ids: what the model reads after them: the start token and the text [clips, tokens].
        rows: int64 [rows], places in the flattened ``ids`` to score alone.

    Returns:
        [clips, tokens, vocabulary], or [rows, vocabulary].
    """
    clips, tokens = ids.shape
    words = model.get_input_embeddings()(ids).to(prefixes.dtype)
    lengths = mask.sum(dim=1, keepdim=True)
    places = torch.arange(prefixes.shape[1] + tokens, device=ids.device)
    in_text = places - lengths
    is_text = (in_text >= 0) & (in_text < tokens)
    # Each clip's prefix, its text, and the padding of its prefix.
    source = torch.where(is_text, prefixes.shape[1] + in_text, torch.where(in_text < 0, places, places - tokens))
    vectors = _reordered(torch.cat([prefixes, words], dim=1), source)
    states = model.get_decoder()(inputs_embeds=vectors, attention_mask=_causal(model, vectors), use_cache=False)[0]
    first = lengths + torch.arange(clips, device=ids.device)[:, None] * len(places)
    scored = (first + torch.arange(tokens, device=ids.device)).flatten()
    states = states.flatten(0, 1).index_select(0, scored if rows is None else scored.index_select(0, rows))
    logits: Tensor = model.get_output_embeddings()(states if rows is not None else states.view(clips, tokens, -1))
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _causal(model: Any, vectors: Tensor) -> Tensor:
    """The mask of sequences with padding behind them, which no real position sees.

    transformers would make one after it has looked whether anything is hidden: the host would wait for a GPU.
    """
    clips, length = vectors.shape[:2]
    window = getattr(model.config, "sliding_window", None)
    if window is not None and length > window:  # which layers have one is transformers' to say
        return torch.ones(clips, length, dtype=torch.int64, device=vectors.device)
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=vectors.device).tril()
    if model.config._attn_implementation != "eager":
        return seen
    return torch.zeros_like(seen, dtype=vectors.dtype).masked_fill(~seen, torch.finfo(vectors.dtype).min)


def generation_inputs(model: PreTrainedModel, prefixes: Tensor, mask: Tensor, start: int) -> dict[str, Tensor]:
    """What ``generate`` is called with: prefixes with padding before them, and the start token, which ends them.

    ``input_ids``, with which every output begins, hold the end token in its place, as BART's do: the start token may be
    a word, and what is special is left out of texts.
    """
    ids = torch.full((len(prefixes), 1), start, device=prefixes.device)
    vectors = torch.cat([prefixes, model.get_input_embeddings()(ids).to(prefixes.dtype)], dim=1)
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    order = mask.int().argsort(dim=1, stable=True)
    return {
        "input_ids": torch.full_like(ids, model.config.eos_token_id),
        "inputs_embeds": _reordered(vectors, order),
        "attention_mask": mask.gather(1, order).long(),
    }


def _reordered(vectors: Tensor, order: Tensor) -> Tensor:
    """Vectors [clips, positions, width], those of each clip in the order [clips, positions]."""
    return vectors.gather(1, order.unsqueeze(-1).expand(-1, -1, vectors.shape[2]))
