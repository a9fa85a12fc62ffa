"""T5's kind with an output matrix of its own, which transformers 5 ties to the token table."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    MT5ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
    initialization,
)


class _WithSeparateOutput(PreTrainedModel):
    """T5's kind with an output matrix of its own, as T5 1.1, Flan-T5, mT5 and UMT5 were published.

    Their configurations say `tie_word_embeddings: false`, and transformers 5 ties the matrix to the embedding all the
    same. (LongT5 says false, too, and was published with one matrix.)
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        # transformers scales the decoder's states by this width before a tied matrix; a separate one takes them as
        # they are. UMT5 would scale them, because transformers forces its configuration to be tied.
        self.model_dim = 1

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # Fan-in, as T5X has it: logits begin near zero.
            initialization.normal_(self.lm_head.weight, mean=0.0, std=self.config.d_model**-0.5)


def _ties_but_the_output(model_class: type[PreTrainedModel]) -> dict[str, str]:
    return {name: source for name, source in (model_class._tied_weights_keys or {}).items() if "lm_head" not in name}


# transformers does not initialise modules without weights of their own in a model of another package: `__module__`
# says that these are initialised as its own.
class _T5WithSeparateOutput(_WithSeparateOutput, T5ForConditionalGeneration):
    __module__ = T5ForConditionalGeneration.__module__
    _tied_weights_keys = _ties_but_the_output(T5ForConditionalGeneration)


class _MT5WithSeparateOutput(_WithSeparateOutput, MT5ForConditionalGeneration):
    __module__ = MT5ForConditionalGeneration.__module__
    _tied_weights_keys = _ties_but_the_output(MT5ForConditionalGeneration)


class _UMT5WithSeparateOutput(_WithSeparateOutput, UMT5ForConditionalGeneration):
    __module__ = UMT5ForConditionalGeneration.__module__
    _tied_weights_keys = _ties_but_the_output(UMT5ForConditionalGeneration)


SEPARATE_OUTPUT = {"t5": _T5WithSeparateOutput, "mt5": _MT5WithSeparateOutput, "umt5": _UMT5WithSeparateOutput}
