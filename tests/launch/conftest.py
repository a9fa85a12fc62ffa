"""What tests of several commands use: a tiny model on disk and real clips."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import T5Config

from toolkit.corpus.demo import DemoSizes, make_demo
from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator, PoseTranslatorConfig
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.landmarks import load_landmark_set

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture(scope="session")
def command():
    """Loads a launch script as a module: its ``main`` then runs in this process."""

    def load(name: str) -> ModuleType:
        specification = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
        assert specification and specification.loader
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """An untrained translator that reads 64 frames, which is five seconds, and writes eight letters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    landmark_set = load_landmark_set("hands_body_50")
    backbone = T5Config(
        vocab_size=384, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, decoder_start_token_id=0
    )
    encoder = {"kind": "conv", "hidden": 24, "layers": 2, "kernel": 5, "stride": 2, "dropout": 0.0, "positions": True}
    config = PoseTranslatorConfig(
        backbone=backbone.to_dict(), pose_encoder=encoder, num_points=50, num_channels=3, special_token_ids=[0, 1, 2]
    )
    model = PoseTranslator(config)
    tokenizer = make_tokenizer("bytes")
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    others = sorted(set(range(backbone.vocab_size)) - set(letters))
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
