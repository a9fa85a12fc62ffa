"""Small translators with their processors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, PreTrainedConfig, T5Config

from tests.small_configs import BART, T5, translator_config
from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.landmarks import load_landmark_set

BACKBONES: dict[str, PreTrainedConfig] = {"t5": T5Config(**T5), "bart": BartConfig(**BART)}


@pytest.fixture
def backbones() -> dict[str, PreTrainedConfig]:
    return BACKBONES


@pytest.fixture
def translator() -> Callable[..., PoseTranslator]:
    def make(
        backbone: str = "t5", *, ctc: bool = True, prefix: tuple[int, ...] = (), search: float = 0.0
    ) -> PoseTranslator:
        torch.manual_seed(0)
        config = translator_config(
            BACKBONES[backbone], ctc=ctc, ctc_search_weight=search, prefix_token_ids=list(prefix)
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
