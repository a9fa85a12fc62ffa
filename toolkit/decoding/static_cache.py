"""Keys and values of a search in memory that is allocated once: every step is the same calls on the same memory.

Each beam writes the keys of its token into a place of its own: places of one step stand together. No key is moved when
beams are reordered; a small table says whose key at each step belongs to a beam's text, and masks all others. A clip's
beams are queries of one attention over all places of the clip.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from toolkit.models.language_models.prefixes import softcapped

STATIC_ATTENTION = "static_cache_of_beams"


@dataclass
class StoredClips:
    """What a search has when its first token is scored.

    Attributes:
        clips: keys and values of each layer [clips, heads, positions, width].
        mask: bool [clips, positions].
        texts: keys and values of each layer for the texts so far [rows, heads, tokens, width]; empty where there are
            none yet, because the clips are prefixes of the texts.
        scores: such as those of the first token [any, vocabulary].
        lengths: of the prefixes [clips]; None where the clips are encodings.
        hidden: a state as the decoder would get it [1, 1, width]; None where the clips are prefixes.
    """

    clips: list[tuple[Tensor, Tensor]]
    mask: Tensor
    texts: list[tuple[Tensor, Tensor]]
    scores: Tensor
    lengths: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Of each text so far."""
        return self.texts[0][0].shape[2] if self.texts else 0


class StaticCache:
    """Room for the texts of a number of clips; it may hold fewer, and shorter ones than it could.

    Attributes:
        clips, beams, length, positions: what there is room for; ``length`` in tokens, ``positions`` of a clip.
        ids: the last token of each text [rows, 1], for the next step to read.
        position: of that token in its text, int64 without dimensions.
        scores: of the next tokens [rows, vocabulary], in the same place for all graphs.
        now, span: clips and tokens that the step at hand computes.
    """

    def __init__(self, stored: StoredClips, clips: int, beams: int, length: int) -> None:
        device = stored.mask.device
        self.clips, self.beams, self.length = clips, beams, length
        self.positions = stored.mask.shape[1]
        self.has_prefixes = stored.lengths is not None
        self.first_place = self.positions if self.has_prefixes else 0
        self.ids = torch.zeros(clips * beams, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.scores = stored.scores.new_zeros(clips * beams, stored.scores.shape[1])
        self.mask = torch.ones(clips, self.positions, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(clips, dtype=torch.int64, device=device)
        self.beam = torch.arange(beams, device=device)
        self.places = torch.arange(length, device=device)
        # Of each beam and step: the beam that wrote the token.
        self.writers = self.beam[None, :, None].repeat(clips, 1, length)
        self.hidden = stored.hidden
        self.now, self.span = clips, length
        self.seen = self.slots = self.beam  # made by `begin`
        room = self.first_place + length * beams
        self.own = [
            _OwnLayer(self, *(new_room(states, clips, room) for states in pair))
            for pair in (stored.clips if self.has_prefixes else stored.texts)
        ]
        self.across = [] if self.has_prefixes else [_ClipLayer(self, *map(self._room, pair)) for pair in stored.clips]
        self.cache: Any = Cache(layers=list(self.own))
        if not self.has_prefixes:
            self.cache = EncoderDecoderCache(self.cache, Cache(layers=[]))
            self.cache.cross_attention_cache.layers = self.across
            self.cache.is_updated = dict.fromkeys(range(len(self.across)), True)

    def _room(self, states: Tensor) -> Tensor:
        return new_room(states, self.clips, self.positions)

    def holds(self, stored: StoredClips, clips: int, beams: int, length: int) -> bool:
        """Whether these clips can be stored here, and the calls on them are those on clips before."""
        keys = self.own[0].all_keys
        has_room = clips <= self.clips and length <= self.length
        is_alike = stored.mask.shape[1] == self.positions and beams == self.beams
        kind = stored.clips[0][0].dtype, stored.mask.device
        return has_room and is_alike and kind == (keys.dtype, keys.device)

    def store(self, stored: StoredClips) -> int:
        """Take these clips and texts; the tensors are let go one by one.

        Returns:
            tokens of each text so far.
        """
        clips, tokens = len(stored.mask), stored.tokens
        self.writers.copy_(self.beam[None, :, None].expand_as(self.writers))
        self.position.fill_(tokens - 1)
        self.mask[:clips].copy_(stored.mask)
        if stored.lengths is not None:
            self.lengths[:clips].copy_(stored.lengths)
        for layer in self.across or self.own:
            layer.store_clips(*stored.clips.pop(0))
        for layer in self.own if stored.texts else ():
            layer.store_texts(*stored.texts.pop(0))
        return tokens

    def states(self) -> list[Tensor]:
        """All keys and values."""
        own, across = ([(layer.all_keys, layer.all_values) for layer in part] for part in (self.own, self.across))
        return [states for pair in (*own, *across) for states in pair]

    def inputs(self) -> dict[str, Tensor | Any]:
        """What the backbone is called with, beside the cache, after :meth:`begin`."""
        ids = self.ids[: self.now * self.beams]
        if self.has_prefixes:
            places = (self.lengths[: self.now] + self.position).repeat_interleave(self.beams)
            return {"input_ids": ids, "position_ids": places[:, None]}
        # Keys and values of the encoding are there, so that nothing reads it; without a mask of its own a decoder
        # would make one of the length so far.
        return {
            "decoder_input_ids": ids,
            "encoder_outputs": BaseModelOutput(last_hidden_state=self.hidden),
            "decoder_attention_mask": self.mask[:1, None, None, :1],
        }

    def begin(self, clips: int, span: int) -> None:
        """Compute from here on the first so many clips, in texts of at most so many tokens."""
        self.now, self.span = clips, span
        mine = self.beam[None, :, None].expand(clips, -1, 1)
        self.writers[:clips].index_copy_(2, self.position[None], mine)
        written = (self.places[:span] <= self.position)[:, None]
        seen = (self.writers[:clips, :, :span, None] == self.beam) & written
        seen = seen.flatten(2)[:, None]
        if self.has_prefixes:
            of_prefix = self.mask[:clips, None, None].expand(-1, 1, self.beams, -1)
            seen = torch.cat([of_prefix, seen], dim=-1)
        self.seen = seen
        self.slots = self.first_place + self.position * self.beams + self.beam

    def recent(self, window: int) -> Tensor:
        """Places that are at most so many tokens before the next one: bool [places]."""
        of_texts = self.first_place + self.places[: self.span].repeat_interleave(self.beams)
        prefix = torch.arange(self.first_place, device=of_texts.device)
        return torch.cat([prefix, of_texts]) > self.first_place + self.position - window

    def follow(self, rows: Tensor, clips: Tensor | None) -> None:
        """Continue with the texts of these rows [clips × beams], and with these clips alone where some are done."""
        if clips is not None:
            for tensor in (self.writers, self.mask, self.lengths):
                tensor[: len(clips)].copy_(tensor[clips])
            for states in self.states():
                states[: len(clips)].copy_(states[clips])
        parents = (rows % self.beams).view(-1, self.beams, 1)
        writers = self.writers[: len(parents)]
        writers.copy_(writers.gather(1, parents.expand_as(writers)))


def new_room(states: Tensor, clips: int, places: int) -> Tensor:
    """Zeros for states such as these [..., heads, any, width]: [clips, heads, places, width]."""
    return states.new_zeros(clips, states.shape[1], places, states.shape[3])


@dataclass(frozen=True)
class _States:
    """Keys or values of one layer, as its attention gets them.

    Attributes:
        states: [clips, heads, places, width].
        seen: bool [clips, 1, beams or 1, places].
        tokens: positions that a position bias has.
        of: the cache that they are of; None for those of an encoding, where no place is before another.
    """

    states: Tensor
    seen: Tensor
    tokens: int
    of: StaticCache | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As architectures ask for it: the places of one text."""
        clips, heads, _, width = self.states.shape
        return clips, heads, self.tokens, width


class _OwnLayer(DynamicLayer):
    """Keys and values of the texts in one layer, behind those of the clips where these are prefixes."""

    def __init__(self, cache: StaticCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        # The cache holds its layers. If they held it, its memory would stay until Python looks for such cycles.
        self.of: StaticCache = weakref.proxy(cache)
        self.all_keys, self.all_values = keys, values

    def store_clips(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values of prefixes [clips, heads, positions, width]."""
        for own, states in ((self.all_keys, keys), (self.all_values, values)):
            own[: len(states), :, : states.shape[2]].copy_(states)

    def store_texts(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values of texts [rows, heads, tokens, width]."""
        beams = self.of.beams
        for own, states in ((self.all_keys, keys), (self.all_values, values)):
            rows, heads, tokens, width = states.shape
            places = states.view(-1, beams, heads, tokens, width).permute(0, 2, 3, 1, 4)
            own[: rows // beams, :, : tokens * beams].copy_(places.reshape(-1, heads, tokens * beams, width))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Write the keys and values of one token [rows, heads, 1, width], and give all of them."""
        cache = self.of
        found = []
        for own, states in ((self.all_keys, key_states), (self.all_values, value_states)):
            of_beams = states.view(cache.now, cache.beams, *own.shape[1:2], -1).transpose(1, 2)
            own[: cache.now].index_copy_(2, cache.slots, of_beams.to(own.dtype))
            places = own[: cache.now, :, : cache.first_place + cache.span * cache.beams]
            found.append(_States(places, cache.seen, cache.span, cache))
        return tuple(found)

    def get_seq_length(self) -> Any:
        return self.of.position


class _ClipLayer:
    """Keys and values of the clips' encodings in one layer."""

    def __init__(self, cache: StaticCache, keys: Tensor, values: Tensor) -> None:
        self.of: StaticCache = weakref.proxy(cache)
        self.all_keys, self.all_values = keys, values

    def store_clips(self, keys: Tensor, values: Tensor) -> None:
        self.all_keys[: len(keys)].copy_(keys)
        self.all_values[: len(values)].copy_(values)

    @property
    def keys(self) -> Any:
        return self._now(self.all_keys)

    @property
    def values(self) -> Any:
        return self._now(self.all_values)

    def _now(self, states: Tensor) -> _States:
        clips = self.of.now
        return _States(states[:clips], self.of.mask[:clips, None, None], self.of.positions, None)


def _static_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: _States,
    value: _States,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of one token of each beam to the places that its mask shows.

    Args:
        module: the attention layer.
        query: [rows, heads, 1 token, width]; several heads may share one of the keys (Ainslie et al. 2023, "GQA").
        key, value: of a layer.
        attention_mask: not used; the keys know what is seen.
        scaling, position_bias, softcap, sliding_window: as HuggingFace's attention takes them.
        more: what it takes besides, and what a search has no use for.

    Returns:
        [rows, 1 token, heads, width], and no weights.
    """
    rows, heads, _, width = query.shape
    clips, shared = key.states.shape[:2]
    beams, group = rows // clips, heads // shared
    queries = query.reshape(clips, beams, shared, group, width).transpose(1, 2).flatten(2, 3)
    seen = key.seen
    if key.of is not None and sliding_window is not None and seen.shape[-1] > sliding_window:
        seen = seen & key.of.recent(sliding_window)
    if group > 1:
        seen = seen.repeat_interleave(group, dim=2)
    if softcap is not None:
        scores = (queries @ key.states.mT).float() * (width**-0.5 if scaling is None else scaling)
        scores = softcapped(scores, softcap).masked_fill(~seen, torch.finfo(scores.dtype).min)
        output = scores.softmax(dim=-1).to(value.states.dtype) @ value.states
    else:
        mask = seen
        if position_bias is not None and key.of is not None:
            bias = position_bias.repeat_interleave(beams, dim=-1).to(queries.dtype)
            mask = torch.where(seen, bias, torch.finfo(bias.dtype).min)
        output = functional.scaled_dot_product_attention(
            queries, key.states, value.states, attn_mask=mask, scale=scaling
        )
    output = output.unflatten(2, (beams, group)).transpose(1, 2)
    return output.reshape(rows, 1, heads, width), None


# Without a function for masks: transformers makes none, and asks no GPU whether it needs one.
AttentionInterface.register(STATIC_ATTENTION, _static_attention)
