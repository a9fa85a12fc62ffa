"""The life of a run: it is started, stopped, resumed to its end, and its model is used.

Only data, epochs and the steps between checkpoints are smaller; everything else is the recipe's.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.as_users_do.conftest import TIMEOUT, User
from tests.time_limits import limit
from toolkit.batching.order import steps_per_epoch
from toolkit.corpus.names import one_line
from toolkit.errors import EXIT_INTERRUPTED
from toolkit.recipe.load import load_recipe
from toolkit.scoring.predictions import read_predictions

FEATURES_FPS = 10.0
EPOCHS = 3
STEPS = 6  # of a whole run, at least


@dataclass(frozen=True)
class Life:
    """What a run left behind.

    Attributes:
        folder: the run directory.
        name: of its folder in ``runs``: the recipe's, or the test's.
        arguments: of the command that trained it.
        stopped_at: the step after which it was stopped.
        entries: the lines of ``metrics.jsonl``.
    """

    folder: Path
    name: str
    arguments: list[str]
    stopped_at: int
    entries: list[dict[str, Any]]

    def steps(self) -> list[int]:
        return [entry["step"] for entry in self.entries if entry["kind"] == "train"]

    def evaluated_at(self) -> list[int]:
        return [entry["step"] for entry in self.entries if entry["kind"] == "eval"]


def live(
    user: User,
    recipe: str,
    ranks: int,
    *,
    data: list[str] | None = None,
    name: str = "",
    clips: int = 0,
    script: str = "launch/train.py",
) -> Life:
    """Train a recipe; SIGTERM reaches all ranks, as a scheduler sends it, in the first epoch after an evaluation.

    ``data`` are overrides that say what is learnt from what, those of the user's clips by default; ``clips`` are those
    of an epoch, where it is not each training clip of the table once; ``script`` trains.
    """
    training, name = load_recipe(recipe).training, name or recipe
    table = Path(user.data[-2].partition("=")[2])
    an_epoch = steps_per_epoch(clips or table.read_text().count(",train"), training.global_batch_size)
    # Two evaluations at least, three epochs at least, and steps that are left when the run is stopped.
    epochs = max(EPOCHS, 2 * training.eval_every, math.ceil(STEPS / an_epoch))
    arguments = ["--recipe", recipe, *(data or user.data), f"training.epochs={epochs}", "training.save_every=2"]
    arguments += [f"run.dir=runs/{name}"] if name != recipe else []
    folder = user.clone / "runs" / name
    output = folder.with_name(f"{folder.name}.txt")
    output.parent.mkdir(exist_ok=True)
    with output.open("w") as out:
        run = subprocess.Popen(
            user.words(script, *arguments, ranks=ranks),
            cwd=user.clone, env=user.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for_a_step_after_an_evaluation(run, folder)
            for rank in ranks_of(run):
                rank.send_signal(signal.SIGTERM)
            code = run.wait(limit(TIMEOUT))
        finally:
            run.kill()
    assert code == EXIT_INTERRUPTED, output.read_text()
    stopped_at = entries_of(folder)[-1]["step"]
    assert f"after step {stopped_at} of " in output.read_text()
    done = user.run(script, *arguments, "--json", ranks=ranks)
    assert done.code == 0, done.out + done.err
    assert f"checkpoints/step_{stopped_at:06d}" in done.out
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    life = Life(folder, name, arguments, stopped_at, entries_of(folder))
    total = done.json["steps"]
    assert life.steps() == list(range(1, total + 1))
    assert total == epochs * an_epoch
    between = an_epoch * training.eval_every
    assert life.evaluated_at() == list(range(between, total + 1, between))
    return life


def use(user: User, life: Life, ranks: int = 0, features: Path | None = None, *, reads_poses: bool = True) -> None:
    """Type the commands that come after training, and hold what they say to what the run says.

    ``features`` is a folder of feature files of the user's clips, which the model reads beside poses or instead.
    """
    run = f"runs/{life.name}"
    scores = json.loads((life.folder / "scores.json").read_text())
    first = read_predictions(life.folder / "predictions" / "test.csv")[0]

    evaluated = user.run("launch/evaluate.py", "--model", run, "--json", ranks=ranks)
    assert evaluated.code == 0, evaluated.err
    found = evaluated.json["splits"]["test"]["scores"]
    assert found == scores["splits"]["test"]["scores"]

    poses = Path(user.data[-1].partition("=")[2])
    files = [poses / f"{first.uid}.pose"] if reads_poses else []
    if features:
        files += [*(["--features"] if files else []), features / f"{first.uid}.npy", "--features-fps", FEATURES_FPS]
    translated = user.run("launch/translate.py", "--model", run, *files)
    assert translated.code == 0, translated.err
    assert translated.out.strip() == one_line(first.hypothesis).strip()

    exported = user.run("launch/export.py", run, "--to", f"exported/{life.name}")
    assert exported.code == 0, exported.err
    assert (user.clone / "exported" / life.name / "README.md").is_file()

    (life.folder / "report.html").unlink()
    reported = user.run("launch/report.py", run)
    assert reported.code == 0, reported.err
    assert (life.folder / "report.html").is_file()


def entries_of(folder: Path) -> list[dict[str, Any]]:
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def wait_for_a_step_after_an_evaluation(run: subprocess.Popen[bytes], folder: Path) -> None:
    """Return early where the run ends before; its exit code then says why."""
    deadline = time.monotonic() + limit(TIMEOUT)
    while run.poll() is None:
        kinds = [entry["kind"] for entry in entries_of(folder)]
        if "eval" in kinds and "train" in kinds[kinds.index("eval") :]:
            return
        assert time.monotonic() < deadline, "no step after an evaluation in time"
        time.sleep(0.05)


def ranks_of(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks' processes below a launcher; their loaders' workers have the same command line."""
    below = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
    ranks = [process for process in below if any(word.startswith("--local_rank=") for word in process.cmdline())]
    return [process for process in ranks if process.parent() not in ranks]
