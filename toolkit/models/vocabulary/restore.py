"""Brings a full vocabulary back: rows that were trimmed come from the weights that the run started from, trained rows
take their places among them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.models.adaptation.extra_tokens import add_tokens
from toolkit.models.backbone import vocabulary_size
from toolkit.models.backbone_config import fitted_config
from toolkit.models.build import backbone_with_weights
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.loading.backbone_weights import Placement
from toolkit.models.processor import PoseProcessor
from toolkit.models.tokenizers import special_ids
from toolkit.models.translator import PoseTranslator
from toolkit.models.vocabulary.ids import ID_LISTS, renumber
from toolkit.models.vocabulary.needed import full_tokenizer
from toolkit.models.vocabulary.trimming import fingerprint_of, trimming_of
from toolkit.models.warm_start.backbone import part_of_each, token_dimension
from toolkit.models.warm_start.filling import WarmStart
from toolkit.models.warm_start.plan import make_plan
from toolkit.models.warm_start.source import read_source
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections.model import BACKBONE_PARTS

OPTION = "--restore-vocabulary"
# The score by which a CTC head never reads a token that it has no trained row for; within the range of fp16.
NEVER = -10_000.0


@dataclass(frozen=True)
class WholeVocabulary:
    """What a model with a trimmed vocabulary lacks.

    Attributes:
        backbone: as the run's would have been at its start with all tokens.
        processor: with the full tokenizer.
        kept: int64 [tokens], the full tokenizer's id of each token of the trimmed one.
    """

    backbone: PreTrainedModel
    processor: PoseProcessor
    kept: Tensor

    def added_weights(self, model: PoseTranslator) -> int:
        """How many numbers the trained model gets more."""
        parts = part_of_each(self.backbone)
        whole = dict(self.backbone.named_parameters())
        trained = dict(model.backbone.named_parameters(remove_duplicate=False))
        head = 0
        if model.config.ctc and not model.config.ctc_vocabulary:
            rows = vocabulary_size(self.backbone.config) + 1 - model.ctc_head.out_features
            head = rows * (model.ctc_head.in_features + 1)
        return head + sum(
            tensor.numel() - trained[name].numel() for name, tensor in whole.items() if parts[name] == "embeddings"
        )

    @torch.no_grad()
    def give_to(self, model: PoseTranslator) -> None:
        """Give a model of plain weights all tokens, in place: trained rows keep their values."""
        backbone = self.backbone.to(model.dtype)
        parts, trained = part_of_each(backbone), model.backbone.state_dict()
        for name, tensor in backbone.state_dict(keep_vars=True).items():
            values = trained[name].to(tensor.dtype)
            if parts[name] != "embeddings":
                tensor.copy_(values)
                continue
            dim = token_dimension(tensor, name)
            tensor.index_copy_(dim, self.kept, values.narrow(dim, 0, len(self.kept)))
        published = backbone.generation_config
        backbone.generation_config = model.backbone.generation_config
        model.backbone = backbone.train(model.training)
        if model.config.ctc and not model.config.ctc_vocabulary:
            model.ctc_head = self._head(model.ctc_head, vocabulary_size(backbone.config))
        model.config = self._config(model.config)
        renumber(model.generation_config, dict(enumerate(self.kept.tolist())))
        for key in ID_LISTS:
            # Tokens that could not be written when they were trimmed.
            if ids := getattr(published, key, None):
                setattr(model.generation_config, key, ids)

    def _head(self, head: nn.Linear, tokens: int) -> nn.Linear:
        """A CTC head with a row for each token and the blank, behind them; tokens that are new are never read."""
        wide = nn.Linear(head.in_features, tokens + 1, dtype=head.weight.dtype)
        wide.weight.zero_()
        wide.bias.fill_(NEVER)
        rows = torch.cat([self.kept, torch.tensor([tokens])])
        own = torch.cat([torch.arange(len(self.kept)), torch.tensor([head.out_features - 1])])
        wide.weight[rows], wide.bias[rows] = head.weight[own], head.bias[own]
        return wide

    def _config(self, config: PoseTranslatorConfig) -> PoseTranslatorConfig:
        whole = copy.deepcopy(config)
        values = self.backbone.config.to_dict()
        whole.backbone = {key: value for key, value in values.items() if key != "_name_or_path"}
        whole.special_token_ids = special_ids(self.processor.tokenizer)
        for key in ("prefix_token_ids", "suffix_token_ids"):
            setattr(whole, key, [int(self.kept[place]) for place in getattr(config, key)])
        for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
            setattr(whole, key, int(self.kept[getattr(config, key)]))
        return whole


def whole_vocabulary(recipe: Recipe, model: PoseTranslator, processor: PoseProcessor) -> WholeVocabulary:
    """Read what a run's model lacks, from where the run had it; holds a second backbone in memory.

    Raises:
        UserError: the vocabulary was not trimmed; its source is gone, or is another one now.
    """
    trimming = trimming_of(processor.tokenizer)
    if trimming is None:
        raise UserError(f"{OPTION}: the run has the full vocabulary of its tokenizer", f"leave out {OPTION}")
    tokenizer = full_tokenizer(recipe)
    if fingerprint_of(tokenizer) != trimming.fingerprint:
        raise UserError(
            f"{OPTION}: the tokenizer is another one than the run trimmed: {len(tokenizer)} tokens now, "
            f"{trimming.tokens} then",
            "restore the tokenizer's files, or of a hub id its revision",
        )
    settings = recipe.model.model_copy(update={"vocabulary": "full", "lora": None, "quantization": None})
    add_tokens(tokenizer, settings.extra_tokens)
    start = WarmStart(None)
    if settings.init_from and set(BACKBONE_PARTS) & set(settings.init_parts):
        # The parts of the body are the model's own; only rows of tables are read.
        settings = settings.model_copy(update={"init_parts": [p for p in BACKBONE_PARTS if p in settings.init_parts]})
        extractor = processor.feature_extractor
        source = read_source(settings.init_from or "")
        wanted = recipe.model_copy(update={"model": settings})
        landmarks = source.landmark_set
        start = WarmStart(make_plan(source, wanted, landmarks, extractor.fps, tokenizer))
    placement = Placement(model.dtype, torch.device("cpu"))
    config = fitted_config(settings, tokenizer)
    with start.override() as override:
        backbone = backbone_with_weights(config, settings, tokenizer, placement, recipe.training.seed, None, override)
    extra = tokenizer.convert_tokens_to_ids(list(settings.extra_tokens))
    kept = torch.tensor([*trimming.kept, *extra], dtype=torch.int64)
    return WholeVocabulary(backbone, PoseProcessor(processor.feature_extractor, tokenizer), kept)
