"""Small untrained translators and a small corpus of invented clips."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from transformers import BartConfig, PreTrainedConfig, T5Config

from tests.written_corpora import write_corpus
from toolkit.cluster.ops import use_extensions_dir
from toolkit.cluster.process_group import join_process_group, leave_process_group
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Clip, Corpus
from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator, PoseTranslatorConfig
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set

LANDMARKS = load_landmark_set("hands_body_50")
FPS = 12.5
WORDS = ["we", "all", "go", "home", "it", "rains", "in", "the", "north", "snow", "falls", "over", "high", "hills"]


def backbone(kind: str, vocabulary: int) -> PreTrainedConfig:
    if kind == "t5":
        return T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, decoder_start_token_id=0
        )
    return BartConfig(
        vocab_size=vocabulary,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        forced_eos_token_id=None,
        decoder_start_token_id=0,
    )


def _add(bias: torch.Tensor, module: object, inputs: object, logits: torch.Tensor) -> torch.Tensor:
    return logits + bias


@pytest.fixture
def translator() -> Callable[..., PoseTranslator]:
    """A few tokens only, so that random weights reach the end of a text; sharp, so that beams hardly tie."""

    def make(kind: str = "t5", *, vocabulary: int = 24, ctc: float = 0.0, attention: str = "sdpa") -> PoseTranslator:
        torch.manual_seed(3)
        config = PoseTranslatorConfig(
            backbone=backbone(kind, vocabulary).to_dict(),
            pose_encoder={
                "kind": "conv",
                "hidden": 24,
                "layers": 2,
                "kernel": 5,
                "stride": 2,
                "dropout": 0.0,
                "positions": True,
            },
            num_points=LANDMARKS.num_points,
            num_channels=LANDMARKS.num_channels,
            ctc=ctc > 0,
            ctc_search_weight=ctc,
            special_token_ids=[0, 1, 2],
        )
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


@pytest.fixture(scope="session")
def in_two_processes() -> Callable[..., None]:
    """Runs a module-level function as rank 0 and 1 of a real process group."""

    def run(function: Callable[..., None], *arguments: object) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        torch.multiprocessing.spawn(_as_rank, args=(function, port, *arguments), nprocs=2)

    return run


def _as_rank(rank: int, function: Callable[..., None], port: int, *arguments: object) -> None:
    torch.set_num_threads(1)
    use_extensions_dir()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_process_group(Ranks(rank, rank, 2, 2))
    function(rank, *arguments)
    leave_process_group()
