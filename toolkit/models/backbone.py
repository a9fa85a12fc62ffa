"""What a seq2seq backbone is, read from its configuration or from its empty modules; nothing here knows of poses.

Every architecture answers the same questions here: which class, how wide, how many positions, how a text begins.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from toolkit.batching.collate import IGNORED_LABEL

# Published configurations of these say `tie_word_embeddings: false` and mean it: their checkpoints hold an output
# matrix besides the embedding. transformers 5 ties them all the same. (LongT5 says false, too, and holds one matrix.)
SEPARATE_OUTPUT = frozenset({"t5", "mt5", "umt5"})


def note_output_matrix(config: PreTrainedConfig, published: dict[str, Any]) -> None:
    """Write into ``config`` whether the output projection is a matrix of its own, which transformers 5 forgets.

    Args:
        config: of the backbone; gets ``separate_output=True``, which outlives saving, or nothing.
        published: the values of ``config.json`` or of a model card, before transformers read them.
    """
    # T5 saved again by transformers 5 says `true` but remembers that it is not scaled, which only untied ones are.
    unscaled = config.model_type == "t5" and published.get("scale_decoder_outputs") is False
    untied = published.get("tie_word_embeddings") is False or unscaled
    if config.model_type in SEPARATE_OUTPUT and untied:
        config.separate_output = True


def is_known(config: PreTrainedConfig) -> bool:
    """Whether ``config`` is of one of transformers' own seq2seq architectures."""
    return type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def is_seq2seq(config: PreTrainedConfig) -> bool:
    """Whether there is an encoder-decoder that reads and writes text for ``config``, here or in code from the hub."""
    return is_known(config) or "AutoModelForSeq2SeqLM" in (getattr(config, "auto_map", None) or {})


def backbone_class(config: PreTrainedConfig) -> Any:
    """The class of the backbone: transformers' own, ``AutoModelForSeq2SeqLM`` for code from the hub, or a subclass
    whose output projection is a matrix of its own. Has ``from_pretrained``.
    """
    if not is_known(config):
        return AutoModelForSeq2SeqLM
    model_class = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
    return _with_separate_output(model_class) if getattr(config, "separate_output", False) else model_class


def new_backbone(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """A backbone with random weights, or on the meta device an empty one.

    Args:
        config: describes it.
        settings: what transformers' ``from_config`` takes (``dtype``, ``trust_remote_code``, ...).
    """
    model_class = backbone_class(config)
    if model_class is not AutoModelForSeq2SeqLM:
        settings.pop("trust_remote_code", None)  # it is transformers' own
    build = model_class.from_config if model_class is AutoModelForSeq2SeqLM else model_class._from_config
    model: PreTrainedModel = build(config, **settings)
    return model


def empty_backbone(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The backbone's modules without memory for its weights; takes a fifth of a second, whatever its size."""
    with torch.device("meta"):
        model = new_backbone(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


@lru_cache
def _with_separate_output(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A T5-like model whose ``lm_head`` is a matrix of its own, as T5 1.1, Flan-T5, mT5 and UMT5 were published."""

    def __init__(self: Any, config: PreTrainedConfig) -> None:
        model_class.__init__(self, config)
        # The library scales the decoder's states by this width before a shared matrix; a separate one takes them as
        # they are. UMT5 would scale them, because it goes by the tying that the library forces upon it.
        self.model_dim = 1

    def _init_weights(self: Any, module: Any) -> None:
        model_class._init_weights(self, module)
        if module is self:
            width = self.config.d_model
            # Fan-in, as T5X has it: logits begin near zero.
            initialization.normal_(self.lm_head.weight, mean=0.0, std=width**-0.5)

    ties = {name: source for name, source in (model_class._tied_weights_keys or {}).items() if "lm_head" not in name}
    members = {
        "__init__": __init__,
        "_init_weights": torch.no_grad()(_init_weights),
        "_tied_weights_keys": ties,
        # The library leaves out modules without weights of their own, attention among them, when it initialises a
        # model of foreign origin; this one's initialisation is the library's.
        "__module__": model_class.__module__,
    }
    return type(f"{model_class.__name__}WithSeparateOutput", (model_class,), members)


def encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of ``config`` that describes the encoder; most architectures have one configuration for both halves."""
    part = getattr(config, "encoder", None)
    return part if isinstance(part, PreTrainedConfig) else config


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of ``config`` that describes the decoder."""
    part = getattr(config, "decoder", None)
    return part if isinstance(part, PreTrainedConfig) else config


def encoder_width(config: PreTrainedConfig) -> int:
    """Width of what the encoder reads and gives."""
    return int(encoder_config(config).hidden_size)


def vocabulary_size(config: PreTrainedConfig) -> int:
    """Tokens that the decoder can write."""
    part = decoder_config(config)
    return int(getattr(part, "decoder_vocab_size", None) or part.vocab_size)


def position_limit(half: nn.Module) -> int | None:
    """How many positions an encoder or a decoder can tell apart, by the table that it looks them up in.

    Args:
        half: the encoder or the decoder, of weights or empty.

    Returns:
        None where positions are relative, or computed for any length (M2M100, NLLB).
    """
    sizes = []
    for name, module in half.named_modules():
        if name.rpartition(".")[2] in ("embed_positions", "position_embeddings", "wpe") and hasattr(
            module, "num_embeddings"
        ):
            # BART keeps two rows of its table for a padding scheme of old; RoBERTa counts from behind its padding row.
            padding = getattr(module, "padding_idx", None)
            unused = getattr(module, "offset", 0 if padding is None else padding + 1)
            sizes.append(module.num_embeddings - unused)
    return min(sizes, default=None)


def cast_position_tables(model: nn.Module, dtype: torch.dtype) -> None:
    """Let tables of positions that are no parameters (M2M100, NLLB) be of the type of what they are added to.

    DeepSpeed casts parameters and leaves buffers as they are; the sum would be float32 and the next layer refuse it.
    """
    for name, module in model.named_modules():
        if name.endswith("embed_positions"):
            for key, table in list(module.named_buffers(recurse=False)):
                setattr(module, key, table.to(dtype))


def takes_vectors(backbone: PreTrainedModel) -> bool:
    """Whether the encoder reads vectors in place of token ids."""
    return "inputs_embeds" in inspect.signature(backbone.get_encoder().forward).parameters


def embed_words(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    """Token ids [clips, tokens] as the encoder embeds them: [clips, tokens, width].

    BART, mBART, M2M100 and NLLB multiply by ``sqrt(width)`` inside their embedding module, so calling it is enough.
    Pegasus and Marian do so in the encoder and only when it is given ids; it is made up for here. Poses are scaled
    nowhere: the pose encoder ends in a layer norm of its own and learns the scale that suits the backbone.
    """
    scale = getattr(backbone.get_encoder(), "embed_scale", 1.0)
    vectors: Tensor = backbone.get_input_embeddings()(ids) * scale
    return vectors


def decoder_inputs(labels: Tensor, config: Any) -> Tensor:
    """What the decoder reads while it is taught to write ``labels``: the same, one later, behind the start token.

    All architectures share this. mBART's own rule takes the last token of each text to the front instead, which is the
    same for whole texts, and wrong for one that was cut; M2M100 has no rule that can be called.

    Args:
        labels: int64 [clips, tokens], -100 where padded. Where a language code begins every text, it is the first
            label, and the start token stands before it, as it does when a text is generated.
        config: has ``decoder_start_token_id`` and ``pad_token_id``.
    """
    shifted = torch.full_like(labels, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill_(shifted == IGNORED_LABEL, config.pad_token_id)
