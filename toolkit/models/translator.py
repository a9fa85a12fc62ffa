"""The translator: a pose encoder in front of a HuggingFace seq2seq or language model, as one ``PreTrainedModel``.

A saved translator is an ordinary HuggingFace folder. Loading is strict: a missing or unexpected tensor is an error.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from toolkit.batching.collate import NO_TOKEN
from toolkit.batching.copies import on_device
from toolkit.errors import UserError
from toolkit.models.backbone import (
    decoder_inputs,
    embed_words,
    encode_vectors,
    encoder_width,
    new_backbone,
    scaled_for,
    score_tokens,
    search_inputs,
    vocabulary_size,
)
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.ctc_search import CtcPrefixScores
from toolkit.models.encoders import FeatureSettings, make_pose_encoder
from toolkit.models.encoders.features import padding_last
from toolkit.models.encoders.graph import reset_graph_parameters
from toolkit.models.first_tokens import FirstTokens
from toolkit.models.loading.base_model import BaseReference
from toolkit.poses.landmarks import LandmarkSet

# Modules whose weights are random even where the backbone is pretrained.
FRESH = ("pose_encoder.", "ctc_head.")


@dataclass
class PoseTranslatorOutput(ModelOutput):
    """What one forward pass gives.

    Attributes:
        logits: next-token scores [clips, tokens, vocabulary], or of labelled tokens alone [tokens, vocabulary].
        ctc_logits: scores of the CTC head [clips, positions, vocabulary + 1] (the last one is the blank), or None.
        encoder_mask: bool [clips, positions], true on the positions that stem from real frames.
    """

    logits: Tensor | None = None
    ctc_logits: Tensor | None = None
    encoder_mask: Tensor | None = None


class PoseTranslator(PreTrainedModel, GenerationMixin):
    """Poses to text: pose encoder → backbone encoder → backbone decoder; a language model has the decoder alone.

    A ready ``backbone``, for instance from the hub, is taken as it is; without one it is made by the configuration.
    """

    config_class = PoseTranslatorConfig
    base_model_prefix = ""
    main_input_name = "poses"
    supports_gradient_checkpointing = True
    base: BaseReference | None = None  # the backbone that it was trained on, when only what trained is saved

    def __init__(self, config: PoseTranslatorConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.backbone = backbone if backbone is not None else new_backbone(config.backbone_config())
        # How to search is for the translator's settings; published ones must not replace keys that these leave out.
        self.backbone.generation_config = GenerationConfig()
        width = encoder_width(self.backbone.config)
        self.pose_encoder = make_pose_encoder(
            config.pose_encoder,
            num_points=config.num_points,
            num_channels=config.num_channels,
            width=width,
            landmark_set=LandmarkSet.from_dict(config.landmark_set) if config.landmark_set else None,
            features=FeatureSettings(config.num_features, config.feature_encoder, config.fusion)
            if config.num_features
            else None,
        )
        if config.ctc:
            read = len(config.ctc_vocabulary) or vocabulary_size(self.backbone.config)
            self.ctc_head = nn.Linear(width, read + 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the modules that are ours; the backbone has initialised its own."""
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        reset_graph_parameters(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def encode(
        self,
        poses: Tensor,
        visible: Tensor,
        frame_mask: Tensor,
        prefix_ids: Tensor | None = None,
        video_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the encoders once.

        Args:
            poses: [clips, frames, points, channels].
            visible: bool [clips, frames, points].
            frame_mask: bool [clips, frames].
            prefix_ids: tokens before the poses of each clip [clips, tokens], -1 where padded; None where the
                configuration has them. ``PoseProcessor`` makes them.
            video_features: what another network made of the clips [clips, frames, dimensions]; None for a model that
                reads poses alone.

        Returns:
            what the decoder reads of the clips [clips, positions, width], an encoder's hidden states or the prefix of a
            language model's text, and their bool mask [clips, positions]; padding stands behind everything.

        Raises:
            ValueError: the model's prefix differs from clip to clip, and there are none.
        """
        of_features = {} if video_features is None else {"video_features": video_features}
        vectors, mask = self.pose_encoder(poses, visible, frame_mask, **of_features)
        vectors, config = scaled_for(self.backbone, vectors), self.config
        if config.prefix_template and prefix_ids is None:
            raise ValueError("the model needs prefix_ids: call it with what its processor makes of clips")
        before, behind = (self._fixed(ids, vectors) for ids in (config.prefix_token_ids, config.suffix_token_ids))
        if before is not None:
            prefix_ids = before if prefix_ids is None else torch.cat([before, prefix_ids], dim=1)
        parts = [self._embedded(prefix_ids, vectors), (vectors, mask), self._embedded(behind, vectors)]
        if prefix_ids is not None or behind is not None:
            vectors, mask = (torch.cat(pair, dim=1) for pair in zip(*filter(None, parts), strict=True))
        if config.prefix_template or behind is not None:
            vectors, mask = padding_last(vectors, mask)
        return encode_vectors(self.backbone, vectors, mask), mask

    def _fixed(self, ids: list[int], vectors: Tensor) -> Tensor | None:
        """Tokens that all clips of these vectors have [clips, tokens]; None where there are none."""
        return on_device(ids, vectors.device, torch.int64).expand(len(vectors), -1) if ids else None

    def _embedded(self, ids: Tensor | None, vectors: Tensor) -> tuple[Tensor, Tensor] | None:
        """Words beside these vectors, and their mask."""
        if ids is None:
            return None
        return embed_words(self.backbone, ids.clamp(min=0)).to(vectors.dtype), ids != NO_TOKEN

    def forward(
        self,
        poses: Tensor,
        visible: Tensor,
        frame_mask: Tensor,
        labels: Tensor,
        labelled: Tensor | None = None,
        prefix_ids: Tensor | None = None,
        video_features: Tensor | None = None,
    ) -> PoseTranslatorOutput:
        """Score the labels (teacher forcing).

        Args:
            poses, visible, frame_mask, prefix_ids, video_features: as :meth:`encode` takes them.
            labels: token ids [clips, tokens], -100 where padded.
            labelled: places of the labels that count in the flattened ``labels``, int64 [labels that count]: logits
                are of these alone, [labels that count, vocabulary]. None scores all places.
        """
        hidden, mask = self.encode(poses, visible, frame_mask, prefix_ids, video_features)
        logits = score_tokens(self.backbone, hidden, mask, decoder_inputs(labels, self.config), labelled)
        ctc_logits, mask = self._ctc(hidden, mask, prefix_ids) if self.config.ctc else (None, mask)
        return PoseTranslatorOutput(logits=logits, ctc_logits=ctc_logits, encoder_mask=mask)

    def _ctc(self, hidden: Tensor, mask: Tensor, prefix_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores of the CTC head and their mask, at the positions that stem from poses."""
        fixed, behind = len(self.config.prefix_token_ids), len(self.config.suffix_token_ids)
        if prefix_ids is None and not behind:
            return self.ctc_head(hidden[:, fixed:]), mask[:, fixed:]
        of_clip = torch.zeros_like(mask[:, :1]) if prefix_ids is None else prefix_ids != NO_TOKEN
        words = fixed + of_clip.sum(dim=1, keepdim=True)
        of_batch = fixed + behind + (0 if prefix_ids is None else prefix_ids.shape[1])
        positions = torch.arange(hidden.shape[1] - of_batch, device=hidden.device)
        of_poses = hidden.gather(1, (words + positions).unsqueeze(-1).expand(-1, -1, hidden.shape[2]))
        return self.ctc_head(of_poses), positions < mask.sum(dim=1, keepdim=True) - words - behind

    @torch.no_grad()
    def read_glosses(self, hidden: Tensor, mask: Tensor, prefix_ids: Tensor | None = None) -> list[str]:
        """The glosses of clips, as ``encode`` gives them: the best of each position, without repetitions and blanks."""
        logits, mask = self._ctc(hidden, mask, prefix_ids)
        glosses = self.config.ctc_vocabulary
        best = logits.argmax(dim=-1).masked_fill(~mask, len(glosses))
        return [
            " ".join(glosses[place] for place, _ in itertools.groupby(of_clip) if place < len(glosses))
            for of_clip in best.tolist()
        ]

    @torch.no_grad()
    def generate(
        self,
        poses: Tensor,
        visible: Tensor,
        frame_mask: Tensor,
        prefix_ids: Tensor | None = None,
        first_tokens: Tensor | None = None,
        video_features: Tensor | None = None,
        encoded: tuple[Tensor, Tensor] | None = None,
        **settings: Any,
    ) -> Any:
        """Translate: the encoders run once, then the backbone's own ``generate`` searches.

        Args:
            poses, visible, frame_mask, prefix_ids, video_features: as :meth:`encode` takes them.
            first_tokens: the token that the text of each clip begins with [clips], as the code of its language; None
                for that of the model's settings.
            encoded: what :meth:`encode` gives of these clips; None = the encoder runs here.
            settings: what HuggingFace's ``generate`` takes (``num_beams``, ``max_new_tokens``, ``synced_gpus``, …).

        Returns:
            what the backbone's ``generate`` returns: token ids [clips × sequences, tokens] or an output object.
        """
        hidden, mask = encoded or self.encode(poses, visible, frame_mask, prefix_ids, video_features)
        search = copy.deepcopy(self.generation_config)
        others = search.update(**settings)
        processors = []
        if first_tokens is not None:
            search.forced_bos_token_id = None
            processors.append(FirstTokens(first_tokens, search.num_beams or 1))
        if self.config.ctc and self.config.ctc_search_weight > 0:
            processors.append(
                CtcPrefixScores(
                    *self._ctc(hidden, mask, prefix_ids),
                    weight=self.config.ctc_search_weight,
                    end_id=self.config.eos_token_id,
                    special_ids=self.config.special_token_ids,
                    num_beams=search.num_beams or 1,
                )
            )
        if processors:
            others["logits_processor"] = [*processors, *others.get("logits_processor", [])]
        return self.backbone.generate(
            **search_inputs(self.backbone, hidden, mask, self.config.decoder_start_token_id),
            generation_config=search,
            **others,
        )

    def _attach_adapter(self, place: str, settings: dict[str, Any]) -> set[str]:
        """Load the adapter beside the weights; gives the names of tensors that it lacks or has too many."""
        # transformers' own load_adapter leaves DoRA's magnitudes out (5.23).
        from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

        found = {key: settings[key] for key in ("token", "revision", "cache_dir") if settings.get(key)}
        found["subfolder"] = self.config.adapter
        adapter = PeftConfig.from_pretrained(place, **found)
        adapter.inference_mode = True
        self.add_adapter(adapter)
        result = set_peft_model_state_dict(self, load_peft_weights(place, device="cpu", **found))
        self.eval()
        return {name for name in result.missing_keys if ".lora_" in name} | set(result.unexpected_keys)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder strictly, with the adapter that its configuration names.

        Raises:
            UserError: the folder's tensors are not exactly those that the configuration asks for.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if model.config.adapter:
            info["missing_keys"] |= model._attach_adapter(str(pretrained_model_name_or_path), kwargs)
        problems = {
            kind: sorted(str(key) for key in info[kind])
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        }
        if problems:
            listed = "; ".join(f"{kind.replace('_keys', '')}: {', '.join(keys[:5])}" for kind, keys in problems.items())
            raise UserError(
                f"{pretrained_model_name_or_path} does not hold this model's weights ({listed})",
                "save it again with save_pretrained, or name the folder that was trained",
            )
        return (model, info) if wants_info else model
