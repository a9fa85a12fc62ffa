"""Small untrained translators and a small corpus of invented clips."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BartConfig, PreTrainedConfig, T5Config

from tests.small_configs import BART, T5, translator_config
from tests.written_corpora import write_corpus
from toolkit.corpus.packed import Clip, Corpus
from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set

LANDMARKS = load_landmark_set("hands_body_50")
FPS = 12.5
WORDS = ["we", "all", "go", "home", "it", "rains", "in", "the", "north", "snow", "falls", "over", "high", "hills"]


# Tokens as the byte tokenizer numbers them.
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 0}
BACKBONES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "t5": (T5Config, T5),
    "bart": (BartConfig, BART | TOKENS | {"decoder_layers": 2, "forced_eos_token_id": None}),
}


def _add(bias: torch.Tensor, module: object, inputs: object, logits: torch.Tensor) -> torch.Tensor:
    return logits + bias


@pytest.fixture
def translator() -> Callable[..., PoseTranslator]:
    """A few tokens only, so that random weights reach the end of a text; sharp, so that beams hardly tie."""

    def make(kind: str = "t5", *, vocabulary: int = 24, ctc: float = 0.0, attention: str = "sdpa") -> PoseTranslator:
        torch.manual_seed(3)
        architecture, sizes = BACKBONES[kind]
        backbone = architecture(**sizes | {"vocab_size": vocabulary})
        config = translator_config(backbone, ctc=ctc > 0, ctc_search_weight=ctc)
        model = PoseTranslator(config).eval()
        scale, ends = {"t5": (1.6, 4.0), "bart": (7.0, 8.0)}[kind]
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                parameter.mul_(scale)
        bias = torch.zeros(vocabulary)
        bias[config.eos_token_id] = ends
        model.backbone.lm_head.register_forward_hook(partial(_add, bias))
        model.backbone.set_attn_implementation(attention)
        for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
            setattr(model.generation_config, key, getattr(config, key))
        model.generation_config.update(num_beams=4, max_new_tokens=14, length_penalty=0.6)
        return model

    return make


@pytest.fixture(scope="session")
def processor() -> PoseProcessor:
    extractor = PoseFeatureExtractor(landmark_set=LANDMARKS.to_dict(), fps=FPS)
    return PoseProcessor(extractor, make_tokenizer("bytes"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rng = np.random.default_rng(0)

    def clip(name: str, index: int) -> Clip:
        frames = int(rng.integers(4, 60))
        features = rng.normal(size=(frames, LANDMARKS.num_points, LANDMARKS.num_channels)).astype(np.float16)
        features[rng.random((frames, LANDMARKS.num_points)) < 0.2] = np.nan
        return Clip(uid=f"{name}{index:02d}", text=" ".join(rng.choice(WORDS, size=6)), features=features)

    splits = {name: [clip(name, index) for index in range(count)] for name, count in (("train", 12), ("test", 37))}
    return write_corpus(tmp_path_factory.mktemp("corpus") / "invented", splits, LANDMARKS, FPS, NORMALISATION)
