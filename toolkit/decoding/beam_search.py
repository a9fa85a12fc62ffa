"""Beam search with HuggingFace's results, several times faster.

It is called by ``generate(custom_generate=beam_search)``, so every setting, logits processor and stopping criterion is
HuggingFace's own; only the loop is ours. Three things make it faster, and none changes an output:

* **A clip leaves the batch when it is done.** HuggingFace computes all clips until the last one ends. Here a clip also
  ends as soon as no beam can overtake the hypotheses that are to be returned: a log-probability only falls as a text
  grows, so the best that a beam can reach is its sum over the most favourable length.
* **The beams of a clip share one copy of its encoding**, or of a language model's keys and values of its prefix. Their
  attention to it is one product per clip, not one a beam, and the largest part of the cache is never copied from step
  to step (``held_clips.py``).
* **The first step runs once a clip**, because all its beams begin alike.

On GPUs the other steps are CUDA graphs (``step_graphs.py``).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput

from toolkit.batching.copies import on_device
from toolkit.decoding.held_clips import held_clips
from toolkit.decoding.step_graphs import StepGraphs, graphed_clips

# Below any log-probability; HuggingFace's value, since scores are compared with its own.
NEVER = -1e9
# Finished clips are dropped, which costs a copy, when they are this share of a batch.
DROP_SHARE = 0.125
# The host waits for a GPU when it looks which clips are done; there it looks after so many tokens.
TOKENS_BETWEEN_LOOKS = 10


@torch.no_grad()
def beam_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced: bool = False,
    graphs: StepGraphs | None = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop that ``generate`` calls; the signature is HuggingFace's.

    Args:
        model: an encoder-decoder or a language model.
        input_ids: how every text begins [clips × beams, tokens].
        logits_processor, stopping_criteria, generation_config: as ``generate`` prepared them.
        synced: whether every rank must run the decoder as often as the one that needs it most (ZeRO stage 3).
            HuggingFace keeps its own ``synced_gpus`` from custom loops.
        graphs: of this model's steps; None runs them as they are written.
        model_kwargs: ``encoder_outputs``, or ``inputs_embeds`` of prefixes, and ``attention_mask``, repeated for each
            beam, and an empty cache.

    Returns:
        token ids [clips × returned sequences, tokens], best first, or with ``return_dict_in_generate`` an object with
        ``sequences`` and ``sequences_scores``.
    """
    beams = generation_config.num_beams
    search = _Search(generation_config, input_ids.view(-1, beams, input_ids.shape[1]), logits_processor)
    with ExitStack() as stack:
        held: Any = stack.enter_context(held_clips(model, beams, model_kwargs))
        if graphs is not None:
            held = stack.enter_context(graphed_clips(held, graphs, generation_config.max_length))
            search.drop_share = held.drop_share
        ids = input_ids[::beams]
        while True:
            logits = held.scores(ids)
            if search.rows:
                logits = logits.float()
                if len(logits) != search.rows:  # the first step, which all beams of a clip share
                    logits = logits.repeat_interleave(beams, dim=0)
                rows, clips = search.step(logits, logits_processor, stopping_criteria)
            if not search.rows:
                if not (synced and _any_rank_searches(False, input_ids.device)):
                    break
                # Other ranks still search: this one runs the same layers on one row, whose output is not used.
                ids = ids[:1]
                held.keep_one()
                continue
            if synced:
                _any_rank_searches(True, input_ids.device)
            held.follow(rows, clips)
            ids = search.running[:, :, -1].reshape(-1, 1)
    return search.result()


@dataclass
class _Found:
    """The best finished texts of each clip."""

    texts: Tensor  # token ids [clips, beams, longest text]
    scores: Tensor  # [clips, beams], best first; NEVER where nothing has finished yet


class _Search:
    """The state of the search over the clips that are still in the batch.

    Attributes:
        running: the unfinished texts, best first [clips, beams, tokens].
        sums: their summed log-probabilities [clips, beams].
        found: the finished texts of these clips.
    """

    def __init__(self, config: Any, prompts: Tensor, processors: Any) -> None:
        self.config = config
        clips, beams, self.prompt = prompts.shape
        self.padding = config._pad_token_tensor
        if self.padding is None:
            self.padding = config._eos_token_tensor[0]
        self.padding = int(self.padding)
        ends = config._eos_token_tensor
        # Enough candidates for `beams` unfinished texts even if each of the best ends here.
        self.candidates = beams * max(2, 1 + (len(ends) if ends is not None else 0))
        # All beams begin alike, so only the first one counts.
        self.running, self.sums = prompts, torch.full((clips, beams), NEVER, device=prompts.device)
        self.sums[:, 0] = 0.0
        shape = (clips, beams, config.max_length)
        self.found = _Found(torch.full_like(prompts[..., :1], self.padding).expand(shape), self.sums * 0 + NEVER)
        self.is_done = torch.zeros(clips, dtype=torch.bool, device=prompts.device)
        self.clips = torch.arange(clips, device=prompts.device)
        self.results = _Found(self.found.texts.clone(), self.found.scores.clone())
        # HuggingFace's processors keep no state between steps, ours have `keep_clips`; any other forbids to drop clips.
        self.keepers = [item for item in processors if hasattr(item, "keep_clips")]
        known = (type(item).__module__.startswith("transformers.") for item in processors if item not in self.keepers)
        self.may_drop = all(known)
        self.look_every, self.drop_share = tokens_between_looks(prompts.device), DROP_SHARE

    @property
    def rows(self) -> int:
        """Unfinished texts."""
        return self.running.shape[0] * self.running.shape[1]

    def step(self, logits: Tensor, processors: Any, stops: Any) -> tuple[Tensor, Tensor | None]:
        """Add one token to every text.

        Returns:
            for each unfinished text the row that it continues, and which clips stay, or None where all of them do.
        """
        clips, beams, length = self.running.shape
        scores = processors(self.running.flatten(0, 1), logits.log_softmax(dim=-1))
        totals = (scores.view(clips, beams, -1) + self.sums.unsqueeze(-1)).flatten(1)
        sums, chosen = totals.topk(self.candidates)
        parents, tokens = chosen // scores.shape[-1], chosen % scores.shape[-1]
        texts = torch.cat([_pick(self.running, parents), tokens.unsqueeze(-1)], dim=-1)
        ends = stops(texts.flatten(0, 1), None).view(clips, -1)

        self._collect(texts, sums, ends)
        self.sums, order = (sums + ends * NEVER).topk(beams)
        self.running = _pick(texts, order)
        rows = parents.gather(1, order) + torch.arange(clips, device=order.device)[:, None] * beams
        self.is_done |= self._cannot_improve() | ends.all(dim=1)
        return self._drop(rows, length + 1)

    def _collect(self, texts: Tensor, sums: Tensor, ends: Tensor) -> None:
        """Keep the best of the finished texts and those that finish now."""
        beams, length = self.running.shape[1], texts.shape[-1]
        # Only the first `beams` candidates may finish; the others are there to be continued.
        counts = ends & ~self.is_done[:, None]
        counts[:, beams:] = False
        if self.look_every == 1 and not bool(counts.any()):
            return
        scores = sums / (length - self.prompt) ** self.config.length_penalty
        texts = torch.nn.functional.pad(texts, (0, self.found.texts.shape[-1] - length), value=self.padding)
        merged = torch.cat([self.found.scores, scores.where(counts, NEVER)], dim=1)
        self.found.scores, order = merged.topk(beams)
        self.found.texts = _pick(torch.cat([self.found.texts, texts], dim=1), order)

    def _cannot_improve(self) -> Tensor:
        """Clips of which no more can be found: bool [clips]."""
        config, length = self.config, self.running.shape[-1] - self.prompt
        is_full = (self.found.scores > NEVER / 2).all(dim=1)
        if config.early_stopping is True:
            return is_full
        longest = config.max_length - self.prompt if config.length_penalty > 0 else length
        best, last = self.sums[:, 0], self.found.scores[:, -1]
        # HuggingFace's rule for all beams; unless early_stopping is "never" it assumes that longer texts gain nothing.
        expected = longest if config.early_stopping == "never" else length
        is_done = is_full & (best / expected**config.length_penalty <= last)
        # Our rule for the hypotheses that are returned, which holds for texts of any length.
        returned = self.found.scores[:, config.num_return_sequences - 1]
        is_final = best / longest**config.length_penalty < returned
        return is_done | (is_final if config.sequence_bias is None else False)

    def _drop(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """Drop finished clips, when it is time to look and there are enough of them."""
        if (length - self.prompt) % self.look_every and length < self.config.max_length:
            return rows.flatten(), None
        is_done: list[bool] = self.is_done.tolist()
        if not all(is_done) and (not self.may_drop or sum(is_done) < self.drop_share * len(is_done)):
            return rows.flatten(), None
        device = rows.device
        done = on_device([place for place, is_one in enumerate(is_done) if is_one], device, torch.int64)
        stay = on_device([place for place, is_one in enumerate(is_done) if not is_one], device, torch.int64)
        leaving = self.clips[done]
        self.results.texts[leaving] = self.found.texts[done]
        self.results.scores[leaving] = self.found.scores[done]
        self.running, self.sums = self.running[stay], self.sums[stay]
        self.found = _Found(self.found.texts[stay], self.found.scores[stay])
        self.clips, self.is_done = self.clips[stay], self.is_done[stay]
        for keeper in self.keepers if len(stay) else []:
            keeper.keep_clips(stay)
        return rows[stay].flatten(), stay

    def result(self) -> Any:
        """What ``generate`` returns."""
        returned = self.config.num_return_sequences
        texts = self.results.texts[:, :returned].flatten(0, 1)
        used = (texts != self.padding).any(dim=0).nonzero().flatten().tolist()
        texts = texts[:, : max([self.prompt, *(place + 1 for place in used)])]
        if not self.config.return_dict_in_generate:
            return texts
        scores = self.results.scores[:, :returned].flatten() if self.config.output_scores else None
        return GenerateBeamEncoderDecoderOutput(sequences=texts, sequences_scores=scores)


def tokens_between_looks(device: torch.device) -> int:
    """After how many tokens the search looks which clips are done: at once where that costs nothing."""
    return TOKENS_BETWEEN_LOOKS if device.type == "cuda" else 1


def _pick(values: Tensor, beams: Tensor) -> Tensor:
    """The chosen beams of each clip: values [clips, beams, tokens], beams [clips, chosen]."""
    return values.gather(1, beams.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _any_rank_searches(this_one: bool, device: torch.device) -> bool:
    """Whether any rank has unfinished texts; all ranks must call this."""
    searching = torch.tensor(float(this_one), device=device)
    dist.all_reduce(searching, op=dist.ReduceOp.MAX)
    return bool(searching.item())
