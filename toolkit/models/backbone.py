"""What differs between backbones: class, width, positions, how a text begins, how tokens are scored.

A backbone is an encoder-decoder, whose encoder reads a clip's vectors, or a language model, whose decoder reads them as
the prefix of its text. Must not know of poses.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from toolkit.batching.collate import IGNORED_LABEL
from toolkit.models.architectures.separate_output import SEPARATE_OUTPUT
from toolkit.models.architectures.t5gemma2 import T5Gemma2WithoutVision
from toolkit.models.language_models.prefixes import (
    generation_inputs,
    is_language_model,
    score_after_prefixes,
    softcapped,
)

# Decoders whose scores are the output matrix times their states, plus `final_logits_bias` where there is one, below
# `final_logit_softcapping` where there is one; those of T5's kind first multiply the states by `model_dim ** -0.5`, if
# this key of the configuration is true.
SCALED_OUTPUT = {"t5": "scale_decoder_outputs", "longt5": "scale_decoder_outputs", "umt5": "tie_word_embeddings"}
PLAIN_OUTPUT = frozenset(
    {"mt5", "bart", "mbart", "m2m_100", "pegasus", "marian", "led", "gpt2", "t5_gemma_module", "t5gemma2_decoder"}
)
# Encoder-decoders made of language models: their tokenizers end no text, and the decoder's first token begins each.
OF_LANGUAGE_MODELS = frozenset({"t5gemma", "t5gemma2"})
# Architectures that take a mask of four dimensions as it is. From one of two, transformers makes the other in each
# half, after it has looked whether anything is masked: the host would wait for a GPU twice a forward pass.
TAKES_WHOLE_MASK = frozenset({"t5", "mt5", "umt5", "bart", "mbart", "m2m_100", "pegasus", "marian", "bert", "gpt2"})
# The same where layers with a window have a mask of their own, which is alike while clips are short.
TAKES_MASK_OF_KIND = frozenset({"t5_gemma_module", "t5gemma2_encoder"})
# Decoders that look at their own mask, too, or at their tokens where they get none.
WANTS_OWN_MASK = frozenset({"bart", "mbart", "m2m_100", "pegasus", "marian", "gpt2"})


def note_published(config: PreTrainedConfig, published: dict[str, Any]) -> None:
    """Write into ``config`` what transformers 5 does not keep of published values.

    Whether the output projection is a matrix of its own: ``separate_output=True``, which outlives saving. The token
    that begins texts, where only the decoder's part names it.

    ``published`` are the values of ``config.json`` or of a model card before transformers read them.
    """
    # T5 saved again by transformers 5 says `true` but remembers that it is not scaled, which only untied ones are.
    unscaled = config.model_type == "t5" and published.get("scale_decoder_outputs") is False
    untied = published.get("tie_word_embeddings") is False or unscaled
    if config.model_type in SEPARATE_OUTPUT and untied:
        config.separate_output = True
    if config.model_type in OF_LANGUAGE_MODELS and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = decoder_config(config).bos_token_id


def is_known(config: PreTrainedConfig) -> bool:
    """Whether ``config`` is of an architecture of transformers' own: encoder-decoders, and language models."""
    return type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING or is_language_model(config)


def is_seq2seq(config: PreTrainedConfig) -> bool:
    """Whether there is an encoder-decoder that reads and writes text for ``config``, here or in code from the hub."""
    own = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return own or "AutoModelForSeq2SeqLM" in (getattr(config, "auto_map", None) or {})


def backbone_class(config: PreTrainedConfig) -> Any:
    """The class of the backbone: transformers' own, ``AutoModelForSeq2SeqLM`` for code from the hub, or one of
    ``architectures``. Has ``from_pretrained``.
    """
    if not is_known(config):
        return AutoModelForSeq2SeqLM
    if is_language_model(config):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(config, "separate_output", False):
        return SEPARATE_OUTPUT[config.model_type]
    if config.model_type == "t5gemma2":
        return T5Gemma2WithoutVision
    return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]


def new_backbone(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """A backbone with random weights, or on the meta device an empty one; settings as of ``from_config``."""
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


def halves(backbone: PreTrainedModel) -> tuple[PreTrainedModel | None, PreTrainedModel]:
    """Encoder and decoder; a language model has no encoder."""
    return None if is_language_model(backbone.config) else backbone.get_encoder(), backbone.get_decoder()


def stacks(backbone: PreTrainedModel) -> list[PreTrainedModel]:
    """The halves that there are, the encoder first."""
    return [half for half in halves(backbone) if half is not None]


def reader(backbone: PreTrainedModel) -> PreTrainedModel:
    """The half that reads clips: the encoder, or a language model's decoder."""
    return stacks(backbone)[0]


def set_checkpointing(backbone: Any, on: bool, **settings: Any) -> None:
    """Have a backbone recompute its layers' activations in backward passes, or keep them again.

    Args:
        backbone: a model of transformers, or one with adapters around it.
        on: whether it recomputes them.
        settings: of ``torch.utils.checkpoint.checkpoint``.
    """
    # transformers 5.23 has renamed both, and warns of the names that it had before.
    kind = "activation" if hasattr(backbone, "activation_checkpointing_enable") else "gradient"
    if on:
        # Reentrant checkpointing loses the gradients of an encoder whose inputs need none.
        getattr(backbone, f"{kind}_checkpointing_enable")({"use_reentrant": False, **settings})
    else:
        getattr(backbone, f"{kind}_checkpointing_disable")()


def recomputes(backbone: Any) -> bool:
    """Whether a backbone recomputes its layers' activations in backward passes."""
    kind = "activation" if hasattr(backbone, "is_activation_checkpointing") else "gradient"
    return bool(getattr(backbone, f"is_{kind}_checkpointing"))


def encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of ``config`` that describes the encoder; most architectures have one configuration for both halves."""
    part = getattr(config, "encoder", None)
    # T5Gemma 2's has a part for pictures, too.
    return part.get_text_config() if isinstance(part, PreTrainedConfig) else config


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of ``config`` that describes the decoder."""
    part = getattr(config, "decoder", None)
    return part if isinstance(part, PreTrainedConfig) else config


def encoder_width(config: PreTrainedConfig) -> int:
    """Width of what the backbone reads of a clip: of its encoder, or of a language model."""
    return int(encoder_config(config).hidden_size)


def vocabulary_size(config: PreTrainedConfig) -> int:
    """Tokens that the decoder can write."""
    part = decoder_config(config)
    return int(getattr(part, "decoder_vocab_size", None) or part.vocab_size)


def position_limit(half: nn.Module) -> int | None:
    """How many positions an encoder or a decoder has, by its table of positions.

    None where they are relative, or computed for any length (M2M100, NLLB).
    """
    sizes = []
    for name, module in half.named_modules():
        if name.rpartition(".")[2] in ("embed_positions", "position_embeddings", "wpe") and hasattr(
            module, "num_embeddings"
        ):
            # BART leaves the first two rows of its table unused; RoBERTa counts from after its padding row.
            padding = getattr(module, "padding_idx", None)
            unused = getattr(module, "offset", 0 if padding is None else padding + 1)
            sizes.append(module.num_embeddings - unused)
    return min(sizes, default=None)


def context_limit(backbone: PreTrainedModel) -> int:
    """How many positions a language model was made for; it computes them for any length."""
    return int(backbone.config.max_position_embeddings)


def cast_position_tables(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast tables of positions that are no parameters (M2M100, NLLB) to the type of what they are added to.

    DeepSpeed casts parameters and not buffers; the sum would be float32, which the next layer refuses.
    """
    for name, module in model.named_modules():
        if name.endswith("embed_positions"):
            for key, table in list(module.named_buffers(recurse=False)):
                setattr(module, key, table.to(dtype))


def layer_list(stack: nn.Module) -> nn.ModuleList:
    """The layers of an encoder or decoder, from the bottom; empty where it has none.

    Every family has them in one ``ModuleList``: ``block`` in T5, ``layers`` in BART and M2M, ``encoder.layer`` in BERT,
    ``transformer.h`` in GPT-2. It is the first one that a walk from the stack's top meets.
    """
    lists = (module for module in stack.modules() if isinstance(module, nn.ModuleList) and len(module))
    return next(lists, nn.ModuleList())


def stack_layers(stack: nn.Module) -> list[nn.Module]:
    """The same as a list, which outlives changes of the stack."""
    return list(layer_list(stack))


def takes_vectors(backbone: PreTrainedModel) -> bool:
    """Whether the backbone reads vectors in place of token ids."""
    return "inputs_embeds" in inspect.signature(reader(backbone).forward).parameters


def embed_words(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    """Token ids [clips, tokens] as the backbone embeds them: [clips, tokens, width].

    BART, mBART, M2M100, NLLB and Gemma multiply by ``sqrt(width)`` inside their embedding module: calling it is enough.
    Pegasus and Marian do so in the encoder and only when it is given ids, so it is done here. Poses are not scaled:
    the pose encoder ends in a layer norm and learns the scale that suits the backbone.
    """
    scale = getattr(reader(backbone), "embed_scale", 1.0)
    vectors: Tensor = backbone.get_input_embeddings()(ids) * scale
    return vectors


def scaled_for(backbone: PreTrainedModel, vectors: Tensor) -> Tensor:
    """Vectors of poses [clips, positions, width] by which its first layer reads ``vectors``.

    T5Gemma multiplies all that it is given by ``sqrt(width)``, which is meant for words.
    """
    return vectors / backbone.config.encoder.hidden_size**0.5 if backbone.config.model_type == "t5gemma" else vectors


def encode_vectors(backbone: PreTrainedModel, vectors: Tensor, mask: Tensor) -> Tensor:
    """What the decoder reads of clips, given their vectors [clips, positions, width] and bool mask [clips, positions].

    An encoder's output; a language model reads the vectors themselves, before the text.
    """
    encoder, _ = halves(backbone)
    if encoder is None:
        return vectors
    hidden: Tensor = encoder(inputs_embeds=vectors, attention_mask=attention_mask(encoder, mask)).last_hidden_state
    return hidden


def search_inputs(backbone: PreTrainedModel, hidden: Tensor, mask: Tensor, start: int) -> dict[str, Any]:
    """What the backbone's ``generate`` is called with.

    Args:
        hidden, mask: as :func:`encode_vectors` gives and takes them.
        start: token that every text begins with.
    """
    if is_language_model(backbone.config):
        return dict(generation_inputs(backbone, hidden, mask, start))
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask.long()}


def beams_share_encoding(config: PreTrainedConfig) -> bool:
    """Whether one row of an encoding's keys and values can serve all beams of a clip.

    Attention that transformers looks up by its name can; T5Gemma does so, though its capped scores have no kernel.
    """
    return config._attn_implementation == "sdpa" or config.model_type == "t5gemma"


def attention_is_merged(config: PreTrainedConfig) -> bool:
    """Whether one attention of the decoder reads the text and the encoding behind it."""
    return config.model_type == "t5gemma2"


def attention_mask(half: PreTrainedModel, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask that an encoder, or a decoder that reads its output, takes: one, or one for each kind of its layers.

    Args:
        half: of the backbone.
        mask: bool [clips, positions], true where there is something.
    """
    if _takes(half, TAKES_WHOLE_MASK):
        return mask[:, None, None, :]
    config = half.config.get_text_config()
    # Layers with a window see half of it in each direction.
    if half.config.model_type in TAKES_MASK_OF_KIND and mask.shape[1] <= config.sliding_window // 2:
        whole = mask[:, None, None, :]
        if config._attn_implementation == "eager":
            whole = torch.where(whole, 0.0, torch.finfo(half.dtype).min).to(half.dtype)
        return dict.fromkeys(("full_attention", "sliding_attention"), whole)
    return mask.long()


def _takes(half: PreTrainedModel, architectures: frozenset[str]) -> bool:
    return half.config.model_type in architectures and half.config._attn_implementation == "sdpa"


def decoder_inputs(labels: Tensor, config: Any) -> Tensor:
    """What the decoder reads when it is trained to write ``labels``: the start token, then the labels but the last.

    All architectures share this. mBART's own rule takes the last token of each text to the front instead, which is the
    same for whole texts and wrong for truncated ones; M2M100 has no rule that can be called.

    Args:
        labels: int64 [clips, tokens], -100 where padded. A language code that begins every text is the first
            label, and the start token stands before it, as it does in generation.
        config: has ``decoder_start_token_id`` and ``pad_token_id``.
    """
    shifted = torch.full_like(labels, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill_(shifted == IGNORED_LABEL, config.pad_token_id)


def score_tokens(
    backbone: PreTrainedModel, hidden: Tensor, mask: Tensor, ids: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Scores of the next tokens.

    Args:
        backbone: has weights.
        hidden: as :func:`encode_vectors` gives it [clips, positions, width].
        mask: bool [clips, positions].
        ids: what its decoder reads [clips, tokens].
        rows: int64 [rows], places in the flattened ``ids`` to score alone. Scores of a whole vocabulary are the largest
            tensors of a step; architectures that are not in the tables above compute all of them and drop the others.

    Returns:
        [clips, tokens, vocabulary], or [rows, vocabulary].
    """
    if is_language_model(backbone.config):
        return score_after_prefixes(backbone, hidden, mask, ids, rows)
    kind = decoder_config(backbone.config).model_type
    if rows is None or kind not in SCALED_OUTPUT.keys() | PLAIN_OUTPUT:
        mask = mask.long()
        encoded = BaseModelOutput(last_hidden_state=hidden)
        logits = backbone(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits
        return logits if rows is None else logits.flatten(0, 1).index_select(0, rows)
    if (projection := getattr(backbone, "enc_to_dec_proj", None)) is not None:  # halves of different widths
        hidden = projection(hidden)
    decoder = backbone.get_decoder().base_model  # without a head of its own, as GPT-2 has
    seen = attention_mask(decoder, mask)
    earlier = None
    if kind == "t5gemma2_decoder":
        earlier = torch.ones_like(ids)  # otherwise it looks whether several texts stand in a row
    elif _takes(decoder, WANTS_OWN_MASK):
        earlier = torch.ones(1, 1, *ids.shape[1:] * 2, dtype=torch.bool, device=ids.device).tril()
    states = decoder(
        input_ids=ids,
        attention_mask=earlier,
        encoder_hidden_states=hidden,
        encoder_attention_mask=seen,
        use_cache=False,
    )[0]
    if kind in SCALED_OUTPUT and getattr(backbone.config, SCALED_OUTPUT[kind]):
        states = states * backbone.model_dim**-0.5
    logits = backbone.get_output_embeddings()(states.flatten(0, 1).index_select(0, rows))
    bias = getattr(backbone, "final_logits_bias", None)
    return softcapped(
        logits if bias is None else logits + bias, getattr(decoder.config, "final_logit_softcapping", None)
    )
