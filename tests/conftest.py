"""What tests of several rooms use: a run directory made by hand, and a headless browser."""

from __future__ import annotations

from tests.hidden_gpus import SHOWN, hide_gpus

hide_gpus()  # before anything imports torch

import copy
import functools
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from tests.written_corpora import write_corpus
from toolkit.cluster.logs import LIBRARIES
from toolkit.corpus.packed import Clip
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe import load, model_cards
from toolkit.recipe.load import load_recipe
from toolkit.recipe.yaml_text import dump_yaml, parse_yaml
from toolkit.scoring.metrics import score
from toolkit.scoring.predictions import make_predictions, write_predictions

# Small translators, a corpus of invented clips and two processes, for tests of several rooms.
pytest_plugins = ["tests.small_translators"]

hypothesis.settings.register_profile("busy", deadline=None)  # a busy machine makes an example slow, not wrong
BROWSER_OPTIONS = (
    "--headless",
    "--no-sandbox",  # Chromium's own sandbox does not start as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


# Folders whose tests start whole commands; they come last, so that a mistake in a small part shows within a minute.
SLOW_FOLDERS = ("house", "launch", "gpu", "as_users_do", "end_to_end")
STARTS_A_PROCESS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that start no process (make test-fast)")


def pytest_configure(config: pytest.Config) -> None:
    # Threads that wait for each other cost small tensors several times what they save, most of all on a busy machine.
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ:  # other tests run beside the commands that this process starts
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    hypothesis.settings.load_profile("busy")
    if config.getoption("--fast"):
        sys.addaudithook(_refuse_processes)


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    # A run asks for the commit of the toolkit, and Python for the name of the system.
    allowed = event == "subprocess.Popen" and Path(arguments[1][0]).name in ("git", "uname")
    if event in STARTS_A_PROCESS and not allowed and "PYTEST_CURRENT_TEST" in os.environ:
        raise RuntimeError(f"{event} in a test that is not marked `process`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first; within a folder the order stays."""
    items.sort(key=_slowness)
    _choose_by_gpus(config, items)
    if config.getoption("--fast"):
        slow = [item for item in items if _slowness(item) or item.get_closest_marker("process")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


def _choose_by_gpus(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where GPUs are hidden, skip the tests that need them; where they are shown, run no others."""
    if SHOWN:
        config.hook.pytest_deselected(items=[item for item in items if not _gpus_needed(item)])
        items[:] = [item for item in items if _gpus_needed(item)]
    for item in items:
        needed, there = _gpus_needed(item), torch.cuda.device_count()
        if needed > there:
            reason = (
                f"it needs {_gpus_in_words(needed)}, and {there} can be seen here"
                if SHOWN
                else "only `make test-gpu` shows the GPUs"
            )
            item.add_marker(pytest.mark.skip(reason=reason))


def _gpus_needed(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("gpu2") else int(item.get_closest_marker("gpu") is not None)


def _gpus_in_words(number: int) -> str:
    return f"{number} GPU{'' if number == 1 else 's'}"


def _slowness(item: pytest.Item) -> int:
    parts = item.path.relative_to(item.config.rootpath).parts  # the clone itself may lie in a folder of such a name
    return max([SLOW_FOLDERS.index(part) + 1 for part in parts if part in SLOW_FOLDERS], default=0)


@pytest.fixture(scope="session", autouse=True)
def recipes_are_parsed_once() -> Iterator[None]:
    """A text of YAML is parsed once for all tests: of the time in which a recipe resolves it takes nine tenths."""
    parsed = functools.cache(parse_yaml)
    with pytest.MonkeyPatch.context() as patch:
        for module in (load, model_cards):
            patch.setattr(module, "parse_yaml", lambda *arguments: copy.deepcopy(parsed(*arguments)))
        yield


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """The loggers that commands set up, which are as they were afterwards; a test may come after any other."""
    names = ("toolkit", *LIBRARIES)
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in map(logging.getLogger, names)]
    yield
    logging.captureWarnings(False)
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def free_port() -> int:
    """A TCP port that no process uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def moving_clip(frames: int, points: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Landmarks that circle, [frames, points, 3]; the last one is missing throughout."""
    time_, point = np.linspace(0, 6, frames)[:, None], np.arange(points)
    values = np.stack([np.cos(time_ + point) * 0.8, np.sin(time_ + point) * 0.8 + 0.3, time_ * 0 + point * 0], axis=2)
    values[:, -1] = np.nan
    return values.astype(np.float32)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Makes a run directory as training leaves it, with its corpus beside it; any part may be left out later."""

    def make(
        folder: Path, texts: list[tuple[str, str]] | None = None, *, frames: int = 40, steps: int = 60, **settings: Any
    ) -> Path:
        pairs = texts or [(f"word{i} again and {'on ' * (i % 7)}", f"word{i - i % 2} again and") for i in range(24)]
        uids = [f"test-{index:03d}" for index in range(len(pairs))]
        landmark_set = load_landmark_set("hands_body_50")
        features = moving_clip(frames, landmark_set.num_points)
        clips = [Clip(uid, reference, features) for uid, (reference, _) in zip(uids, pairs, strict=True)]
        # Beside the run, by its name: two runs of one test may have different corpora.
        corpus = folder.parent / f"corpus-of-{folder.name}"
        write_corpus(corpus, {"train": clips[:3], "test": clips}, landmark_set, 12.5, NORMALISATION)

        folder.mkdir(parents=True)
        overrides = [f"{key}={value}" for key, value in settings.items()]
        recipe = load_recipe("demo", overrides).model_dump(mode="json")
        (folder / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
        files: dict[str, Any] = {
            "status.json": {"status": "finished", "time": "2026-01-02T03:04:05+0000", "step": steps},
            "deepspeed.json": {"train_batch_size": 32, "zero_optimization": {"stage": 1}},
            "environment.json": {"toolkit": "0", "cpu": "a processor", "gpus": [], "corpus": str(corpus)},
        }
        references, hypotheses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        write_predictions(folder / "predictions" / "test.csv", make_predictions(uids, references, hypotheses))
        scores, floor = score(hypotheses, references), score(["?"] * len(references), references)
        intervals = {name: [0.9 * value, 1.1 * value] for name, value in scores.values().items() if value is not None}
        split = {
            "clips": len(pairs),
            "scores": scores.values(),
            "intervals": intervals,
            "floors": {"constant": floor.values()},
        }
        files["scores.json"] = {
            "steps": steps,
            "training_seconds": 75.0,
            "clips_per_second": 12.5,
            "signature": scores.signature,
            "splits": {"test": split},
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        entries: list[dict[str, Any]] = []
        for step in range(1, steps + 1):
            figures = {"epoch": step / 20, "loss": 5 / step, "learning_rate": 1e-3, "clips_per_second": 10.0 + step % 3}
            entries.append({"kind": "train", "step": step, "time": 1.0 * step, **figures})
            if step % 20 == 0:
                entries.append({"kind": "eval", "step": step, "time": 1.0, "dev_bleu4": step / 2, "dev_cer": 1 / step})
                rows = [{"uid": "dev-0", "reference": pairs[0][0], "hypothesis": pairs[0][1]}]
                entries.append({"kind": "table", "step": step, "time": 1.0, "name": "dev_samples", "rows": rows})
        entries.append({"kind": "event", "step": steps, "time": 1.0, "note": "saved"})
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
        return folder

    return make


class Browser:
    """Headless Chromium, as far as the tests of pages need it.

    Args:
        driver: selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str, *, width: int = 1280, height: int = 900) -> None:
        """Open an address in a window of that size, with a clean console."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get_log("browser")
        self.driver.get(address)

    def run(self, script: str) -> Any:
        """What a script returns in the page."""
        return self.driver.execute_script(script)

    def errors(self) -> list[str]:
        """What the console holds against the page since it was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
        """The first true value of a condition; elements that come and go meanwhile do not matter."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except WebDriverException:
                pass  # not there yet, or just replaced
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds:g} s for {what}; console: {self.errors()}")

    def command(self, name: str, **arguments: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or chromedriver is not here: apt-get install chromium chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = chromium
    for option in (*BROWSER_OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=ChromeService(driver))
    chrome.set_page_load_timeout(60)
    yield Browser(chrome)
    chrome.quit()
