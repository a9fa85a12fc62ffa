import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.terminals import lines_of_libraries
from tests.time_limits import limit
from toolkit.corpus.demo import DemoSizes, make_demo
from toolkit.corpus.packed import Corpus

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "prepare.py"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo") / "clips", DemoSizes(8, 2, 2, 2))


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=limit(120))


def test_json_is_the_last_line_and_training_can_take_the_corpus(clips, tmp_path) -> None:
    table, poses, out = clips / "table.csv", clips / "poses", tmp_path / "out"
    done = _run("--table", table, "--poses", poses, "--out", out, "--workers", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lines_of_libraries(done.stdout + done.stderr) == []
    report = json.loads(done.stdout.splitlines()[-1])
    assert {"clips", "rejects", "splits", "leakage", "clips_per_second", "frames", "bytes"} <= set(report)
    assert report["clips"] == 14 and report["splits"]["train"] == 8
    assert len(Corpus.open(out).splits["train"]) == 8


def test_settings_of_a_recipe_and_the_cache(clips, tmp_path) -> None:
    where = [f"data.source=table data.table={clips / 'table.csv'} data.poses={clips / 'poses'}".split()]
    done = _run("--recipe", "demo", *where[0], "--fps", "10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (corpus,) = (path for path in (tmp_path / "corpora").iterdir() if path.name[0] != ".")
    assert Corpus.open(corpus).metadata.fps == 10
    assert "14 clips" in done.stdout and "splits   train 8" in done.stdout
    again = _run("--recipe", "demo", *where[0], "--fps", "10", cwd=tmp_path)
    assert "was there already" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--table", "none.csv", "--poses", "."], 2, "none.csv"),
        (["--fps", "0"], 2, "--fps: Input should be greater than 0"),
        (["--too-long", "squeeze"], 2, "--too-long: Input should be 'subsample', 'cut' or 'reject'"),
        (["--min-frames", "600"], 2, "min_frames 600"),
        (["--columns", "uid"], 2, "--columns uid"),
        (["--recipe", "nothing_like_it"], 2, "nothing_like_it"),
    ],
)
def test_wrong_options_are_named_with_a_hint(tmp_path, arguments, code: int, named: str) -> None:
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == code and named in done.stderr.splitlines()[0] and not list(tmp_path.iterdir())


def test_too_many_rejects_are_exit_code_3(clips, tmp_path) -> None:
    poses = tmp_path / "poses"
    poses.mkdir()
    for file in (clips / "poses").iterdir():
        (poses / file.name).symlink_to(file)
    (poses / "train-00000.pose").unlink()
    done = _run("--table", clips / "table.csv", "--poses", poses, "--out", "out", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 3 and "1 of 14 clips" in done.stderr and "out.rejects.csv" in done.stderr
    assert not (tmp_path / "out").exists()


def test_show_draws_a_clip(clips, tmp_path) -> None:
    prepared = [
        "--table",
        clips / "table.csv",
        "--poses",
        clips / "poses",
        "--out",
        "out",
        "--workers",
        "1",
        "--fps",
        "2",
    ]
    assert _run(*prepared, cwd=tmp_path).returncode == 0
    done = _run("show", "out", "dev-00000", "--poses", clips / "poses", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "dev-00000.gif\n" and (tmp_path / "dev-00000.gif").exists()
    missing = _run("show", "out", "nobody", cwd=tmp_path)
    assert missing.returncode == 2 and "'nobody'" in missing.stderr
