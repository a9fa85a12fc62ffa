"""The recipe as a typed tree: every key, its unit, its default and its bounds.

The same names serve in YAML (``training: {epochs: 20}``) and on the command line (``training.epochs=20``). Nothing here
reads a file; ``load.py`` does, and makes a ``UserError`` of the ``ValueError(message, hint)`` that a validator raises.
The section ``model`` has a file of its own in ``sections/``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from toolkit.recipe.corpora import Source, SplitBy, TimeUnit, label_of, weights_of
from toolkit.recipe.sections.model import Model
from toolkit.recipe.sections.values import (
    Compile,
    Count,
    CountOrAuto,
    CountOrZero,
    Positive,
    Section,
    Seed,
    Share,
    Strength,
    SwitchOrAuto,
)

ScoreName = Literal["bleu1", "bleu2", "bleu3", "bleu4", "chrf", "rouge_l", "wer", "cer", "gloss_wer"]


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
    # Recompute activations: less memory, more time. auto = where only that fits, or is faster by larger micro-batches.
    gradient_checkpointing: SwitchOrAuto = False
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
