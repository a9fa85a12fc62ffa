"""What a beam search holds of its clips while their texts grow: one copy for all beams of a clip.

An encoder-decoder's beams attend to one encoding. A language model's beams share the keys and values of their clip's
prefix, and each has those of its own text beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from toolkit.decoding.static_cache import StoredClips
from toolkit.models.backbone import beams_share_encoding

SHARED_ATTENTION = "sdpa_shared_by_beams"
PREFIX_ATTENTION = "prefix_shared_by_beams"


@contextmanager
def held_clips(model: Any, beams: int, inputs: dict[str, Any]) -> Iterator[EncodedClips | PrefixClips]:
    """What a search over these inputs of ``generate`` holds; the model's attention changes within it."""
    before = model.config._attn_implementation
    try:
        yield EncodedClips(model, beams, inputs) if "encoder_outputs" in inputs else PrefixClips(model, beams, inputs)
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


class EncodedClips:
    """Encodings of clips, to which the beams attend, and the cache of their texts."""

    def __init__(self, model: Any, beams: int, inputs: dict[str, Any]) -> None:
        self.model, self.beams = model, beams
        # Contiguous, because GPT-2 takes a view of it.
        self.hidden = inputs["encoder_outputs"][0][::beams].contiguous()
        self.mask = inputs["attention_mask"][::beams]
        self.cache = inputs["past_key_values"]
        self.is_first = True
        # One row of keys and values serves all beams of a clip where the model's attention allows that.
        self.shared = beams_share_encoding(model.config)
        if self.shared:
            model.set_attn_implementation(SHARED_ATTENTION)

    def scores(self, ids: Tensor) -> Tensor:
        """Scores of the next tokens [rows, vocabulary], after these [rows, 1]."""
        outputs = self.model(
            decoder_input_ids=ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=self.hidden),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def follow(self, rows: Tensor, clips: Tensor | None) -> None:
        """Continue with the texts of these rows, and with these clips alone where some are done."""
        # After its first step the cache holds one row a clip, of which each beam takes a copy.
        self.cache.self_attention_cache.reorder_cache(rows // self.beams if self.is_first else rows)
        if clips is not None or (self.is_first and not self.shared):
            kept = clips if clips is not None else torch.arange(len(self.hidden), device=self.hidden.device)
            if not self.shared:
                kept = (kept if self.is_first else kept * self.beams).repeat_interleave(self.beams)
            self.hidden, self.mask = self.hidden[kept], self.mask[kept]
            self.cache.cross_attention_cache.reorder_cache(kept)
        self.is_first = False

    def stored(self, scores: Tensor) -> StoredClips:
        """What a cache of another kind takes over after the first step, which gave scores such as these.

        The beams of a clip share its encoding.
        """
        parts = self.cache.self_attention_cache, self.cache.cross_attention_cache
        # T5 with more layers in its encoder has as many here, of which some stay empty.
        texts, clips = ([(one.keys, one.values) for one in part.layers if one.keys is not None] for part in parts)
        for layer in (*parts[0].layers, *parts[1].layers):
            layer.keys = layer.values = None
        return StoredClips(clips, self.mask.bool(), texts, scores, hidden=self.hidden[:1, :1].clone())

    def keep_one(self) -> None:
        """Hold a single row, whose scores are not used."""
        self.hidden, self.mask = self.hidden[:1], self.mask[:1]
        self.cache.reorder_cache(torch.zeros(1, dtype=torch.long, device=self.hidden.device))


class PrefixClips:
    """Keys and values of the clips' prefixes, and of the beams' texts after them."""

    def __init__(self, model: Any, beams: int, inputs: dict[str, Any]) -> None:
        self.model, self.beams = model, beams
        self.vectors = inputs["inputs_embeds"][::beams]
        mask = inputs["attention_mask"]  # None where nothing is padded
        self.mask = torch.ones_like(self.vectors[..., 0], dtype=torch.int64) if mask is None else mask[::beams]
        self.lengths = self.mask.sum(dim=1)
        self.layers: list[_PrefixLayer] = []

    def scores(self, ids: Tensor) -> Tensor:
        """Scores of the next tokens [rows, vocabulary], after these [rows, 1]; the first ones end the prefixes."""
        if not self.layers:
            return self._after_prefixes()
        rows_of_clip = len(ids) // len(self.lengths)
        places = (self.lengths + self.layers[0].length).repeat_interleave(rows_of_clip)
        outputs = self.model(
            input_ids=ids,
            position_ids=places[:, None],
            past_key_values=Cache(layers=self.layers),
            use_cache=True,
            return_dict=True,
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _after_prefixes(self) -> Tensor:
        cache = DynamicCache()
        outputs = self.model(
            inputs_embeds=self.vectors,
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self.layers = [_PrefixLayer(layer.keys, layer.values, self.mask.bool()) for layer in cache.layers]
        self.vectors = self.vectors[:0]
        self.model.set_attn_implementation(PREFIX_ATTENTION)
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def follow(self, rows: Tensor, clips: Tensor | None) -> None:
        """Continue with the texts of these rows, and with these clips alone where some are done."""
        for layer in self.layers:
            layer.reorder_cache(rows)
            if clips is not None:
                layer.keep_clips(clips)
        if clips is not None:
            self.lengths = self.lengths[clips]

    def stored(self, scores: Tensor) -> StoredClips:
        """What a cache of another kind takes over after the first step, which gave scores such as these."""
        clips = [(layer.prefix_keys, layer.prefix_values) for layer in self.layers]
        mask = self.layers[0].mask
        self.layers = []
        return StoredClips(clips, mask, [], scores, lengths=self.lengths)

    def keep_one(self) -> None:
        """Hold a single row, whose scores are not used."""
        first = torch.zeros(1, dtype=torch.long, device=self.lengths.device)
        self.follow(first, first)


@dataclass(frozen=True)
class _States:
    """Keys or values of one layer, as its attention gets them.

    Attributes:
        prefix: of the clips [clips, heads, positions, width].
        own: of the beams' texts [rows, heads, tokens, width]; the rows of a clip stand together.
        mask: bool [clips, positions], of the prefixes.
    """

    prefix: Tensor
    own: Tensor
    mask: Tensor


class _PrefixLayer(DynamicLayer):
    """The cache of one layer: a prefix for each clip, and a text for each beam."""

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.prefix_keys, self.prefix_values, self.mask = keys, values, mask

    @property
    def length(self) -> int:
        """Tokens of the texts so far."""
        return super().get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Add the keys and values of one token, and give all of them."""
        keys, values = super().update(key_states, value_states)
        return _States(self.prefix_keys, keys, self.mask), _States(self.prefix_values, values, self.mask)

    def get_seq_length(self) -> int:
        return self.prefix_keys.shape[2] + self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let the texts continue those of these rows."""
        if self.length:
            self.batch_select_indices(beam_idx)

    def keep_clips(self, clips: Tensor) -> None:
        """Drop the prefixes of all other clips."""
        self.prefix_keys, self.prefix_values = self.prefix_keys[clips], self.prefix_values[clips]
        self.mask = self.mask[clips]


def _shared_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Scaled dot product attention in which several queries in a row may share a row of keys.

    Args:
        module: the attention layer.
        query: [rows, heads, 1 token, width]; the rows of a clip stand together.
        key, value: [clips, heads, positions, width].
        attention_mask: [rows, 1, 1, positions], alike for all rows of a clip.
        settings: as HuggingFace's attention takes them.

    Returns:
        [rows, 1 token, heads, width], and no weights.
    """
    rows, heads, _, width = query.shape
    beams = rows // key.shape[0]
    if beams == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    # A beam becomes a position of the query, for which attention over an encoding knows no order.
    query = query.view(-1, beams, heads, width).transpose(1, 2)
    mask = attention_mask[::beams] if attention_mask is not None and len(attention_mask) == rows else attention_mask
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **(settings | {"is_causal": False}))
    return output.reshape(rows, 1, heads, width), None


def _prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: _States,
    value: _States,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of one token of each beam to the prefix of its clip and to its own text: one softmax over both.

    Args:
        module: the attention layer.
        query: [rows, heads, 1 token, width]; several heads may share one of the keys (Ainslie et al. 2023, "GQA").
        key, value: of the clips and of the beams.
        attention_mask: none; the keys know which of them are padding.
        scaling, softcap, sliding_window: as HuggingFace's attention takes them.
        more: what it takes besides, and what a search has no use for.

    Returns:
        [rows, 1 token, heads, width], and no weights.
    """
    rows, heads, _, width = query.shape
    clips, shared, positions, _ = key.prefix.shape
    beams, group, tokens = rows // clips, heads // shared, key.own.shape[2]
    scaling = width**-0.5 if scaling is None else scaling
    query = query.reshape(clips, beams, shared, group, width) * scaling
    of_clips = query.transpose(1, 2).reshape(clips, shared, beams * group, width) @ key.prefix.mT
    of_texts = query.reshape(rows, shared, group, width) @ key.own.mT
    of_clips = of_clips.view(clips, shared, beams, group, positions).transpose(1, 2)
    scores = torch.cat([of_clips, of_texts.view(clips, beams, shared, group, tokens)], dim=-1).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores[..., :positions].masked_fill_(~key.mask[:, None, None, None], torch.finfo(scores.dtype).min)
    if sliding_window is not None and positions + tokens > sliding_window:
        scores[..., : positions + tokens - sliding_window] = torch.finfo(scores.dtype).min
    weights = scores.softmax(dim=-1).to(value.own.dtype)
    to_clips, to_texts = weights.split([positions, tokens], dim=-1)
    to_clips = to_clips.transpose(1, 2).reshape(clips, shared, beams * group, positions) @ value.prefix
    to_clips = to_clips.view(clips, shared, beams, group, width).transpose(1, 2)
    to_texts = to_texts.reshape(rows, shared, group, tokens) @ value.own
    return (to_clips.reshape(rows, shared, group, width) + to_texts).reshape(rows, 1, heads, width), None


AttentionInterface.register(SHARED_ATTENTION, _shared_attention)
AttentionMaskInterface.register(SHARED_ATTENTION, sdpa_mask)
# Without a function for masks: transformers makes none, and asks no GPU whether it needs one.
AttentionInterface.register(PREFIX_ATTENTION, _prefix_attention)
