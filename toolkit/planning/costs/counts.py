"""How many parameters a recipe's model has at full size, and how many of them train, counted on the meta device.

Nothing is downloaded and no weight is made. The code that freezes and adapts a model in a run decides what trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig

from toolkit.corpus.mixture.opening import frame_of
from toolkit.models.adaptation.adapters import adapt
from toolkit.models.adaptation.quantisation import packable
from toolkit.models.backbone import empty_backbone
from toolkit.models.backbone_config import backbone_config, fit_rows
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.language_models.tensor_plan import split_weights
from toolkit.models.translator import FRESH, PoseTranslator
from toolkit.planning.costs.vocabulary import planned_vocabulary
from toolkit.recipe.model_cards import card_of, tokenizer_of
from toolkit.recipe.prompts import around_poses, own_words, placeholders
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections.model import Model

ASSUMED_GLOSSES = 2000  # of a CTC head that reads glosses, whose number the corpus alone says
BYTES_A_TOKEN = 4  # of words in a published vocabulary
CHAT = 32  # tokens that a chat template puts around a prompt: Qwen2.5's, which brings a system message, about 30
PACKED = "packed_by"  # attribute of a layer whose weight a run holds in int8 or NF4: the recipe's model.quantization


@dataclass(frozen=True)
class Weight:
    """One parameter of a translator.

    Attributes:
        numel: its numbers.
        trained: whether it trains.
        packed: whether it is held in int8 or NF4.
        linear: whether it is one of ``nn.Linear``, whose gradients DeepSpeed sends in autocast's type.
        fresh: whether it is new in every run, and therefore has a learning rate of its own.
        split: whether ranks of a tensor-parallel group divide it.
    """

    numel: int
    trained: bool
    packed: bool = False
    linear: bool = False
    fresh: bool = False
    split: bool = False


@dataclass(frozen=True)
class Counts:
    """Parameters of a translator; tied ones count once.

    Attributes:
        backbone: of the backbone, without adapters: the published figure.
        trainable: of backbone and adapters, those that train.
        weights: each parameter of the translator, adapters and pose encoder included.
    """

    backbone: int
    trainable: int
    weights: list[Weight]

    @property
    def pose_encoder(self) -> int:
        """Parameters of the pose encoder and the CTC head, which always train."""
        return sum(weight.numel for weight in self.weights if weight.trained) - self.trainable


def count(recipe: Recipe) -> Counts:
    """Count a recipe's model; a model card's own dimensions need no hub.

    Raises:
        UserError: the backbone's configuration cannot be read, or LoRA targets match nothing.
    """
    return count_with(planned_config(recipe, planned_vocabulary(recipe).rows), recipe)


def planned_config(recipe: Recipe, rows: int | None) -> PreTrainedConfig:
    """The backbone's configuration, with so many tokens in a vocabulary that is made or trimmed for the run.

    Raises:
        UserError: neither a model card nor a configuration of the backbone is here.
    """
    model = recipe.model
    if card_of(model):
        model = model.model_copy(update={"from_scratch": True})  # the card's dimensions need no hub
    config = backbone_config(model)
    if rows and recipe.model.vocabulary == "corpus":
        # Where padding is among the last tokens, it stays there.
        config.pad_token_id = min(config.pad_token_id or 0, rows - 1)
        fit_rows(config, rows)
    return config


def count_with(config: PreTrainedConfig, recipe: Recipe) -> Counts:
    """Count with a backbone of this configuration."""
    published = _sum(empty_backbone(config).parameters())
    translator, weights = adapted_translator(config, recipe)
    trainable = _sum(parameter for parameter in translator.backbone.parameters() if parameter.requires_grad)
    return Counts(published, trainable, weights)


def empty_translator(config: PreTrainedConfig, recipe: Recipe) -> PoseTranslator:
    """The recipe's translator around a backbone of this configuration, on the meta device, before any adapter."""
    landmarks, num_features = frame_of(recipe.data)
    with torch.device("meta"):
        return PoseTranslator(
            PoseTranslatorConfig(
                backbone=config.to_dict(),
                pose_encoder=recipe.model.pose_encoder.model_dump(),
                num_points=landmarks.num_points,
                num_channels=landmarks.num_channels,
                landmark_set=landmarks.to_dict(),
                num_features=num_features,
                feature_encoder=recipe.model.feature_encoder.model_dump(),
                fusion=recipe.model.fusion,
                ctc=recipe.training.ctc_weight > 0,
                ctc_search_weight=recipe.evaluation.ctc_weight,
                ctc_vocabulary=["?"] * ASSUMED_GLOSSES if recipe.training.ctc_target == "gloss" else [],
                prefix_token_ids=[0] * _longest_prefix(recipe.model),
                # A language model has them of a tokenizer; which they are changes no size.
                pad_token_id=0,
                decoder_start_token_id=0,
            ),
            empty_backbone(config),
        )


def _longest_prefix(model: Model) -> int:
    """Tokens beside the poses: the most that a clip's own words may be, and how many fixed words probably are.

    Only a tokenizer could count fixed words, and a plan asks no hub. They are bytes, or at most as many as that where a
    vocabulary is learnt from the corpus.
    """
    own, behind = own_words(model.prefix, model.prompt), around_poses(model.prompt)[1] if model.prompt else ""
    of_clip = model.max_prefix_tokens if placeholders(own) else 0
    fixed = len(((behind if of_clip else own + behind).strip()).encode())
    if tokenizer_of(model) not in ("bytes", "train"):
        fixed = math.ceil(fixed / BYTES_A_TOKEN) + (CHAT if model.prompt else 0)
    return of_clip + fixed


def adapted_translator(config: PreTrainedConfig, recipe: Recipe) -> tuple[PoseTranslator, list[Weight]]:
    """The recipe's translator with its adapters, on the meta device, and each of its parameters once."""
    translator = empty_translator(config, recipe)
    packed = _packed(translator, recipe)
    with torch.device("meta"):
        adapt(translator, recipe.model)
    layers = (module for module in translator.modules() if type(module) is nn.Linear)
    linear = {id(weight) for module in layers for weight in module.parameters(recurse=False)}
    split = {id(item) for item in split_weights(translator)}
    weights = [
        Weight(
            item.numel(),
            item.requires_grad,
            packed=id(item) in packed,
            linear=id(item) in linear,
            fresh=name.startswith(FRESH),
            split=id(item) in split,
        )
        for name, item in translator.named_parameters()
    ]
    return translator, weights


def weights_of_rank(weights: Iterable[Weight], tensor_parallel_size: int) -> list[Weight]:
    """The weights that a rank holds where so many hold one copy of the model together."""
    return [
        replace(weight, numel=weight.numel // tensor_parallel_size) if weight.split else weight for weight in weights
    ]


def _packed(translator: PoseTranslator, recipe: Recipe) -> set[int]:
    """Identities of the weights that are held in int8 or NF4; their modules get the mark ``PACKED``."""
    backbone, quantization = translator.backbone, recipe.model.quantization
    modules = [backbone.get_submodule(path) for path in (packable(backbone, quantization) if quantization else ())]
    for module in modules:
        setattr(module, PACKED, quantization)
    return {id(weight) for module in modules for weight in module.parameters()}


def _sum(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
