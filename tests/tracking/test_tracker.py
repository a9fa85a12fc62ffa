"""Figures reach metrics.jsonl, W&B offline and TensorBoard, and a continued run tells one story."""

import json
import math
import os

import pytest

from toolkit.recipe.schema import Tracking
from toolkit.tracking.jsonl import METRICS_FILE, keep_until, read_lines
from toolkit.tracking.tracker import open_tracker
from toolkit.tracking.weights_and_biases import RUN_ID_FILE, has_key


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch, tmp_path):
    """No key of the developer's own decides a test, and W&B writes nothing outside the run directory."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))


def test_figures_are_readable_while_the_run_goes_on(tmp_path):
    with open_tracker(tmp_path, Tracking(), {}, is_main=True) as tracker:
        tracker.log(1, {"loss": 2.5, "lr": 1e-4})
        first = read_lines(tmp_path / METRICS_FILE)  # before close
        tracker.log(1, {"bleu4": 12.0}, kind="eval")
        tracker.table(1, "samples", [{"reference": "நன்றி", "hypothesis": "नमस्ते"}])
    assert [(entry["kind"], entry["step"], entry["loss"]) for entry in first] == [("train", 1, 2.5)]
    entries = read_lines(tmp_path / METRICS_FILE)
    assert [entry["kind"] for entry in entries] == ["train", "eval", "table"]
    assert entries[2]["rows"][0]["reference"] == "நன்றி"


def test_every_line_is_strict_json_even_when_the_loss_is_not_a_number(tmp_path):
    with open_tracker(tmp_path, Tracking(), {}, is_main=True) as tracker:
        tracker.log(1, {"loss": math.nan, "grad_norm": math.inf})
    line = (tmp_path / METRICS_FILE).read_text()
    entry = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert entry["loss"] is None and entry["grad_norm"] is None


def test_a_continued_run_drops_what_it_will_tell_again(tmp_path):
    with open_tracker(tmp_path, Tracking(), {}, is_main=True) as tracker:
        for step in range(1, 8):
            tracker.log(step, {"loss": float(step)})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "step": 8, "lo')  # the process died here
    with open_tracker(tmp_path, Tracking(), {}, is_main=True, resume_step=5) as tracker:
        tracker.log(6, {"loss": 60.0})
    entries = read_lines(tmp_path / METRICS_FILE)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS_FILE]


def test_a_run_started_anew_keeps_nothing_of_the_old_story(tmp_path):
    with open_tracker(tmp_path, Tracking(), {}, is_main=True) as tracker:
        tracker.log(3, {"loss": 1.0})
    with open_tracker(tmp_path, Tracking(), {}, is_main=True):
        pass
    assert read_lines(tmp_path / METRICS_FILE) == []


def test_keep_until_without_a_file_is_nothing_to_do(tmp_path):
    keep_until(tmp_path / METRICS_FILE, 5)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_nothing(tmp_path):
    with open_tracker(tmp_path, Tracking(tensorboard=True, wandb="offline"), {}, is_main=False) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.table(1, "samples", [{"a": 1}])
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_files_hold_the_scalars(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_tracker(tmp_path, Tracking(tensorboard=True), {}, is_main=True) as tracker:
        for step in (1, 2):
            tracker.log(step, {"loss": 1.0 / step})
        tracker.table(2, "samples", [{"reference": "a|b"}])
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_wandb_keeps_a_run_offline_and_goes_on_under_the_same_id(tmp_path):
    settings = Tracking(wandb="offline", project="test")
    for resume_step in (0, 2):
        with open_tracker(
            tmp_path, settings, {"training": {"seed": 1}}, is_main=True, resume_step=resume_step
        ) as tracker:
            tracker.log(resume_step + 1, {"loss": 1.5})
            tracker.table(resume_step + 1, "samples", [{"reference": "hello", "hypothesis": "hallo"}])
    run_id = (tmp_path / RUN_ID_FILE).read_text().strip()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(run_id) for folder in folders)
    assert all(list(folder.glob("*.wandb")) for folder in folders)


def test_wandb_online_without_a_key_says_so_in_one_line_and_stays_offline(tmp_path, capfd):
    with open_tracker(tmp_path, Tracking(wandb="online"), {}, is_main=True) as tracker:
        tracker.log(1, {"loss": 1.0})
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "wandb sync" in error[0]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_wandb_files_tell_nothing_of_the_machine_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    with open_tracker(tmp_path, Tracking(wandb="offline"), {}, is_main=True) as tracker:
        tracker.log(1, {"loss": 1.0})
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hf_secret_of_the_user" in path.read_bytes() for path in written)
    assert not any(path.name == "wandb-metadata.json" for path in written)


def test_a_key_is_looked_for_where_wandb_keeps_it(tmp_path, monkeypatch):
    assert not has_key()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password k\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert has_key()
