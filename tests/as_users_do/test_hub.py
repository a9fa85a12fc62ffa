"""A hub that is slow, gated, empty, unreachable or breaks the connection: the load is right, or an error gives a hint.

The tests set huggingface_hub's settings in this process, because it reads them from the environment only when it is
imported. ``test_cards.py`` and ``test_recipes.py`` run commands of users.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file

from tests.as_users_do.hub import BLOCK, Hub
from toolkit.errors import UserError
from toolkit.models.backbone_config import backbone_config
from toolkit.models.build import backbone_with_weights
from toolkit.models.loading.backbone_weights import placement_for
from toolkit.models.loading.load import load_translator
from toolkit.models.tokenizers import make_tokenizer
from toolkit.recipe.load import load_recipe

WHOLE, SHARDS = "google-t5/t5-small", "google-t5/t5-3b"


@pytest.fixture(autouse=True)
def first_contact(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub is this one, and the cache is empty."""
    reach(monkeypatch, hub.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # huggingface_hub's, before it tries again


def reach(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)


def config(source: str) -> Any:
    return backbone_config(load_recipe("t5_small", [f"model.backbone={source}"]).model)


def weights(source: str, known: Any = None) -> dict[str, torch.Tensor]:
    """The backbone's weights; ``known`` is its configuration where the hub no longer gives it."""
    model = load_recipe("t5_small", [f"model.backbone={source}"]).model
    described, tokenizer = known or config(source), make_tokenizer("bytes")
    return backbone_with_weights(described, model, tokenizer, placement_for("fp32", None), 0, None).state_dict()


WAYS: dict[str, Callable[[str], Any]] = {"config": config, "tokenizer": make_tokenizer, "translator": load_translator}


def published(hub: Hub, source: str) -> dict[str, torch.Tensor]:
    files = sorted((hub.root / source).glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def check_whole(hub: Hub, source: str, loaded: dict[str, torch.Tensor]) -> None:
    expected = published(hub, source)
    assert expected
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def refusal(way: Callable[[str], Any], source: str) -> str:
    """The error and the hint."""
    with pytest.raises(UserError) as refused:
        way(source)
    return refused.value.lines


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("source", [WHOLE, SHARDS])
def test_a_full_cache_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, source: str, offline: bool) -> None:
    check_whole(hub, source, weights(source))
    words = make_tokenizer(source)("good day")["input_ids"]
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        reach(monkeypatch, "http://127.0.0.1:9")
    hub.asked.clear()
    check_whole(hub, source, weights(source))
    assert make_tokenizer(source)("good day")["input_ids"] == words
    assert hub.asked == []


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_cache_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lines = refusal(WAYS[way], WHOLE)
    assert WHOLE in lines and constants.HF_HUB_CACHE in lines and "HF_HUB_OFFLINE" in lines
    assert hub.asked == []


@pytest.mark.parametrize("way", WAYS)
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    reach(monkeypatch, "http://127.0.0.1:9")
    lines = refusal(WAYS[way], WHOLE)
    assert "http://127.0.0.1:9" in lines and "[Errno 111] Connection refused" in lines


@pytest.mark.parametrize("way", WAYS)
def test_a_gated_model(hub: Hub, way: str) -> None:
    hub.gated.add(WHOLE)
    lines = refusal(WAYS[way], WHOLE)
    assert "is gated" in lines
    assert f"{hub.address}/{WHOLE}" in lines and "hf auth login" in lines and "HF_TOKEN" in lines


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_does_not_exist(hub: Hub, way: str) -> None:
    lines = refusal(WAYS[way], "nobody/nothing")
    assert "nobody/nothing" in lines and hub.address in lines


@pytest.mark.parametrize("way", WAYS)
def test_a_hub_with_an_error_of_its_own(hub: Hub, way: str) -> None:
    hub.answers = 503
    lines = refusal(WAYS[way], WHOLE)
    assert hub.address in lines and "503" in lines


@pytest.mark.parametrize(
    ("source", "name"), [(WHOLE, "model.safetensors"), (SHARDS, "model-00002-of-00004.safetensors")]
)
def test_an_interrupted_download_resumes(hub: Hub, monkeypatch: pytest.MonkeyPatch, source: str, name: str) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", BLOCK)  # the most that is lost; 10 MB by default
    known = config(source)
    hub.truncated[name] = 0.5
    check_whole(hub, source, weights(source, known))
    assert hub.asked.count(f"GET /store/{source}/{name}") == 2
    size = sum(path.stat().st_size for path in (hub.root / source).glob("*.safetensors"))
    assert size <= hub.bytes_sent < size + BLOCK


@pytest.mark.parametrize(
    ("source", "name"), [(WHOLE, "model.safetensors"), (SHARDS, "model-00002-of-00004.safetensors")]
)
def test_a_download_that_always_breaks(hub: Hub, source: str, name: str) -> None:
    known = config(source)
    hub.truncated[name] = 0
    lines = refusal(lambda source: weights(source, known), source)
    assert source in lines and hub.address in lines
    hub.truncated.clear()
    check_whole(hub, source, weights(source, known))


def test_a_slow_hub(hub: Hub) -> None:
    hub.pause = 0.02
    check_whole(hub, WHOLE, weights(WHOLE))


def test_the_hub_is_not_asked_to_convert_weights_to_safetensors(hub: Hub) -> None:
    weights("google/byt5-small")
    assert not [asked for asked in hub.asked if "discussions" in asked or "commits" in asked]
