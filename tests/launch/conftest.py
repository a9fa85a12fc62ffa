"""What tests of several commands use: a tiny model on disk and real clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config

from tests.scripts import load_script
from tests.small_configs import T5, translator_config
from toolkit.corpus.demo import DemoSizes, make_demo
from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.landmarks import load_landmark_set


@pytest.fixture(scope="session")
def command():
    """Loads a launch script as a module: its ``main`` then runs in this process."""

    return lambda name: load_script(f"launch/{name}.py")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """An untrained translator that reads 64 frames, which is five seconds, and writes eight letters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    landmark_set = load_landmark_set("hands_body_50")
    model = PoseTranslator(translator_config(T5Config(**T5)))
    tokenizer = make_tokenizer("bytes")
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    others = sorted(set(range(T5["vocab_size"])) - set(letters))
    model.generation_config.update(num_beams=2, max_new_tokens=8, suppress_tokens=others)
    model.save_pretrained(folder)
    extractor = PoseFeatureExtractor(landmark_set=landmark_set.to_dict(), max_frames=64)
    PoseProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_files(tmp_path_factory) -> list[Path]:
    """Six fingerspelled clips of different lengths."""
    folder = make_demo(tmp_path_factory.mktemp("clips") / "demo", DemoSizes(3, 1, 1, 1))
    return sorted((folder / "poses").glob("*.pose"))
