"""The configuration of a pose translator: ``config.json`` of a model folder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig


class PoseTranslatorConfig(PreTrainedConfig):
    """Configuration of :class:`~toolkit.models.translator.PoseTranslator`.

    Args:
        backbone: the HuggingFace configuration of the backbone, as ``to_dict`` gives it.
        pose_encoder: the settings of the pose encoder (``kind``, ``hidden``, ``layers``, …), as the recipe's
            ``model.pose_encoder`` holds them.
        num_points: landmarks per frame.
        num_channels: coordinates per landmark (x, y, z).
        landmark_set: what the landmarks are, as ``LandmarkSet.to_dict`` gives it; ``stgcn`` makes its graph of it.
        num_features: numbers of a frame that another network made of the video; 0 = the model reads poses alone.
        feature_encoder: the settings of their encoder, as the recipe's ``model.feature_encoder`` holds them.
        fusion: how their vectors are joined with those of the poses, as the recipe's ``model.fusion``.
        ctc: whether there is a CTC head on the encoder's output.
        ctc_vocabulary: the glosses that it reads; empty if it reads the tokens of the backbone's vocabulary.
        ctc_search_weight: share of the CTC head in the score of a beam, 0..1; 0 searches by the decoder alone.
        special_token_ids: tokens that are written but not signed; CTC never reads them.
        prefix_token_ids: a text prompt whose embeddings stand before the poses of every clip.
        prefix_template: a template that names conditions of a clip, which the processor fills in; behind these tokens.
        max_prefix_tokens: longer ones are truncated.
        suffix_token_ids: words between the poses of every clip and the start token of its text; language models only.
        adapter: folder, beside the weights, of their PEFT adapter, which ``from_pretrained`` loads; ``adapter=None``
            leaves it out.
        lineage: the trained translator that training started from, if any: ``source``, ``step``, ``scores``, what was
            taken of it (``table``), and its own ``lineage``.
    """

    model_type = "pose_translator"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        pose_encoder: dict[str, Any] | None = None,
        num_points: int = 0,
        num_channels: int = 3,
        landmark_set: dict[str, Any] | None = None,
        num_features: int = 0,
        feature_encoder: dict[str, Any] | None = None,
        fusion: str = "sum",
        ctc: bool = False,
        ctc_vocabulary: list[str] | None = None,
        ctc_search_weight: float = 0.0,
        special_token_ids: list[int] | None = None,
        prefix_token_ids: list[int] | None = None,
        prefix_template: str = "",
        max_prefix_tokens: int = 0,
        suffix_token_ids: list[int] | None = None,
        adapter: str | None = None,
        lineage: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.pose_encoder = pose_encoder or {}
        self.num_points = num_points
        self.num_channels = num_channels
        self.landmark_set = landmark_set or {}
        self.num_features = num_features
        self.feature_encoder = feature_encoder or {}
        self.fusion = fusion
        self.ctc = ctc
        self.ctc_vocabulary = ctc_vocabulary or []
        self.ctc_search_weight = ctc_search_weight
        self.special_token_ids = special_token_ids or []
        self.prefix_token_ids = prefix_token_ids or []
        self.prefix_template = prefix_template
        self.max_prefix_tokens = max_prefix_tokens
        self.suffix_token_ids = suffix_token_ids or []
        self.adapter = adapter
        self.lineage = lineage
        # generate() and the tokenizer read these off the outer configuration.
        for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
            kwargs.setdefault(key, self.backbone.get(key))
        if kwargs["pad_token_id"] is None:
            kwargs["pad_token_id"] = kwargs["eos_token_id"]  # a language model may have no other
        kwargs.setdefault("is_encoder_decoder", True)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def longest_prefix(self) -> int:
        """Tokens beside the poses, at most."""
        of_clip = self.max_prefix_tokens if self.prefix_template else 0
        return of_clip + len(self.prefix_token_ids) + len(self.suffix_token_ids)

    def input_shapes(self, clips: int, frames: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what the model reads of so many clips, by the names that ``PoseTranslator.encode`` has."""
        shapes = {
            "poses": ((clips, frames, self.num_points, self.num_channels), torch.float32),
            "visible": ((clips, frames, self.num_points), torch.bool),
            "frame_mask": ((clips, frames), torch.bool),
        }
        of_features = {"video_features": ((clips, frames, self.num_features), torch.float16)}
        return shapes | (of_features if self.num_features else {})

    def backbone_config(self) -> PreTrainedConfig:
        """The backbone's configuration as an object of its own class."""
        # The type that its weights were published in is not the type of this model's.
        values = {key: value for key, value in self.backbone.items() if key not in ("dtype", "torch_dtype")}
        return AutoConfig.for_model(values.pop("model_type"), **values)
