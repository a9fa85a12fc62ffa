"""A language model behind poses: it reads `[prompt, poses, separator]` as vectors and writes the text after them.

The last token of the separator is the start token of the text, as an encoder-decoder has one. The text's tokens follow
the clip's own prefix at once, and padding stands behind everything in training and before everything in generation, so
that positions, causal masks and sliding windows are those of the clip alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from toolkit.cpu.attention import NAME as CPU_ATTENTION
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS

# Attention by a kernel that takes a mask or knows a causal one; the others are transformers' own, step by step.
KERNELS = ("sdpa", CPU_ATTENTION)
MASKLESS = "maskless_"  # before the name of one of them, for which transformers makes no mask


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
    with _causal_attention(model, vectors) as causal:
        states = model.get_decoder()(inputs_embeds=vectors, attention_mask=causal, use_cache=False)[0]
    first = lengths + torch.arange(clips, device=ids.device)[:, None] * len(places)
    scored = (first + torch.arange(tokens, device=ids.device)).flatten()
    states = states.flatten(0, 1).index_select(0, scored if rows is None else scored.index_select(0, rows))
    logits: Tensor = model.get_output_embeddings()(states if rows is not None else states.view(clips, tokens, -1))
    return softcapped(logits, getattr(model.config, "final_logit_softcapping", None))


def softcapped(scores: Tensor, cap: float | None) -> Tensor:
    """Scores below a limit (Gemma 2); as they are where there is none."""
    return torch.tanh(scores / cap) * cap if cap else scores


@contextmanager
def _causal_attention(model: Any, vectors: Tensor) -> Iterator[Tensor | None]:
    """Within it the model reads sequences with padding behind them, which no real position sees; gives the mask.

    None where the kernel knows what causal is: GPUs have a faster one without a mask (Dao 2023, "FlashAttention-2").
    transformers would make a mask after it has looked whether anything is hidden, for which the host waits for a GPU;
    for attention that is registered without a function for masks it makes none.
    """
    clips, length = vectors.shape[:2]
    window = getattr(model.config, "sliding_window", None)
    if window is not None and length > window:  # which layers have one is transformers' to say
        yield torch.ones(clips, length, dtype=torch.int64, device=vectors.device)
        return
    own = model.config._attn_implementation
    if own not in KERNELS:
        seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=vectors.device).tril()
        yield torch.zeros_like(seen, dtype=vectors.dtype).masked_fill(~seen, torch.finfo(vectors.dtype).min)
        return
    with _maskless(model):
        yield None


@contextmanager
def _maskless(model: Any) -> Iterator[None]:
    """Within it transformers makes no masks for the model."""
    own = model.config._attn_implementation
    if own in KERNELS:
        AttentionInterface.register(MASKLESS + own, ALL_ATTENTION_FUNCTIONS[own])
        model.config._attn_implementation = MASKLESS + own
    try:
        yield
    finally:
        model.config._attn_implementation = own


def recomputation(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of torch's checkpoints by which layers are recomputed with the attention that they ran with.

    The results are the same without; a compiled layer would be compiled again for another name.
    """
    if not is_language_model(model.config):
        return {}
    return {"context_fn": lambda: (nullcontext(), _maskless(model))}


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
