"""The section ``model`` of a recipe: the backbone, its tokenizer and adapters, and the encoders in front of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolkit.recipe.prompts import own_words, placeholders
from toolkit.recipe.sections.values import Count, Positive, Section, Share

# What `null`, or leaving a key out, means to each kind of pose encoder.
POSE_ENCODER_DEFAULTS: dict[str, dict[str, int]] = {
    "linear": {"hidden": 1024},
    "conv": {"hidden": 512, "layers": 2, "kernel": 5, "stride": 2},
    "conformer": {"hidden": 256, "layers": 4, "kernel": 15, "stride": 2, "heads": 4},
    "stgcn": {"hidden": 256, "layers": 3, "kernel": 5, "stride": 2},
}


class PoseEncoder(Section):
    """The network between landmarks and the backbone. In a recipe a bare word means ``kind`` (see ``load.py``).

    A kind reads the keys that it has a use for; ``null`` stands for its own default.
    """

    kind: Literal["linear", "conv", "conformer", "stgcn"] = "conv"
    hidden: Count = 512  # width inside the encoder; of stgcn: of each part of the body
    layers: Count = 2  # convolutions (conv), Conformer blocks, graph blocks (stgcn)
    kernel: Count = 5  # frames that one convolution sees, odd (all but linear)
    stride: Count = 2  # total reduction in time: frames per encoder position, a power of two (all but linear)
    heads: Count = 4  # of the attention (conformer only)
    projection: Literal["mlp", "single"] = "mlp"  # two layers with norms, or one matrix (linear only)
    dropout: Share = 0.1
    positions: bool = True  # add sinusoidal positions; T5-family cross-attention has none of its own

    @property
    def frames_per_position(self) -> int:
        """Frames that become one encoder position."""
        return 1 if self.kind == "linear" else self.stride

    @model_validator(mode="before")
    @classmethod
    def _null_means_the_kinds_own(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        return {**POSE_ENCODER_DEFAULTS.get(str(given.get("kind", "conv")), {}), **given}

    @model_validator(mode="after")
    def _sizes_fit(self) -> PoseEncoder:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even", "set model.pose_encoder.kernel to an odd number")
        if self.stride & (self.stride - 1):
            raise ValueError(
                f"stride {self.stride} is not a power of two", "set model.pose_encoder.stride to 1, 2, 4 or 8"
            )
        if self.kind == "conformer" and self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden {self.hidden} is not a multiple of twice the {self.heads} heads",
                f"set model.pose_encoder.hidden to a multiple of {2 * self.heads}",
            )
        if self.kind == "stgcn" and self.hidden % 4:
            raise ValueError(
                f"hidden {self.hidden} is not a multiple of 4", "set model.pose_encoder.hidden to a multiple of 4"
            )
        return self


class FeatureEncoder(Section):
    """The network between ``data.features`` and the backbone; its stride is that of the pose encoder."""

    kind: Literal["linear", "conv"] = "conv"  # linear: each frame by itself, then means of frames
    hidden: Count = 512  # width inside the encoder
    layers: Count = 2  # convolutions (conv)
    kernel: Count = 5  # frames that one convolution sees, odd (conv)
    dropout: Share = 0.1

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> FeatureEncoder:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even", "set model.feature_encoder.kernel to an odd number")
        return self


class Lora(Section):
    """Low-rank adapters in the backbone's linear layers (Hu et al. 2022, "LoRA"); the pose encoder trains in full."""

    r: Count = 16  # rank: the adapter of an [out, in] layer has r × (out + in) parameters
    alpha: Positive = 32.0  # the adapter's output is scaled by alpha / r (rslora: alpha / sqrt(r))
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1  # before the adapter
    targets: list[str] | None = None  # last parts of module names; None = attention's queries and values
    dora: bool = False  # learn magnitude and direction apart (Liu et al. 2024, "DoRA")
    rslora: bool = False  # keep large ranks stable (Kalajdzievski 2023, "rsLoRA")
    train: list[Literal["layer_norms", "embeddings"]] = Field(default_factory=list)  # in full, besides the adapters


class Quantization(Section):
    """A frozen backbone in few bits, by bitsandbytes. In a recipe a bare word means ``kind`` (see ``load.py``)."""

    kind: Literal["int8", "nf4"]
    double_quantization: bool = True  # nf4: pack its scaling factors, too: 0.4 bits a weight less
    compute_dtype: Literal["fp32", "bf16", "fp16"] = "bf16"  # nf4: in which its layers multiply
    storage_dtype: Literal["fp32", "bf16", "fp16"] | None = None  # nf4: must be the run's precision (None)


Part = Literal["pose_encoder", "encoder", "decoder", "embeddings", "ctc_head"]
BACKBONE_PARTS: tuple[Part, ...] = ("encoder", "decoder", "embeddings")
PARTS: tuple[Part, ...] = ("pose_encoder", *BACKBONE_PARTS, "ctc_head")


class Model(Section):
    """The backbone, its tokenizer and the pose encoder in front of it."""

    backbone: str  # a model card in recipes/models/, a hub id, or a folder in HuggingFace form
    from_scratch: bool = False  # random weights, dimensions of the model card: needs no hub
    tiny: bool = False  # the same architecture, shrunk to two narrow layers; implies random weights
    tokenizer: str | None = None  # None = the backbone's own; "bytes"; "train"; hub id or folder
    vocabulary: Literal["full", "corpus"] = "full"  # the tokenizer's, or what the training texts need of it
    vocabulary_text: str | None = None  # text file whose most frequent tokens stay, too; needs vocabulary: corpus
    vocabulary_margin: Count = 5000  # so many of them
    prefix: str | None = None  # words before the poses; {language}, {target_language}, {prompt}, {context} are a clip's
    prompt: str | None = None  # of a language model, instead: a chat's message, in which {poses} stands for the clip
    max_prefix_tokens: Count = 64  # longer prefixes of single clips are truncated
    condition_dropout: Share = 0.0  # probability, per training clip and condition, that its prefix leaves it out
    trust_remote_code: bool = False
    dropout: Share | None = None  # None = the backbone's own
    lora: Lora | None = None  # None = the backbone trains in full
    freeze: list[Literal["encoder", "decoder", "embeddings"]] = Field(default_factory=list)  # of the backbone
    extra_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)  # special tokens to add
    quantization: Quantization | None = None  # None = weights in the run's precision
    init_from: str | None = None  # a trained translator to start from: run directory, model folder or hub id
    init_parts: list[Part] = Field(
        default_factory=lambda: list(PARTS)
    )  # what of it is taken; the rest has published or random weights
    pose_encoder: PoseEncoder = PoseEncoder()
    feature_encoder: FeatureEncoder = FeatureEncoder()  # of data.features, where there are any
    fusion: Literal["sum", "concat"] = "sum"  # of features and poses: added, or the ones behind the others

    @model_validator(mode="after")
    def _prefix_names_conditions(self) -> Model:
        if not placeholders(own_words(self.prefix, self.prompt)) and self.condition_dropout:
            raise ValueError(
                f"condition_dropout={self.condition_dropout}, but the prefix names no condition",
                "set model.condition_dropout=0, or name one: model.prefix='translate {language}:'",
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_frozen_and_trained(self) -> Model:
        if self.lora and self.freeze:
            raise ValueError(
                f"lora freezes the backbone, and freeze={self.freeze} is given, too", "set model.freeze=[]"
            )
        if len(set(self.extra_tokens)) < len(self.extra_tokens):
            raise ValueError(f"extra_tokens={self.extra_tokens} names a token twice", "name each token once")
        if not self.init_parts or len(set(self.init_parts)) < len(self.init_parts):
            raise ValueError(
                f"init_parts={self.init_parts} names {'a part twice' if self.init_parts else 'no part'}",
                f"set model.init_parts to some of {', '.join(PARTS)}, each once",
            )
        return self
