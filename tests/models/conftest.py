"""Small translators with their processors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, PreTrainedConfig, T5Config

from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator, PoseTranslatorConfig
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.landmarks import load_landmark_set

BACKBONES: dict[str, PreTrainedConfig] = {
    "t5": T5Config(vocab_size=384, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, decoder_start_token_id=0),
    "bart": BartConfig(
        vocab_size=384,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    ),
}


@pytest.fixture
def backbones() -> dict[str, PreTrainedConfig]:
    return BACKBONES


@pytest.fixture
def translator() -> Callable[..., PoseTranslator]:
    def make(
        backbone: str = "t5", *, ctc: bool = True, prefix: tuple[int, ...] = (), search: float = 0.0
    ) -> PoseTranslator:
        torch.manual_seed(0)
        landmark_set = load_landmark_set("hands_body_50")
        encoder = {
            "kind": "conv",
            "hidden": 24,
            "layers": 2,
            "kernel": 5,
            "stride": 2,
            "dropout": 0.0,
            "positions": True,
        }
        config = PoseTranslatorConfig(
            backbone=BACKBONES[backbone].to_dict(),
            pose_encoder=encoder,
            num_points=landmark_set.num_points,
            num_channels=landmark_set.num_channels,
            ctc=ctc,
            ctc_search_weight=search,
            special_token_ids=[0, 1, 2],
            prefix_token_ids=list(prefix),
        )
        return PoseTranslator(config).eval()

    return make


@pytest.fixture
def processor() -> PoseProcessor:
    landmark_set = load_landmark_set("hands_body_50")
    return PoseProcessor(PoseFeatureExtractor(landmark_set=landmark_set.to_dict()), make_tokenizer("bytes"))


@pytest.fixture(scope="session")
def pose_files() -> list[Path]:
    """Real recordings of three letters."""
    specification = importlib.util.find_spec("spoken_to_signed")
    assert specification is not None and specification.submodule_search_locations
    folder = Path(specification.submodule_search_locations[0]) / "assets" / "fingerspelling_lexicon" / "ase"
    return sorted(folder.glob("*.pose"))[:3]
