"""The recipe as a typed tree: every key, its unit, its default and its bounds.

The same names serve in YAML (``training: {epochs: 20}``) and on the command line (``training.epochs=20``). Nothing here
reads a file; ``load.py`` does, and makes a ``UserError`` of the ``ValueError(message, hint)`` that a validator raises.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator, model_validator

from toolkit.recipe.corpora import Source, SplitBy, TimeUnit, label_of, weights_of
from toolkit.recipe.prompts import own_words, placeholders

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Strength = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch and numpy take


def _count_or_auto(value: Any) -> int | Literal["auto"]:
    """A whole number of 1 or more, or the word ``auto``; a union would report both alternatives of a wrong value."""
    if value == "auto":
        return "auto"
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or (isinstance(value, float) and value != number):
        raise ValueError("not a valid value", "write auto, or a whole number of 1 or more")
    return number


CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]


def _compile(value: Any) -> Any:
    """``auto``, true, false or ``graphs``; a union would take 1 for true."""
    if value is True or value is False or value in ("auto", "graphs"):
        return value
    raise ValueError("not a valid value", "write auto, true, false or graphs")


Compile = Annotated[bool | Literal["auto", "graphs"], PlainValidator(_compile)]
ScoreName = Literal["bleu1", "bleu2", "bleu3", "bleu4", "chrf", "rouge_l", "wer", "cer", "gloss_wer"]


class Section(BaseModel):
    """What all sections share: an unknown key is an error, and a recipe never changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation if info.field_name else bool
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("true and false are not valid values", "write a value of the key's own kind")
        return value


class MixPart(Section):
    """One of several corpora that a run learns from. In a recipe a bare path means ``corpus``.

    What ``data`` says of preparation holds for all of them. ``problems_of_mix`` in ``corpora.py`` says what fits.
    """

    name: str | None = None  # in scores and files; None = that of its folder or table
    corpus: str | None = None  # folder of a prepared corpus
    table: str | None = None  # or a table, and
    poses: str | None = None  # the folder of its poses
    features: str | None = None  # besides these or instead of them: the folder of its features of another network
    columns: dict[str, str] = Field(default_factory=dict)  # of this table, besides data.columns
    # Share of the clips drawn, relative to the others; [start, end] changes linearly over the run. None = by size.
    weight: Annotated[float | list[float] | None, PlainValidator(weights_of)] = None
    splits: list[str] | None = None  # those to use; None = all
    prefix: str | None = None  # what {prompt} stands for in model.prefix; may name other conditions of a clip
    language: str | None = None  # of every clip, instead of the table's
    target_language: str | None = None  # the same

    @model_validator(mode="before")
    @classmethod
    def _path_means_a_corpus(cls, values: Any) -> Any:
        return {"corpus": values} if isinstance(values, str) else values

    @property
    def label(self) -> str:
        """Its name in scores and files."""
        return label_of(self.name, self.corpus or self.table)


class Data(Section):
    """Which clips and texts, and what preparation makes of them.

    ``corpus`` is a prepared corpus, whose own metadata then says landmarks and frame rate; otherwise ``table`` and
    ``poses`` are prepared into ``cache`` before training. ``source: demo`` needs neither.
    """

    source: Source = "table"
    corpus: str | None = None  # folder of a prepared corpus
    table: str | None = None  # CSV or TSV with a uid and a text column; {split} in its name: a table for each split
    poses: str | None = None  # folder that holds {uid}.pose
    features: str | None = None  # folder that holds {uid}.npy: what another network made of the video, besides poses
    features_fps: Positive | None = None  # frames per second of these; None = as the table or the files say
    corpora: list[MixPart] = Field(default_factory=list)  # several to learn from, instead of corpus, table and poses
    temperature: Positive = 1.0  # corpora without weights are drawn by size ** (1 / temperature)
    epoch_clips: Count | None = None  # clips of an epoch; None = as many as there are
    landmarks: str = "hands_body_50"  # landmark set: name or YAML file
    fps: Positive = 12.5  # frames per second after resampling
    max_frames: Count = 512  # frames after resampling
    min_frames: Count = 2  # frames after resampling; shorter clips are rejected
    too_long: Literal["subsample", "cut", "reject"] = "subsample"
    no_hands: Literal["keep", "reject"] = "keep"  # clips of which no frame shows a hand; counted either way
    shared_texts: Literal["keep", "remove", "remove_near"] = "keep"  # held-out clips whose text train has, too
    columns: dict[str, str] = Field(default_factory=dict)  # our column name -> the table's, e.g. {uid: SENTENCE_ID}
    time_unit: TimeUnit | None = None  # of start and end; None = as the source has them, else seconds
    split_by: SplitBy = "table"  # table = its splits, by video where it names none; whole videos; all clips of a signer
    dev_share: Share = 0.05  # share of the source videos, or signers
    test_share: Share = 0.05  # share of the source videos, or signers
    split_seed: Seed = 0
    max_rejects: Share = 0.01  # share of clips that may be unusable before preparation stops
    cache: str = "corpora"  # folder of prepared corpora
    workers: CountOrZero = 0  # preparation processes; 0 = all cores

    @model_validator(mode="after")
    def _shares_leave_training_data(self) -> Data:
        if self.dev_share + self.test_share >= 1.0:
            raise ValueError(
                f"dev_share {self.dev_share} + test_share {self.test_share} leave no training clips",
                "set data.dev_share and data.test_share to less than 1 together",
            )
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"min_frames {self.min_frames} is greater than max_frames {self.max_frames}",
                "lower data.min_frames or raise data.max_frames",
            )
        return self


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
    init_parts: list[Part] = list(PARTS)  # what of it is taken; the rest has published or random weights
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


class Training(Section):
    """Batches, optimizer, schedule and intervals. The DeepSpeed JSON owns precision and placement."""

    epochs: Positive = 20.0
    max_steps: Count | None = None  # optimizer steps; None = as many as the epochs hold
    global_batch_size: Count = 32  # clips per optimizer step over all ranks
    # Clips per forward pass of one rank, at most; a step has as few passes as that allows. auto = the fastest.
    micro_batch_size: CountOrAuto = "auto"
    micro_batch_frames: Count | None = None  # padded frames per forward pass of one rank, at most; None = no limit
    # To what batches are padded: their longest clip and text, or a ladder of few lengths. auto = ladder on GPUs.
    padding: Literal["auto", "longest", "ladder"] = "auto"
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: Positive = 3e-4
    pose_encoder_learning_rate: Positive | None = None  # None = learning_rate
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of the learning rate, per backbone layer above
    weight_decay: Strength = 0.01
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.98)
    eps: Positive = 1e-8
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    warmup_ratio: Share = 0.1  # share of all optimizer steps
    gradient_clipping: Strength = 1.0  # largest gradient norm; 0 = off
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    compile: Compile = "auto"  # layers in fewer, larger kernels, on GPUs (auto); graphs = passes as CUDA graphs
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    max_target_tokens: Count = 128  # longer texts are truncated, and learnt as if they ended there
    ctc_weight: Strength = 0.0  # weight of a CTC loss on the encoder; 0 = off
    ctc_target: Literal["text", "gloss"] = "text"  # what it reads: tokens of the text, or the column gloss
    freeze_backbone_steps: CountOrZero = 0  # first optimizer steps, in which only what has random weights learns
    # Decay of averaged weights, which are evaluated and kept.
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    early_stopping: Count | None = None  # evaluations in a row without a better evaluation.select_by; None = off
    seed: Seed = 42
    save_every: Count = 500  # optimizer steps
    keep_last: Count = 2  # checkpoints
    keep_best: Count = 1  # models, by evaluation.select_by: best/, and the runners-up in best_NNNNNN/ (by step)
    eval_every: Count = 1  # epochs
    log_every: Count = 10  # optimizer steps
    workers: CountOrZero = 2  # loader processes per rank; 0 = load in the training process
    rank_timeout: Positive = 60.0  # seconds; a step that takes longer, and ten usual ones, looks for the missing rank
    data_timeout: Positive = 900.0  # seconds for which a rank may wait for a batch, and the others for that rank
    time_limit: Positive | None = None  # minutes, after which the run saves and ends with exit code 75


class Augmentation(Section):
    """Strengths of the random changes made to training clips; 0 = off."""

    rotation: Strength = 0.0  # degrees
    scale: Strength = 0.0  # share of the signer's size
    shear: Strength = 0.0  # shear factor
    translation: Strength = 0.0  # shoulder widths
    noise: Strength = 0.0  # standard deviation, shoulder widths
    speed: Share = 0.0  # share of the clip's speed
    time_warp: Share = 0.0  # share of the clip's length
    frame_drop: Share = 0.0  # probability per frame
    landmark_drop: Share = 0.0  # probability per landmark
    hand_drop: Share = 0.0  # probability per hand and clip
    mirror: Share = 0.0  # probability per clip of swapping left and right
    temporal_crop: Share = 0.0  # largest share of the clip that is dropped at its ends
    feature_mask: Share = 0.0  # largest share of the clip, in one span, whose features (data.features) are masked


class Evaluation(Section):
    """How hypotheses are made and scored, and which score picks the best model."""

    num_beams: Count = 5
    length_penalty: float = 0.6  # above 0 favours longer, below 0 shorter hypotheses
    no_repeat_ngram_size: CountOrZero = 0  # n-grams that may not repeat; 0 = off
    ctc_weight: Share = 0.0  # share of the CTC head in a beam's score; needs training.ctc_weight > 0
    max_new_tokens: Count = 128
    forced_language: str | None = None  # token that every text begins with, as the tokenizer has it: hi_IN, deu_Latn
    select_by: ScoreName = "bleu4"
    select_corpus: str = "mean"  # whose score it is, of several corpora: mean, all (clips together), or one's name
    batch_frames: CountOrAuto = "auto"  # padded frames in one generation batch of one rank; auto = what fits
    graphs: bool = True  # on GPUs the decoder's steps are CUDA graphs; elsewhere they run as they are written
    tokenize: str = "13a"  # sacreBLEU tokenizer
    lowercase: bool = False
    samples: CountOrZero = 10  # outputs shown after each evaluation


class Tracking(Section):
    """Where figures go besides ``metrics.jsonl``, which is always written."""

    wandb: Literal["off", "online", "offline"] = "off"
    project: str = "sign-language-translation"
    tensorboard: bool = False
    timeout: Positive = 60.0  # seconds that a tracker may take to start and to finish; then the run continues without


class Run(Section):
    """Where the run lives."""

    dir: str | None = None  # None = runs/<recipe name>


class Recipe(Section):
    """One experiment: a model card, a DeepSpeed JSON, data and training."""

    name: str
    description: str = ""
    deepspeed: str = "zero2"  # name in ds_configs/ or path of a JSON
    ds: dict[str, Any] = Field(default_factory=dict)  # merged into the DeepSpeed JSON, key by key; null removes a key
    data: Data = Data()
    model: Model
    training: Training = Training()
    augmentation: Augmentation = Augmentation()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    run: Run = Run()
