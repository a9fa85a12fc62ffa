"""Nothing that an environment variable keeps secret is written down."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from toolkit.checkpointing.run_directory import write_status
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.secrets import redact


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef-wandb")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    monkeypatch.setenv("SHORT_KEY", "1")


def test_secrets_give_way_to_the_names_of_their_variables() -> None:
    text = redact("401 for https://user:hf_secret_of_the_user@hub, key 0123456789abcdef-wandb, 1 try")
    assert text == "401 for https://user:<HF_TOKEN>@hub, key <WANDB_API_KEY>, 1 try"


def test_a_secret_that_is_part_of_another_does_not_uncover_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_TOKEN", "hf_secret_of_the_user_and_more")
    assert redact("hf_secret_of_the_user_and_more") == "<OTHER_TOKEN>"


def test_a_secret_in_an_error_text_reaches_no_file_of_a_run(tmp_path: Path) -> None:
    log_to_file(tmp_path / "log.txt")
    try:
        raise RuntimeError("cannot log in with hf_secret_of_the_user")
    except RuntimeError as error:
        logging.getLogger("toolkit").error("rank 0 ends: %s", error, exc_info=error)
        logging.getLogger("transformers").warning("key 0123456789abcdef-wandb was refused")
        write_status(tmp_path, "failed", reason=f"{error}")
    log_to_file(None)
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" in log and "<HF_TOKEN>" in log and "<WANDB_API_KEY>" in log
    assert "<HF_TOKEN>" in json.loads((tmp_path / "status.json").read_text())["reason"]
    for path in tmp_path.iterdir():
        assert "hf_secret" not in path.read_text() and "abcdef-wandb" not in path.read_text()
