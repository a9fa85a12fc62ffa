"""Collate clips of different lengths into one padded batch of tensors.

A missing landmark is zero in ``poses`` and false in ``visible``; padding is false in ``frame_mask``. A filler clip has
no labels, so it does not count in a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toolkit.batching.languages import language_tokens
from toolkit.batching.lengths import rung_above

if TYPE_CHECKING:
    from toolkit.corpus.packed import Clips

IGNORED_LABEL = -100
NO_TOKEN = -1  # pads prefixes
# Bits of a float16: the mask of all but the sign, and infinity, above which all patterns are NaN.
HALF_WITHOUT_SIGN, HALF_INFINITY = np.uint16(0x7FFF), np.uint16(0x7C00)


@dataclass
class Batch:
    """The clips of one forward pass of one rank."""

    uids: list[str]  # of each clip, fillers included
    texts: list[str]  # the same
    clips: Tensor  # int64 [clips], each clip's index in its split
    poses: Tensor  # float32 [clips, frames, points, channels], in shoulder widths; 0 where missing or padded
    visible: Tensor  # bool [clips, frames, points], false where missing or padded
    frame_mask: Tensor  # bool [clips, frames], false where padded
    labels: Tensor  # int64 [clips, tokens], end of sentence included; -100 where padded and for fillers
    labelled: Tensor  # int64 [labels that count], their places in the flattened labels
    is_filler: Tensor  # bool [clips]; outputs of a filler must be ignored
    num_clips: int  # without fillers
    num_frames: int  # without padding and fillers
    target_languages: list[str] = field(default_factory=list)  # of the texts; empty where the table has none
    prefixes: list[str] | None = None  # of each clip, in words; None where all clips have the same
    prefix_ids: Tensor | None = None  # int64 [clips, tokens], -1 where padded; the same in tokens
    video_features: Tensor | None = None  # float16 [clips, frames, dimensions], 0 where padded; None without any
    glosses: list[str] = field(default_factory=list)  # of each clip; empty where the table has none
    gloss_labels: Tensor | None = None  # int64 [clips, glosses], -100 where padded; None where CTC reads the text

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model reads of the clips, as ``PoseTranslator.encode`` takes it."""
        optional = {"video_features": self.video_features, "prefix_ids": self.prefix_ids}
        given = {name: tensor for name, tensor in optional.items() if tensor is not None}
        return {"poses": self.poses, "visible": self.visible, "frame_mask": self.frame_mask, **given}

    @property
    def num_target_tokens(self) -> int:
        """Labels without padding and fillers."""
        return len(self.labelled)

    def __len__(self) -> int:
        return len(self.uids)

    def halves(self) -> tuple[Batch, Batch]:
        """The first and the second half of its clips, padded as they are here."""
        middle = len(self) // 2
        return self._span(0, middle), self._span(middle, len(self))

    def _span(self, start: int, stop: int) -> Batch:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        values: dict[str, Any] = {
            name: value[start:stop] for name, value in given.items() if isinstance(value, list | Tensor)
        }
        tokens, is_filler = self.labels.shape[1], self.is_filler[start:stop]
        places = self.labelled - start * tokens
        frames = self.frame_mask[start:stop].sum(1).cpu()
        values["labelled"] = places[(places >= 0) & (places < (stop - start) * tokens)]
        values["num_clips"] = int((~is_filler).sum())
        values["num_frames"] = int(frames[~is_filler.cpu()].sum())
        return replace(self, **values)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on ``device``; ``clips`` and ``is_filler`` stay where they are read."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, clips=self.clips, is_filler=self.is_filler)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Any) -> Batch:
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: move(value) for name, value in tensors.items() if isinstance(value, Tensor)})


def collate(clips: Clips, indices: Sequence[int], tokenizer: Any, *, max_target_tokens: int) -> Batch:
    """Pad clips to the longest among them and turn their texts into labels; see :func:`pad` and :func:`add_labels`."""
    return add_labels(pad(clips, indices), tokenizer, max_target_tokens)


def pad(clips: Clips, indices: Sequence[int] | npt.NDArray[np.int64], frames: int = 0) -> Batch:
    """Pad clips to the longest among them, or to so many frames; the batch has no labels yet.

    Args:
        clips: their arrays are float16; a landmark that is missing is NaN in every channel.
        indices: each clip's index in its split; ``~i`` marks a filler.
    """
    poses, visible, frame_mask = pad_features(clips.features, frames)
    positions = np.asarray(indices, dtype=np.int64)
    is_filler = positions < 0
    return Batch(
        uids=clips.texts["uid"],
        texts=clips.texts["text"],
        clips=torch.from_numpy(np.where(is_filler, ~positions, positions)),
        poses=poses,
        visible=visible,
        frame_mask=frame_mask,
        labels=torch.empty(len(clips), 0, dtype=torch.int64),
        labelled=torch.empty(0, dtype=torch.int64),
        is_filler=torch.from_numpy(is_filler),
        num_clips=len(clips) - int(is_filler.sum()),
        num_frames=sum(len(each) for each, no in zip(clips.features, is_filler.tolist(), strict=True) if not no),
        target_languages=clips.texts["target_language"],
        video_features=pad_video_features(clips.video_features, frames),
        glosses=clips.texts["gloss"],
    )


def pad_video_features(features: Sequence[npt.NDArray[np.float16]] | None, padded_frames: int = 0) -> Tensor | None:
    """Pad what another network made of each clip, float16 [frames, dimensions]: with zeros, to the longest of them.

    It stays float16, so that loading it is one copy. None where clips have none.
    """
    return torch.from_numpy(_padded_frames(features, padded_frames, 0)) if features else None


def pad_features(features: Sequence[npt.NDArray[np.float16]], padded_frames: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the features of clips to the longest among them, for training and for translating alike.

    Args:
        features: of each clip float16 [frames, points, channels], NaN in every channel of a landmark that is missing.
        padded_frames: to pad to, where no clip is longer.

    Returns:
        ``poses``, ``visible`` and ``frame_mask`` of a :class:`Batch`.
    """
    # Padding starts as NaN, so that one comparison finds both padding and missing landmarks.
    rows = _padded_frames(features, padded_frames, np.nan)
    frame_mask = torch.from_numpy(np.arange(rows.shape[1]) < np.array([*map(len, features)])[:, None])
    # All channels are NaN or none is, so the first one decides; comparing its bits is ten times faster than isnan.
    visible = torch.from_numpy((rows.view(np.uint16)[..., 0] & HALF_WITHOUT_SIGN) < HALF_INFINITY)
    poses = torch.from_numpy(rows).float().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return poses, visible, frame_mask


def _padded_frames(
    arrays: Sequence[npt.NDArray[np.float16]], padded_frames: int, padding: float
) -> npt.NDArray[np.float16]:
    """Arrays [frames, ...] as one [arrays, frames, ...], padded to the longest of them or to so many frames.

    One call copies them all, as bytes: numpy takes a tenth longer for many short clips.
    """
    lengths = [*map(len, arrays)]
    longest, shape = max(padded_frames, *lengths), arrays[0].shape[1:]
    joined: Any = arrays
    if (most := longest - min(lengths)) > 0:
        blank = np.full((most, *shape), padding, np.float16)
        joined = chain.from_iterable((array, blank[: longest - len(array)]) for array in arrays)
    packed = np.ndarray((len(arrays), longest, *shape), np.float16, content := bytearray().join(joined))
    if packed.nbytes != len(content):
        raise TypeError(f"{len(content):,} bytes of clips, and float16 {list(packed.shape)} has {packed.nbytes:,}")
    return packed


def add_labels(batch: Batch, tokenizer: Any, max_target_tokens: int, rungs: Sequence[int] = ()) -> Batch:
    """Turn a padded batch's texts into its labels, padded to the longest among them or to one of ``rungs``.

    Longer targets than ``max_target_tokens`` are truncated and keep their end of sentence.
    """
    labels = target_labels(batch.texts, tokenizer, max_target_tokens, rungs)
    if (tokens := language_tokens(tokenizer, batch.target_languages)) is not None:
        labels[:, 0] = torch.tensor(tokens)
    labels[batch.is_filler] = IGNORED_LABEL
    batch.labels, batch.labelled = labels, places_of_labels(labels)
    return batch


def places_of_labels(labels: Tensor) -> Tensor:
    """Where the labels that count stand in the flattened ``labels`` [clips, tokens]: int64 [labels that count].

    It is found where the batch is made: on a GPU the host would have to wait for their number.
    """
    return (labels.flatten() != IGNORED_LABEL).nonzero().squeeze(1)


def prefix_tokens(prefixes: Sequence[str], tokenizer: Any, max_tokens: int, rungs: Sequence[int] = ()) -> Tensor:
    """Tokenise the prefixes of clips: int64 [clips, tokens], padded with -1; longer ones are truncated."""
    encoded = tokenizer(list(prefixes), add_special_tokens=False)["input_ids"]
    return _padded([ids[:max_tokens] for ids in encoded], NO_TOKEN, rungs)


def target_labels(texts: Sequence[str], tokenizer: Any, max_target_tokens: int, rungs: Sequence[int] = ()) -> Tensor:
    """Tokenise target texts: int64 [texts, tokens], padded with -100; longer ones are truncated."""
    encoded: Mapping[str, list[list[int]]] = tokenizer(text_target=list(texts))
    rows = []
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        if len(ids) > max_target_tokens:
            # The tokenizer truncates the words and keeps its special tokens, the end of sentence among them.
            ids = tokenizer(text_target=text, truncation=True, max_length=max_target_tokens)["input_ids"]
        rows.append(ids)
    return _padded(rows, IGNORED_LABEL, rungs)


def _padded(rows: Sequence[Sequence[int]], padding: int, rungs: Sequence[int]) -> Tensor:
    """Rows as one tensor, padded to the longest of them or to the rung above it."""
    ids = np.full((len(rows), rung_above(rungs, max(map(len, rows)))), padding, np.int64)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = values
    return torch.from_numpy(ids)
