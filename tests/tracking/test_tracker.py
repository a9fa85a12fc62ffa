"""Figures reach metrics.jsonl, W&B offline and TensorBoard; a resumed run has each step once; no tracker ends a run."""

import json
import math
import os
import resource
import signal
import socket
import threading
from itertools import count
from unittest.mock import MagicMock

import pytest

from toolkit.recipe.schema import Tracking
from toolkit.tracking import background
from toolkit.tracking.background import BackgroundSink
from toolkit.tracking.jsonl import METRICS_FILE, keep_until, read_lines
from toolkit.tracking.tracker import open_tracker
from toolkit.tracking.weights_and_biases import RUN_ID_FILE

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch, tmp_path):
    """No key of the developer's own decides a test, and W&B writes nothing outside the run directory."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))


def test_figures_are_readable_during_the_run(tmp_path):
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


def test_a_resumed_run_drops_what_it_will_log_again(tmp_path):
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


def test_a_run_from_scratch_keeps_no_earlier_figures(tmp_path):
    with open_tracker(tmp_path, Tracking(), {}, is_main=True) as tracker:
        tracker.log(3, {"loss": 1.0})
    with open_tracker(tmp_path, Tracking(), {}, is_main=True):
        pass
    assert read_lines(tmp_path / METRICS_FILE) == []


def test_a_resumed_run_keeps_texts_with_any_line_end(tmp_path):
    rows = [{"reference": "one\u2028two\x85three\r\nfour"}]
    with open_tracker(tmp_path, Tracking(), {}, is_main=True) as tracker:
        tracker.table(1, "samples", rows)
    keep_until(tmp_path / METRICS_FILE, 1)
    assert [entry["rows"] for entry in read_lines(tmp_path / METRICS_FILE)] == [rows]


def test_a_full_disk_is_one_line_and_costs_only_lines_of_the_file(tmp_path, capsys):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with open_tracker(tmp_path, Tracking(), {}, is_main=True) as tracker:
            tracker.log(1, {"loss": 1.0})
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
            for step in range(2, 6):
                tracker.log(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert METRICS_FILE in line
    assert [entry["step"] for entry in read_lines(tmp_path / METRICS_FILE)][:1] == [1]


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


@pytest.mark.process
def test_wandb_keeps_a_run_offline_and_resumes_it_under_the_same_id(tmp_path):
    settings = Tracking(wandb="offline", project="test")
    for resume_step in (0, 2):
        with open_tracker(
            tmp_path, settings, {"training": {"seed": 1}}, is_main=True, resume_step=resume_step
        ) as tracker:
            tracker.log(resume_step + 1, {"loss": 1.5})
            tracker.table(resume_step + 1, "samples", [{"reference": "hello", "hypothesis": "hallo"}])
    run_id = (tmp_path / RUN_ID_FILE).read_text().strip()
    # Two starts within one second: wandb adds a suffix to the second folder's name, the file inside keeps the ID.
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(
        [file.name for file in folder.glob("*.wandb")] == [f"run-{run_id}.wandb"] for folder in folders
    )


@pytest.mark.process
def test_wandb_online_without_a_key_is_one_line_and_stays_offline(tmp_path, capfd):
    with open_tracker(tmp_path, Tracking(wandb="online"), {}, is_main=True) as tracker:
        tracker.log(1, {"loss": 1.0})
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "wandb sync" in error[0]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.process
def test_wandb_files_hold_no_description_of_the_machine_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    with open_tracker(tmp_path, Tracking(wandb="offline"), {}, is_main=True) as tracker:
        tracker.log(1, {"loss": 1.0})
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hf_secret_of_the_user" in path.read_bytes() for path in written)
    assert not any(path.name == "wandb-metadata.json" for path in written)


@pytest.mark.process
@pytest.mark.parametrize(
    ("machine", "environment", "mode"),
    [
        ("api.forge.coreweave.com", {}, "online"),  # the host of this W&B
        ("api.wandb.ai", {}, "online"),  # that of earlier ones
        ("wandb.example.org", {}, "offline"),
        ("wandb.example.org:8080", {"WANDB_BASE_URL": "http://wandb.example.org:8080"}, "online"),
        ("api.wandb.ai", {"WANDB_BASE_URL": "https://wandb.example.org"}, "offline"),
        ("nowhere", {"WANDB_API_KEY": KEY}, "online"),
        ("nowhere", {"WANDB_API_KEY": "no key"}, "offline"),
        ("nowhere", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online"),  # the recipe decides
    ],
)
def test_a_key_is_found_where_wandb_keeps_it(machine, environment, mode, tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # else it has the key of a test before
    (tmp_path / "netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    for name, value in ({"NETRC": str(tmp_path / "netrc")} | environment).items():
        monkeypatch.setenv(name, value)
    modes = []
    monkeypatch.setattr(wandb, "init", lambda **arguments: modes.append(arguments["mode"]) or MagicMock())
    with open_tracker(tmp_path, Tracking(wandb="online"), {}, is_main=True):
        pass
    wandb.teardown()
    assert modes == [mode]
    output = capfd.readouterr()
    assert len(output.err.splitlines()) == (mode == "offline") and not output.out and KEY not in output.err


class FakeSink:
    """A tracker whose call of one name fails, or hangs until the test ends."""

    def __init__(self, wrong: str, behave) -> None:
        self._wrong, self._behave = wrong, behave
        self.calls: list[str] = []
        self._call("open")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._wrong:
            self._behave()

    def log(self, *_) -> None:
        self._call("log")

    def table(self, *_) -> None:
        self._call("table")

    def close(self) -> None:
        self._call("close")


def use(wrong: str, behave) -> None:
    """A short run with one tracker."""
    sink = BackgroundSink("fake", lambda: FakeSink(wrong, behave), timeout=0.5)
    for step in range(1, 4):
        sink.log(step, {"loss": 1.0}, "train")
        sink.table(step, "samples", [{"a": 1}])
    sink.close()
    sink.close()
    sink.log(4, {"loss": 1.0}, "train")


@pytest.mark.parametrize("wrong", ["open", "log", "table", "close"])
def test_a_tracker_that_fails_is_one_line_without_its_secrets(wrong, capfd):
    def fail() -> None:
        raise RuntimeError("https://user:key-of-the-user@wandb.example.org")

    use(wrong, fail)
    (line,) = capfd.readouterr().err.splitlines()
    assert "fake" in line and "RuntimeError" in line and METRICS_FILE in line and "key-of" not in line


@pytest.mark.parametrize("wrong", ["open", "log", "table", "close"])
def test_a_tracker_that_hangs_is_one_line(wrong, capfd):
    end = threading.Event()
    try:
        use(wrong, end.wait)
        (line,) = capfd.readouterr().err.splitlines()
        assert "fake" in line and "0.5 s" in line and METRICS_FILE in line
    finally:
        end.set()


def test_a_tracker_that_hangs_keeps_a_bounded_number_of_figures(monkeypatch, capfd):
    monkeypatch.setattr(background, "MOST_WAITING", 5)
    end = threading.Event()
    try:
        sink = BackgroundSink("fake", lambda: FakeSink("log", end.wait), timeout=30)
        for step in range(20):
            sink.log(step, {}, "train")
        sink.close()  # does not wait for the 30 s
        assert len(capfd.readouterr().err.splitlines()) == 1
    finally:
        end.set()


def test_a_tracker_that_works_gets_every_call_in_order():
    made = []

    def opened() -> FakeSink:
        made.append(FakeSink("", None))
        return made[0]

    sink = BackgroundSink("fake", opened, timeout=30)
    sink.log(1, {}, "train")
    sink.table(1, "samples", [])
    sink.close()
    assert made[0].calls == ["open", "log", "table", "close"]


SLOW = pytest.mark.nightly  # W&B tries again until half of the time is over


@pytest.fixture(params=["rejects the key", pytest.param("refuses", marks=SLOW), pytest.param("hangs", marks=SLOW)])
def wandb_server(request, monkeypatch):
    """A W&B server that does not let this run log anything."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # else it has the address of a server before
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def serve() -> None:
        for _ in count():
            try:
                held.append(server.accept()[0])
                if request.param == "rejects the key":
                    held[-1].recv(65536)
                    held[-1].sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
                    held[-1].close()
            except OSError:
                return

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    if request.param == "refuses":
        server.close()
    else:
        threading.Thread(target=serve, daemon=True).start()
    yield
    server.close()
    for connection in held:
        connection.close()
    wandb.teardown()


@pytest.mark.process
def test_a_wandb_server_that_cannot_be_used_is_one_line_and_the_run_is_offline(wandb_server, tmp_path, capfd):
    with open_tracker(tmp_path, Tracking(wandb="online", timeout=20), {}, is_main=True) as tracker:
        tracker.log(1, {"loss": 1.0})
    output = capfd.readouterr()
    (line,) = output.err.splitlines()
    assert "wandb sync" in line and KEY not in line and not output.out
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
