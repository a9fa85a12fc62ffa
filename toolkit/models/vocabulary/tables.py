"""Rows of a backbone's token tables for a trimmed vocabulary, read out of whole tables one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from toolkit.models.adaptation.extra_tokens import widened
from toolkit.models.backbone import vocabulary_size
from toolkit.models.loading.base_model import TensorReader
from toolkit.models.vocabulary.trimming import Trimming
from toolkit.models.warm_start.backbone import part_of_each, token_dimension


@dataclass(frozen=True)
class Trim:
    """How the tables of a backbone are trimmed.

    Attributes:
        trimming: which tokens are kept.
        config: of the backbone before, with a row for each token.
    """

    trimming: Trimming
    config: PreTrainedConfig

    def watch(self, source: TensorReader, backbone: PreTrainedModel) -> TensorReader:
        """The reader of a trimmed backbone's tensors, from that of whole ones: tables lose the rows of other tokens.

        Rows for tokens that were added after trimming are zero. No more than one whole table is held at a time.
        """
        parts, rows = part_of_each(backbone), vocabulary_size(self.config)
        kept = torch.tensor(self.trimming.kept, dtype=torch.int64)

        def read(name: str, like: Tensor) -> Tensor:
            if parts.get(name) != "embeddings":
                return source(name, like)
            dim = token_dimension(like, name)
            shape = [rows if place == dim else size for place, size in enumerate(like.shape)]
            whole = source(name, torch.empty(shape, dtype=like.dtype, device="meta"))
            return widened(whole.index_select(dim, kept), like)

        return read
