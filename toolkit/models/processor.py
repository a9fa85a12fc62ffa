"""The processor of a model folder: pose files and feature files become model inputs as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin

from toolkit.batching.collate import pad_features, pad_video_features, prefix_tokens
from toolkit.batching.languages import language_tokens
from toolkit.poses.features import NORMALISATION, read_clip
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.pose_file import PoseError, RawPose
from toolkit.poses.video_features import RawFeatures, Recording, read_features
from toolkit.recipe.prompts import fill, placeholders


class PoseFeatureExtractor(FeatureExtractionMixin):
    """Turns pose files into padded tensors.

    The landmarks are as ``LandmarkSet.to_dict`` gives them, ``fps`` as after resampling, and longer clips than
    ``max_frames`` are shortened by ``too_long``, as in a recipe. A folder made by another normalisation is refused.
    ``prefix_template``, ``max_prefix_tokens`` and ``num_features`` are those of the model's configuration.
    """

    model_input_names = ["poses", "visible", "frame_mask", "video_features"]  # noqa: RUF012 (transformers reads this name)

    def __init__(
        self,
        landmark_set: dict[str, Any] | None = None,
        fps: float = 12.5,
        max_frames: int | None = None,
        too_long: str = "subsample",
        normalisation: str = NORMALISATION,
        prefix_template: str = "",
        max_prefix_tokens: int = 0,
        num_features: int = 0,
        **kwargs: Any,
    ) -> None:
        if normalisation != NORMALISATION:
            raise ValueError(f"this model normalises poses by {normalisation!r}; this version of the toolkit cannot")
        self.landmark_set = landmark_set or {}
        self.fps = fps
        self.max_frames = max_frames
        self.too_long = too_long
        self.normalisation = normalisation
        self.prefix_template = prefix_template
        self.max_prefix_tokens = max_prefix_tokens
        self.num_features = num_features
        super().__init__(**kwargs)

    def __call__(
        self,
        poses: Sequence[str | Path | bytes | RawPose | None],
        video_features: Sequence[str | Path | bytes | RawFeatures] | None = None,
        features_fps: float | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Read clips.

        Args:
            poses: paths of ``.pose`` files, their bytes, or clips that are read already; None for a model that reads
                features alone.
            video_features: for a model that reads features, those of each clip, likewise.
            features_fps: their frame rate, where files name none.

        Returns:
            ``poses`` float32 [clips, frames, points, channels], ``visible`` bool [clips, frames, points],
            ``frame_mask`` bool [clips, frames] and, for a model that reads them, ``video_features`` float16
            [clips, frames, dimensions].

        Raises:
            PoseError: a file is not usable; the message is the reason.
        """
        videos: Sequence[Any] = video_features or [None] * len(poses)
        recordings = (
            Recording(_read(pose, read_clip), _read(video, partial(read_features, fps=features_fps)))
            for pose, video in zip(poses, videos, strict=True)
        )
        return self.pad([self.sample(recording) for recording in recordings])

    def sample(self, clip: Recording) -> ClipArrays:
        """The arrays of one clip as in a corpus.

        Raises:
            PoseError: the clip is not usable; the message is the reason.
        """
        landmark_set = LandmarkSet.from_dict(self.landmark_set)
        if bool(clip.poses) != bool(landmark_set.num_points) or bool(clip.features) != bool(self.num_features):
            wanted = [what for what, number in self._reads(landmark_set).items() if number]
            raise PoseError(f"the model reads {' and '.join(wanted)} of each clip")
        if clip.features and clip.features.width != self.num_features:
            raise PoseError(f"{clip.features.width} features a frame, and the model reads {self.num_features}")
        found = clip.sampled(
            landmark_set,
            self.fps,
            max_frames=self.max_frames,
            too_long=self.too_long,  # type: ignore[arg-type]
        )
        return ClipArrays(torch.from_numpy(found.features).half().numpy(), found.video_features)

    def _reads(self, landmark_set: LandmarkSet) -> dict[str, int]:
        return {"poses": landmark_set.num_points, "features": self.num_features}

    def features(self, pose: str | Path | bytes | RawPose) -> npt.NDArray[np.float16]:
        """One clip's features, float16 as in a corpus [frames, points, channels]; NaN = missing.

        Raises:
            PoseError: the clip is not usable; the message is the reason.
        """
        return self.sample(Recording(_read(pose, read_clip))).features

    def pad(self, clips: Sequence[ClipArrays | npt.NDArray[np.float16]]) -> BatchFeature:
        """Put clips, as :meth:`sample` or :meth:`features` gives them, into one batch."""
        arrays = [clip if isinstance(clip, ClipArrays) else ClipArrays(clip) for clip in clips]
        poses = [np.ascontiguousarray(clip.features, np.float16) for clip in arrays]
        inputs = dict(zip(self.model_input_names[:3], pad_features(poses), strict=True))
        found = [clip.video_features for clip in arrays if clip.video_features is not None]
        video_features = pad_video_features([np.ascontiguousarray(features, np.float16) for features in found])
        return BatchFeature(inputs | ({} if video_features is None else {"video_features": video_features}))


@dataclass(frozen=True)
class ClipArrays:
    """What a model reads of one clip, float16 as in a corpus."""

    features: npt.NDArray[np.float16]  # of the poses [frames, points, channels]; NaN = missing
    video_features: npt.NDArray[np.float16] | None = None  # of another network [frames, dimensions]

    def __len__(self) -> int:
        return len(self.features)


def _read(source: Any, parse: Callable[[bytes], Any]) -> Any:
    """What a path or bytes hold; what is read already, or None, as it is."""
    if isinstance(source, str | Path):
        source = Path(source).read_bytes()
    return parse(source) if isinstance(source, bytes) else source


class PoseProcessor(ProcessorMixin):
    """Feature extractor and tokenizer of a translator, saved beside its weights."""

    def __init__(self, feature_extractor: PoseFeatureExtractor, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(feature_extractor, tokenizer)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Our feature extractor is not among those that transformers ships; any tokenizer will do."""
        expected = {"feature_extractor": PoseFeatureExtractor, "tokenizer": PreTrainedTokenizerBase}[argument_name]
        if not isinstance(argument, expected):
            raise TypeError(f"{argument_name} is a {type(argument).__name__}, not a {expected.__name__}")
        return type(argument)

    def __call__(
        self,
        poses: Sequence[str | Path | bytes | RawPose | None],
        conditions: Sequence[Mapping[str, str]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of pose and feature files; see :class:`PoseFeatureExtractor`, which takes ``kwargs``.

        Args:
            poses: the clips.
            conditions: of each clip, what is known of it: ``language``, ``target_language``, ``prompt``, ``context``.
        """
        inputs = self.feature_extractor(poses, **kwargs)
        return self.add_conditions(inputs, conditions or [{}] * len(poses))

    def add_conditions(self, inputs: BatchFeature, conditions: Sequence[Mapping[str, str]]) -> BatchFeature:
        """Add ``prefix_ids`` where the model's prefix names conditions, and ``first_tokens`` of other target languages.

        Raises:
            UserError: the tokenizer does not know a target language.
        """
        extractor = self.feature_extractor
        if extractor.prefix_template:
            prefixes = [fill(extractor.prefix_template, of_clip) for of_clip in conditions]
            inputs["prefix_ids"] = prefix_tokens(prefixes, self.tokenizer, extractor.max_prefix_tokens)
        tokens = language_tokens(self.tokenizer, [of_clip.get("target_language", "") for of_clip in conditions])
        if tokens is not None:
            inputs["first_tokens"] = torch.tensor(tokens)
        return inputs

    def batch_decode(self, sequences: torch.Tensor | Sequence[Sequence[int]], **kwargs: Any) -> list[str]:
        """Texts of token ids, without special tokens unless requested.

        Args:
            sequences: [texts, tokens]. A model may have more ids than its tokenizer has tokens (the embedding of T5 and
                ByT5 is padded); those are no text, and some tokenizers fail on them.
            kwargs: what the tokenizer takes besides.
        """
        kwargs.setdefault("skip_special_tokens", True)
        tokens = len(self.tokenizer)
        return self.tokenizer.batch_decode([[int(i) for i in ids if i < tokens] for ids in sequences], **kwargs)


def conditions_of(processor: PoseProcessor) -> list[str]:
    """What a user may say about a clip: the conditions of the prefix, and the language where the texts name theirs."""
    names = placeholders(processor.feature_extractor.prefix_template)
    if getattr(processor.tokenizer, "tgt_lang", None) and "target_language" not in names:
        names.append("target_language")
    return names
