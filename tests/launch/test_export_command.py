"""launch/export.py: a folder that works elsewhere, and refusals before anything is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from safetensors.torch import load_file

from tests.time_limits import limit


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def run_dir(make_run: Callable[..., Path], model_folder: Path, tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "mine", **{"run.dir": "secret_place/mine"})
    shutil.copytree(model_folder, folder / "best")
    return folder


@pytest.fixture
def export(command, monkeypatch, capsys, run_dir: Path) -> Callable[..., Done]:
    """Runs the command in this process."""
    main = command("export").main

    def run(*arguments: Any, run: Path = run_dir) -> Done:
        monkeypatch.setattr(sys, "argv", ["export.py", str(run), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return Done(int(left.value.code or 0), *capsys.readouterr())

    return run


def test_the_folder_translates_in_a_fresh_process_elsewhere(
    export, run_dir: Path, clip_files: list[Path], tmp_path
) -> None:
    done = export("--to", tmp_path / "shared" / "model", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out.splitlines()[-1])
    assert summary["largest_difference"] == 0 and summary["dtype"] == "float32"
    root = Path(__file__).resolve().parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import toolkit.auto\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "for folder in sys.argv[2:]:\n"
        "    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)\n"
        "    print(ascii(processor.batch_decode(model.generate(**processor([sys.argv[1]])))[0]))\n"
    )
    (tmp_path / "elsewhere").mkdir()
    done_elsewhere = subprocess.run(
        [sys.executable, "-c", code, clip_files[0], tmp_path / "shared" / "model", run_dir / "best"],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done_elsewhere.returncode == 0, done_elsewhere.stderr
    of_the_export, of_the_run = done_elsewhere.stdout.splitlines()
    assert of_the_export == of_the_run
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "shared" / "model").iterdir()}
    assert len(modes) == 1, "weights are as readable as the rest"


def test_the_card_says_what_the_model_is(export, tmp_path) -> None:
    export("--to", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "transformers"
    metrics = {entry["type"] for entry in matter["model-index"][0]["results"][0]["metrics"]}
    assert {"bleu1", "chrf", "cer"} <= metrics
    parts = "hands_body_50", "floor: constant sentence", "nrefs:1|", "import toolkit.auto", "## Limits", "max_frames"
    for part in parts:
        assert part in body
    assert "secret_place" not in card, "where things lay on the machine that trained is nobody's business"
    huggingface_hub = pytest.importorskip("huggingface_hub")
    assert huggingface_hub.ModelCard(card).data.eval_results


def test_a_run_without_scores_says_so(export, run_dir: Path, tmp_path) -> None:
    unscored = shutil.copytree(run_dir, tmp_path / "unscored")
    (unscored / "scores.json").unlink()
    assert export("--to", tmp_path / "model", run=unscored).code == 0
    assert "has not been scored" in (tmp_path / "model" / "README.md").read_text()


def test_half_the_size(export, tmp_path) -> None:
    done = export("--to", tmp_path / "model", "--dtype", "bf16")
    assert done.code == 0 and "bfloat16" in done.out and "differs by at most" in done.out
    dtypes = {str(tensor.dtype) for tensor in load_file(tmp_path / "model" / "model.safetensors").values()}
    assert dtypes == {"torch.bfloat16"}


def test_a_model_is_replaced_only_when_asked_and_nothing_else_ever(export, run_dir: Path, tmp_path) -> None:
    target = tmp_path / "model"
    assert export("--to", target).code == 0
    (target / "mine.txt").touch()
    done = export("--to", target)
    assert done.code == 2 and "--replace" in done.err and (target / "mine.txt").exists()
    assert export("--to", target, "--replace").code == 0
    assert not (target / "mine.txt").exists()
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "dear.jpg").touch()
    done = export("--to", other, "--replace")
    assert done.code == 2 and str(other) in done.err and (other / "dear.jpg").exists()
    done = export("--to", run_dir / "best", "--replace")
    assert done.code == 2 and "--to" in done.err and str(run_dir / "best") in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photographs"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--merge-lora"], "--merge-lora"),
        (["--dtype", "fp16"], "--dtype fp16"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    export, tmp_path, arguments: list[str], complaint: str
) -> None:
    done = export("--to", tmp_path / "model", *arguments)
    assert done.code == 2 and complaint in done.err and done.err.count("\n") == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_refused(export, model_folder: Path, tmp_path) -> None:
    done = export("--to", tmp_path / "model", run=model_folder)
    assert done.code == 2 and str(model_folder) in done.err


def test_a_hub_out_of_reach_leaves_the_folder(export, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = export("--to", tmp_path / "model", "--push-to-hub", "me/model")
    assert done.code == 2 and "me/model" in done.err and done.err.count("\n") == 2
    assert 'from_pretrained("me/model")' in (tmp_path / "model" / "README.md").read_text()
