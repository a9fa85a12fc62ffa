"""A hub that is slow, breaks off, is gated, empty or away: what is loaded is right, or one line says what to do.

In this process, where huggingface_hub's settings, which it reads from the environment when it is imported, are set
directly. ``test_cards.py`` and ``test_recipes.py`` go the whole way.
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

from tests.as_users_do.hub import PIECE, Hub
from toolkit.errors import UserError
from toolkit.models.backbone_config import backbone_config
from toolkit.models.build import _backbone
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
    return _backbone(known or config(source), model, placement_for("fp32", None), 0, None).state_dict()


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
    with pytest.raises(UserError) as refused:
        way(source)
    assert "\n" not in str(refused.value)
    return str(refused.value)


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
    told = refusal(WAYS[way], WHOLE)
    assert f"is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to ask the hub" in told
    assert hub.asked == []


@pytest.mark.parametrize("way", WAYS)
def test_a_hub_that_nobody_answers_for(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    reach(monkeypatch, "http://127.0.0.1:9")
    told = refusal(WAYS[way], WHOLE)
    assert "and the hub (http://127.0.0.1:9) cannot be reached ([Errno 111] Connection refused)" in told


@pytest.mark.parametrize("way", WAYS)
def test_a_gated_model(hub: Hub, way: str) -> None:
    hub.gated.add(WHOLE)
    told = refusal(WAYS[way], WHOLE)
    assert f"{WHOLE}' is gated" in told or f"{WHOLE} is gated" in told
    assert f"ask for access at {hub.address}/{WHOLE}, and log in with `hf auth login`, or set HF_TOKEN" in told


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_not_there(hub: Hub, way: str) -> None:
    assert f"is not on the hub ({hub.address}), or is private" in refusal(WAYS[way], "nobody/nothing")


@pytest.mark.parametrize("way", WAYS)
def test_a_hub_that_is_out_of_order(hub: Hub, way: str) -> None:
    hub.answers = 503
    assert f"the hub ({hub.address}) answers 503; try again later" in refusal(WAYS[way], WHOLE)


@pytest.mark.parametrize(
    ("source", "name"), [(WHOLE, "model.safetensors"), (SHARDS, "model-00002-of-00004.safetensors")]
)
def test_a_download_that_breaks_off_is_taken_up_where_it_was(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)  # what is lost at most; 10 MB by default
    known = config(source)
    hub.cut[name] = 0.5
    check_whole(hub, source, weights(source, known))
    assert hub.asked.count(f"GET /store/{source}/{name}") == 2
    size = sum(path.stat().st_size for path in (hub.root / source).glob("*.safetensors"))
    assert size <= hub.bytes_sent < size + PIECE


@pytest.mark.parametrize(
    ("source", "name"), [(WHOLE, "model.safetensors"), (SHARDS, "model-00002-of-00004.safetensors")]
)
def test_a_download_that_never_comes(hub: Hub, source: str, name: str) -> None:
    known = config(source)
    hub.cut[name] = 0
    told = refusal(lambda source: weights(source, known), source)
    assert f"{source} was not downloaded whole from the hub ({hub.address}: " in told
    hub.cut.clear()
    check_whole(hub, source, weights(source, known))


def test_a_slow_hub(hub: Hub) -> None:
    hub.pause = 0.02
    check_whole(hub, WHOLE, weights(WHOLE))


def test_nobody_is_asked_to_convert_what_is_no_safetensors(hub: Hub) -> None:
    weights("google/byt5-small")
    assert not [asked for asked in hub.asked if "discussions" in asked or "commits" in asked]
