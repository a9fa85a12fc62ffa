"""What the training benchmarks train on, made here: clips and sentences as long as iSign's, a full-size T5-Small."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from toolkit.corpus.packed import Clip, Corpus, Metadata
from toolkit.corpus.writer import finish_corpus, finish_split, shard_name, write_shard
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.model_cards import load_model_yaml

MAX_FRAMES = 300
CLIPS = 4096


def make_corpus(
    folder: Path,
    clips: int = CLIPS,
    texts: list[str] | None = None,
    held_out: int = 0,
    length: int | None = None,
    names: Sequence[str] = ("dev",),
) -> Corpus:
    """A corpus of noise: log-normal clip lengths (median 90 frames, at most 300) unless it gets one ``length``, and
    sentences of about seven words where it gets no texts. Of its last clips ``held_out`` each are the dev split, or the
    splits of these ``names``; the rest trains."""
    landmarks = load_landmark_set("hands_body_50")
    draw = np.random.default_rng(0)
    frames = draw.lognormal(np.log(90), 0.6, clips).clip(16, MAX_FRAMES).astype(int)
    if length:
        frames[:] = length
    texts = texts or sentences(clips)
    noise = draw.normal(size=(2 * MAX_FRAMES, landmarks.num_points, landmarks.num_channels)).astype(np.float16)
    starts = draw.integers(0, MAX_FRAMES, clips)
    rows = [
        Clip(f"clip-{index}", text, noise[start : start + length], f"video-{index}")
        for index, (text, start, length) in enumerate(zip(texts, starts, frames, strict=True))
    ]
    trained = clips - held_out * len(names)
    begins = {name: trained + held_out * number for number, name in enumerate(names)}
    splits = {}
    spans = {"train": slice(trained)} | {name: slice(start, start + held_out) for name, start in begins.items()}
    for name, span in spans.items():
        if rows[span]:
            (folder / name).mkdir(parents=True)
            write_shard(folder / name / shard_name(0, 1), rows[span], landmarks.width)
            finish_split(folder / name, landmarks.width)
            splits[name] = {"clips": len(rows[span]), "frames": int(frames[span].sum())}
    finish_corpus(folder, Metadata(landmarks.to_dict(), 12.5, NORMALISATION, splits=splits))
    return Corpus.open(folder)


def make_backbone(folder: Path, card_name: str, texts: list[str]) -> None:
    """A model folder: the card's full size with random weights, and a tokenizer trained on ``texts``."""
    card = load_model_yaml(card_name)
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(card.architecture, **card.config)).save_pretrained(folder)
    make_tokenizer("train", texts).save_pretrained(folder)


def sentences(count: int) -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(8000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [" ".join(draw.choices(words, weights, k=max(1, round(draw.gauss(7, 4))))) + "." for _ in range(count)]
