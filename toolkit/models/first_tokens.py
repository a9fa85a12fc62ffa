"""Let the text of each clip begin with its own token, such as the code of its language."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LogitsProcessor


class FirstTokens(LogitsProcessor):
    """Leaves only one token possible at the beginning of each text, as ``forced_bos_token_id`` does for all texts.

    Args:
        tokens: of each clip [clips].
        num_beams: rows per clip.
    """

    def __init__(self, tokens: Tensor, num_beams: int) -> None:
        self.tokens = tokens
        self.num_beams = num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token [clips × beams, vocabulary], those of the first one changed."""
        if input_ids.shape[1] != 1:
            return scores
        tokens = self.tokens.repeat_interleave(self.num_beams, dim=0)
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)

    def keep_clips(self, clips: Tensor) -> None:
        """Keep the tokens of the clips at these places [clips] alone; the search continues without the others."""
        self.tokens = self.tokens[clips]
