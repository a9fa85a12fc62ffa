"""How much memory a translation takes on one rank, by arithmetic, and whether so much is free.

Counted are the whole weights and the most that one batch holds. ZeRO stage 3 needs it: with the weights gathered once
an evaluation runs at full speed, and without room for them it would fail.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed as dist

from toolkit.batching.ladder import fitted_rungs
from toolkit.batching.order import evaluation_shapes
from toolkit.cluster.host_memory import free_addresses, free_host_memory
from toolkit.models.backbone import beams_share_encoding, decoder_config, encoder_config
from toolkit.models.ctc_search import CANDIDATES
from toolkit.models.language_models.prefixes import is_language_model
from toolkit.models.translator import PoseTranslator

LARGEST_SHARE = 0.9
"""Of the free memory; allocators lose the rest between their blocks."""
FLOAT32 = 4
# What architectures call the decoder's layers and attention heads, and the width of the encoder's feed-forward layers,
# the particular names first.
LAYERS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
FEED_FORWARD = ("encoder_ffn_dim", "d_ff", "intermediate_size")
HEADS = ("decoder_attention_heads", "num_attention_heads")


@dataclass(frozen=True)
class TranslationMemory:
    """Bytes on one rank while a batch is translated.

    Attributes:
        weights: all of them, whole.
        encoder: the widest activations of the pose encoder and the backbone's encoder, attention scores included.
        cache: keys and values of the decoder when the last token is written, and a copy of one layer's.
        scores: of all tokens that may come next, as logits, as log-probabilities and as the processors leave them, and
            what the CTC head adds to them.
        kept: keys, values and logits that stay from one batch to the next, where steps are CUDA graphs; ``cache`` is
            then what the first step has beside them.
    """

    weights: int
    encoder: int
    cache: int
    scores: int
    kept: int = 0

    @property
    def working(self) -> int:
        """All but the weights."""
        # The encoder is done when the decoder begins.
        return self.kept + max(self.encoder, self.cache + self.scores)

    @property
    def total(self) -> int:
        return self.weights + self.working


def translation_memory(
    model: PoseTranslator, *, clips: int, frames: int, beams: int, max_new_tokens: int, graphs: bool = False
) -> TranslationMemory:
    """What translating one batch takes at most.

    Args:
        model: its weights may be partitioned by ZeRO-3; they count as whole.
        clips: of the batch.
        frames: of its longest clip, to which all are padded.
        beams, max_new_tokens: of the search.
        graphs: whether its steps are CUDA graphs.
    """
    parameters = list(model.parameters())
    weights = sum(getattr(item, "ds_numel", item.numel()) * item.element_size() for item in parameters)
    size = max(item.element_size() for item in parameters if item.is_floating_point())
    config = model.backbone.config
    decoder = decoder_config(config)
    layers, heads = _first(decoder, *LAYERS), _first(decoder, *HEADS)
    width = _first(decoder, "d_kv", "head_dim", missing=0) or model.pose_encoder.width // heads
    inner = width * _first(decoder, "num_key_value_heads", missing=heads)  # of keys, or of values
    # The pose encoder may shorten a clip, but its first layers see every frame.
    poses = model.pose_encoder
    length = poses.length(frames) + model.config.longest_prefix
    positions, seen = clips * length, clips * frames * poses.vectors_per_position
    inner_layers = max(4 * poses.width, _first(encoder_config(config), *FEED_FORWARD, missing=0))
    widest = max(
        positions * inner_layers, seen * max(4 * model.config.pose_encoder["hidden"], 2 * model.config.num_features)
    )
    # Only with this attention do the beams of a clip share one copy of its encoding; a prefix has always one.
    copies = 1 if beams_share_encoding(config) or is_language_model(config) else beams
    across = 2 * layers * positions * copies * inner
    along = 2 * layers * clips * beams * max_new_tokens * inner
    logits = clips * beams * _first(decoder, "vocab_size")
    kept = across + along + logits if graphs else 0
    read, joint = _ctc_scores(model, clips, positions, beams, logits)
    held = across + (0 if graphs else along)
    return TranslationMemory(
        weights=weights,
        encoder=max(size * (3 * widest + 2 * heads * positions * length), read),
        cache=size * (held + along // layers + positions * model.pose_encoder.width),
        scores=3 * FLOAT32 * logits + joint,
        kept=size * kept,
    )


def _ctc_scores(model: PoseTranslator, clips: int, positions: int, beams: int, logits: int) -> tuple[int, int]:
    """Bytes of a joint search (``toolkit/models/ctc_search.py``) beside the decoder's scores of the next tokens.

    Args:
        model: whether it searches so.
        clips, beams: of the search.
        positions: of the encoder, of all clips.
        logits: scores of the next tokens, of all beams.

    Returns:
        when the search begins, and in its steps.
    """
    if not (model.config.ctc and model.config.ctc_search_weight > 0):
        return 0, 0
    tokens = logits // (clips * beams)
    read = positions * (tokens + 1)  # what the head says of each position, and the blank
    alignments = beams * positions * min(CANDIDATES, tokens)
    # Scores, log-probabilities and those within clips are there at once when it begins; the last ones stay. In a step
    # the decoder's log-probabilities and the gains of all tokens are joined by sums over alignments with each
    # candidate, which have four copies, and then by the two with their weights.
    return FLOAT32 * 3 * read, FLOAT32 * (read + 2 * logits + max(4 * alignments, 2 * logits))


def fits_whole(
    engine: Any,
    *,
    frames: npt.NDArray[np.integer],
    batch_frames: int,
    beams: int,
    max_new_tokens: int,
    graphs: bool = False,
) -> bool:
    """Whether every rank has room to translate with whole weights; all ranks call this and get the same answer.

    Args:
        engine: the DeepSpeed engine.
        frames: of each clip that is to be translated.
        batch_frames: padded frames of a batch.
        beams, max_new_tokens: of the search.
        graphs: whether its steps are CUDA graphs, on GPUs.
    """
    graphs = graphs and engine.device.type == "cuda"
    rungs = fitted_rungs(frames, engine.module.pose_encoder.frames_per_position) if engine.device.type == "cuda" else ()
    batches = evaluation_shapes(frames, batch_frames, rungs)
    needed = max(
        translation_memory(
            engine.module, clips=clips, frames=longest, beams=beams, max_new_tokens=max_new_tokens, graphs=graphs
        ).total
        for clips, longest in batches
    )
    fits = torch.tensor(float(needed <= LARGEST_SHARE * free_memory()), device=engine.device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits.item())


def fitting_batch_frames(
    model: PoseTranslator,
    device: torch.device,
    *,
    frames: npt.NDArray[np.integer],
    most: int,
    beams: int,
    max_new_tokens: int,
    gathers: bool = False,
    graphs: bool = False,
) -> int:
    """The most padded frames of a batch, ``most`` or a half, a quarter… of it, for which every rank has room.

    All ranks call this and get the same answer; one clip is always tried.

    Args:
        model: that translates.
        device: that computes.
        frames, beams, max_new_tokens: as for :func:`fits_whole`.
        most: padded frames to begin with.
        gathers: whether whole weights come on top: they are partitioned by ZeRO-3.
        graphs: whether the steps of the search are CUDA graphs, on GPUs.
    """
    graphs = graphs and device.type == "cuda"
    room, longest = LARGEST_SHARE * free_memory(device), int(frames.max(initial=1))
    rungs = fitted_rungs(frames, model.pose_encoder.frames_per_position) if device.type == "cuda" else ()

    def fits(size: int, *, whole: bool) -> bool:
        batches = evaluation_shapes(frames, size, rungs)
        every = [
            translation_memory(
                model, clips=clips, frames=length, beams=beams, max_new_tokens=max_new_tokens, graphs=graphs
            )
            for clips, length in batches
        ]
        return all(memory.total - (0 if whole else memory.weights) <= room for memory in every)

    # Without room for whole weights ranks gather layer by layer.
    gathers = gathers and fits(1, whole=True)
    size = most
    while size > longest and not fits(size, whole=gathers):
        size //= 2
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        smallest = torch.tensor(size, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        size = int(smallest.item())
    return size


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this rank may allocate: of its GPU, else its share of the machine's (or the container's) memory."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        # What torch's allocator has reserved is free for this process, though not for others.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    everywhere = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    ranks_here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or everywhere)
    share, addresses = free_host_memory() // ranks_here, free_addresses()
    return share if addresses is None else min(share, addresses)


def _first(config: Any, *names: str, missing: int | None = None) -> int:
    """The first of these settings that a configuration has.

    Raises:
        ValueError: it has none of them, and ``missing`` is None.
    """
    found = next((value for name in names if isinstance(value := getattr(config, name, None), int)), missing)
    if found is None:
        raise ValueError(f"{config.model_type}: the configuration has none of {', '.join(names)}")
    return found
