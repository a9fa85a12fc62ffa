"""What a beam search holds of its clips while their texts grow: one copy for all beams of a clip.

An encoder-decoder's beams attend to one encoding. A language model's beams share the keys and values of their clip's
prefix, and each has those of its own text beside them. T5Gemma 2 attends to encoding and text at once: the texts of a
clip's beams stand side by side before its encoding, and each beam sees its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from toolkit.decoding.static_cache import StoredClips
from toolkit.models.backbone import attention_is_merged, beams_share_encoding
from toolkit.models.language_models.prefixes import softcapped

SHARED_ATTENTION = "encoding_shared_by_beams"
PREFIX_ATTENTION = "prefix_shared_by_beams"


@contextmanager
def held_clips(model: Any, beams: int, inputs: dict[str, Any]) -> Iterator[EncodedClips | PrefixClips]:
    """What a search over these inputs of ``generate`` holds; the model's attention changes within it."""
    before = model.config._attn_implementation
    kind: type[EncodedClips] | type[PrefixClips] = PrefixClips
    if "encoder_outputs" in inputs:
        kind = MergedClips if attention_is_merged(model.config) else EncodedClips
    try:
        yield kind(model, beams, inputs)
    finally:
        if model.config._attn_implementation != before:
            set_attention(model, before)


def set_attention(model: Any, name: str) -> None:
    """Let all parts of a model run the attention that is registered by this name.

    transformers' own way warns of parts of a configuration that were not built, as the vision tower of T5Gemma 2.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation = name


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
            set_attention(model, SHARED_ATTENTION)

    def scores(self, ids: Tensor) -> Tensor:
        """Scores of the next tokens [rows, vocabulary], after these [rows, 1]."""
        outputs = self.model(
            decoder_input_ids=ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=self.hidden),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **self.masks(len(ids)),
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def masks(self, rows: int) -> dict[str, Any]:
        """What says to which positions the next tokens of so many texts attend."""
        return {"attention_mask": self.mask}

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


class MergedClips(EncodedClips):
    """The same where one attention reads a text and the encoding behind it."""

    def __init__(self, model: Any, beams: int, inputs: dict[str, Any]) -> None:
        super().__init__(model, beams, inputs)
        if self.shared:
            self.texts = [_SideBySide() for _ in self.cache.self_attention_cache.layers]
            self.cache = EncoderDecoderCache(Cache(layers=self.texts), DynamicCache())

    def masks(self, rows: int) -> dict[str, Any]:
        if not self.shared:
            return super().masks(rows)
        clips, tokens = len(self.hidden), self.texts[0].get_seq_length() + 1
        beams = rows // clips
        for layer in self.texts:
            layer.beams = beams
        places, device = torch.arange(tokens, device=self.mask.device), self.mask.device
        own = torch.eye(beams, dtype=torch.bool, device=device).repeat_interleave(tokens, dim=1)
        recent = (places >= tokens - self.model.config.decoder.sliding_window).repeat(beams)
        kinds = {"full_attention": own, "sliding_attention": own & recent}
        return {
            "decoder_attention_mask": {name: seen.expand(clips, 1, -1, -1) for name, seen in kinds.items()},
            "attention_mask": {"full_attention": self.mask[:, None, None].bool().expand(-1, 1, beams, -1)},
        }


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
        set_attention(self.model, PREFIX_ATTENTION)
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


class _SideBySide(DynamicLayer):
    """The cache of the texts of one layer, which gives the keys of a clip's beams behind each other."""

    beams = 1

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add one token of each beam; gives keys and values of all tokens [clips, heads, beams × tokens, width]."""
        keys, values = super().update(key_states, value_states)
        return self._of_clips(keys), self._of_clips(values)

    def _of_clips(self, states: Tensor) -> Tensor:
        rows, heads, tokens, width = states.shape
        of_clips = states.view(-1, self.beams, heads, tokens, width).transpose(1, 2)
        return of_clips.reshape(rows // self.beams, heads, self.beams * tokens, width)


def _shared_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Scaled dot product attention in which several queries in a row may share a row of keys.

    Args:
        module: the attention layer.
        query: [rows, heads, 1 token, width]; the rows of a clip stand together.
        key, value: [clips, heads, positions, width]; several heads of the query may share one.
        attention_mask: bool [rows, 1, 1, positions], alike for all rows of a clip; or [clips, 1, beams, positions].
        settings: as HuggingFace's attention takes them.

    Returns:
        [rows, 1 token, heads, width], and no weights.
    """
    rows, heads, _, width = query.shape
    beams = rows // key.shape[0]
    attend = sdpa_attention_forward if settings.get("softcap") is None else _capped_attention
    if beams == 1:
        return attend(module, query, key, value, attention_mask, **settings)
    # A beam becomes a position of the query, for which attention over an encoding knows no order.
    query = query.view(-1, beams, heads, width).transpose(1, 2)
    mask = attention_mask[::beams] if attention_mask is not None and len(attention_mask) == rows else attention_mask
    output, _ = attend(module, query, key, value, mask, **(settings | {"is_causal": False}))
    return output.reshape(rows, 1, heads, width), None


def _capped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention whose scores stay below a limit, for which torch has no kernel (Gemma Team 2024, "Gemma 2").

    Args:
        module: the attention layer.
        query: [clips, heads, queries, width]; several heads may share one of the keys.
        key, value: [clips, shared heads, positions, width].
        attention_mask: bool [clips, 1, queries, positions], or None where each query, or a single one, sees everything.
        scaling, softcap: as HuggingFace's attention takes them.
        more: what it takes besides, and what a search has no use for.

    Returns:
        [clips, queries, heads, width], and no weights.
    """
    clips, heads, queries, width = query.shape
    shared, positions = key.shape[1:3]
    grouped = query.reshape(clips, shared, -1, width) * scaling
    scores = softcapped((grouped @ key.mT).float(), softcap).view(clips, heads, queries, positions)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).to(value.dtype).view(clips, shared, -1, positions)
    return (weights @ value).view(clips, heads, queries, width).transpose(1, 2), None


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
    scores = torch.cat([of_clips, of_texts.view(clips, beams, shared, group, tokens)], dim=-1)
    scores = softcapped(scores.float(), softcap)
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
