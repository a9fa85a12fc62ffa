"""Joint search: beam search scored by the decoder and by the CTC head together.

A decoder writes fluent text but may skip or repeat parts of a clip; CTC reads from left to right and cannot. Each beam
is scored by both (Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition",
section IV).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

# Tokens that the decoder finds less likely than this many others are not looked up in the CTC output: a large
# vocabulary then costs no more than a small one.
CANDIDATES = 64
IMPOSSIBLE = -1e9


class CtcPrefixScores(LogitsProcessor):
    """Adds to each next token the log-probability that CTC gives to the text so far with it, over that without it.

    For every beam the forward variables of its text are kept: ``ends_in_token[t]`` and ``ends_in_blank[t]``, the
    log-probability of all alignments of the first ``t`` positions to the text that end so.

    Args:
        logits: CTC scores [clips, positions, vocabulary + 1]; the last one is the blank.
        mask: bool [clips, positions].
        weight: share of CTC in the joint score, 0..1.
        end_id: token that ends a text.
        special_ids: tokens that are written but not signed; this search finds none but the end, and those that the
            decoder must write.
        num_beams: rows per clip.
    """

    def __init__(
        self, logits: Tensor, mask: Tensor, *, weight: float, end_id: int, special_ids: list[int], num_beams: int
    ) -> None:
        log_probs = logits.float().log_softmax(dim=-1)
        # After a clip's end only the blank is possible, which leaves every text as it is.
        blank = torch.full_like(log_probs[:1, :1], IMPOSSIBLE)
        blank[..., -1] = 0.0
        self.log_probs = torch.where(mask.unsqueeze(-1), log_probs, blank)
        self.blanks = self.log_probs[..., -1].repeat_interleave(num_beams, dim=0)
        self.weight = weight
        self.end_id = end_id
        self.special_ids = torch.tensor(special_ids, device=logits.device)
        self.num_beams = num_beams
        self.texts: Tensor | None = None
        self.ends_in_token = torch.full_like(self.blanks, IMPOSSIBLE)
        self.ends_in_blank = self.blanks.cumsum(dim=1)
        self.last_tokens = torch.full((len(self.blanks),), -1, device=logits.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Joint scores.

        Args:
            input_ids: texts so far [clips × beams, tokens].
            scores: the decoder's scores of the next token [clips × beams, vocabulary].
        """
        self._follow(input_ids)
        is_forbidden = scores.isneginf()
        decoder_scores = scores.float().log_softmax(dim=-1).masked_fill(is_forbidden, IMPOSSIBLE)
        candidates = decoder_scores.topk(min(CANDIDATES, decoder_scores.shape[-1])).indices
        gains = torch.full_like(decoder_scores, IMPOSSIBLE)
        gains.scatter_(1, candidates, self._gains(candidates))
        text = torch.logaddexp(self.ends_in_token[:, -1], self.ends_in_blank[:, -1])
        gains[:, self.special_ids] = IMPOSSIBLE
        # A text that must begin with a special token, as the code of its language, signs no less with it.
        is_forced = is_forbidden.index_fill(1, self.special_ids, True).all(dim=1, keepdim=True)
        gains = gains.masked_fill(is_forced, 0.0)
        gains[:, self.end_id] = text - self._prefix
        joint = (1 - self.weight) * decoder_scores + self.weight * gains
        return joint.masked_fill(is_forbidden, -torch.inf)

    def keep_clips(self, clips: Tensor) -> None:
        """Keep the state of the clips at these places [clips] alone; the search continues without the others."""
        beams = torch.arange(self.num_beams, device=clips.device)
        rows = (clips[:, None] * self.num_beams + beams).flatten()
        self.log_probs = self.log_probs[clips]
        for name in ("blanks", "texts", "ends_in_token", "ends_in_blank", "last_tokens", "_starts", "_prefix"):
            setattr(self, name, getattr(self, name)[rows])

    def _gains(self, candidates: Tensor) -> Tensor:
        """log P(text + candidate + anything) - log P(text + anything), [rows, candidates]."""
        clips, positions, _ = self.log_probs.shape
        # Beams of a clip read its log-probabilities where they are: [clips, beams, positions, candidates].
        of_beams = self.log_probs.unsqueeze(1).expand(-1, self.num_beams, -1, -1)
        looked_up = candidates.view(clips, self.num_beams, 1, -1).expand(-1, -1, positions, -1)
        emitted = of_beams.gather(3, looked_up).flatten(0, 1)
        before = _shift(torch.logaddexp(self.ends_in_token, self.ends_in_blank), self._starts)
        # A token that repeats the last one needs a blank between the two.
        before_repeat = _shift(self.ends_in_blank, self._starts)
        repeats = candidates == self.last_tokens[:, None]
        reach = torch.where(repeats.unsqueeze(1), before_repeat.unsqueeze(-1), before.unsqueeze(-1))
        return torch.logsumexp(reach + emitted, dim=1) - self._prefix[:, None]

    def _follow(self, input_ids: Tensor) -> None:
        """Update the forward variables to the texts that the search has chosen."""
        if self.texts is None:
            self.texts = input_ids
            self._starts = torch.zeros(len(input_ids), device=input_ids.device)
            self._prefix = torch.zeros(len(input_ids), device=input_ids.device)
            return
        parents, tokens = self._parents(input_ids[:, :-1]), input_ids[:, -1]
        self.texts = input_ids
        for name in ("ends_in_token", "ends_in_blank", "last_tokens", "_starts", "_prefix"):
            setattr(self, name, getattr(self, name)[parents])
        is_signed = ~torch.isin(tokens, self.special_ids)
        self._append(tokens, is_signed)

    def _parents(self, prefixes: Tensor) -> Tensor:
        """For each row the earlier row of the same clip whose text it continues."""
        assert self.texts is not None
        shape = (-1, self.num_beams, prefixes.shape[1])
        same = (prefixes.view(shape).unsqueeze(2) == self.texts.view(shape).unsqueeze(1)).all(dim=-1)
        within = same.int().argmax(dim=-1)
        offsets = torch.arange(len(within), device=within.device)[:, None] * self.num_beams
        return (within + offsets).flatten()

    def _append(self, tokens: Tensor, is_signed: Tensor) -> None:
        """The forward variables of each row's text with its new token."""
        self._prefix = torch.where(is_signed, self._prefix + self._gains(tokens[:, None])[:, 0], self._prefix)
        rows = torch.arange(len(tokens), device=tokens.device)
        emitted = self.log_probs[rows // self.num_beams, :, tokens]
        repeats = tokens == self.last_tokens
        both = torch.logaddexp(self.ends_in_token, self.ends_in_blank)
        reach = _shift(torch.where(repeats[:, None], self.ends_in_blank, both), self._starts)
        token = torch.full_like(self._prefix, IMPOSSIBLE)
        blank = torch.full_like(self._prefix, IMPOSSIBLE)
        in_token, in_blank = [], []
        for position in range(self.blanks.shape[1]):
            token, blank = (
                torch.logaddexp(token, reach[:, position]) + emitted[:, position],
                torch.logaddexp(token, blank) + self.blanks[:, position],
            )
            in_token.append(token)
            in_blank.append(blank)
        keep = is_signed[:, None]
        self.ends_in_token = torch.where(keep, torch.stack(in_token, dim=1), self.ends_in_token)
        self.ends_in_blank = torch.where(keep, torch.stack(in_blank, dim=1), self.ends_in_blank)
        self._starts = torch.where(is_signed, torch.full_like(self._starts, IMPOSSIBLE), self._starts)
        self.last_tokens = torch.where(is_signed, tokens, self.last_tokens)


def _shift(values: Tensor, first: Tensor) -> Tensor:
    """What was reached one position earlier: ``first`` before the first position."""
    return torch.cat([first[:, None], values[:, :-1]], dim=1)
