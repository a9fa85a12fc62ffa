"""A run from a trained translator on two ranks: stopped, resumed without it, exported with its lineage."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.house.documented import ROOT, commands_of
from tests.models.warm_start.makers import HANDS, corpus_of, make, save
from tests.scripts import run_main
from toolkit.models.loading.load import load_translator

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translator with the sizes of the run below, as another run has kept it."""
    folder = tmp_path_factory.mktemp("source")
    sizes = ("model.pose_encoder={kind: conv, hidden: 64, layers: 2}", "model.prefix=null")
    save(folder / "best", make(corpus_of(folder / "corpus", HANDS), *sizes, seed=4))
    content = {"step": 1234, "scores": {"bleu4": 7.5, "cer": None}}
    (folder / "best" / "evaluation.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def arguments(settings: list[str], source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *("--recipe", "t5_small", "--ds", "zero3", *settings, f"model.init_from={source}", "model.lora.r=4"),
        *("training.epochs=1", "evaluation.num_beams=1", f"run.dir={tmp_path_factory.mktemp('runs') / 'fine'}"),
    ]


def test_a_run_from_a_source_resumes_without_it_and_is_exported(
    fork: Run, train_here: Run, arguments: list[str], source: Path, tmp_path: Path
) -> None:
    run_dir = Path(arguments[-1].removeprefix("run.dir="))
    first = fork("launch/train.py", *arguments, "training.time_limit=0.0001", ranks=2)
    assert first.code == 75, first.out + first.err
    for word in ("step 1234", "bleu4 7.5", "pose_encoder", "50 landmarks", "384 rows"):
        assert word in first.out and word in (run_dir / "log.txt").read_text(), word

    other = [word for word in arguments if not word.startswith("model.init_from")]
    for changed in (other, [*other, f"model.init_from={source / 'best'}"], [*arguments, "model.init_parts=[encoder]"]):
        refused = train_here(*changed)
        assert refused.code == 2 and "model.init_" in refused.err

    gone = source.rename(source.with_name("gone"))
    rest = fork("launch/train.py", *arguments, "training.time_limit=9", "--json", ranks=2)
    gone.rename(source)
    assert rest.code == 0, rest.out + rest.err
    assert rest.json["steps"] == 3 and "resuming from" in rest.out

    done = run_main("launch/export.py", run_dir, "--to", tmp_path / "exported", "--merge-lora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "1234" in card and "7.50" in card and str(source.parent) not in card
    model, _ = load_translator(tmp_path / "exported")
    assert model.config.lineage["step"] == 1234 and model.config.lineage["lineage"] is None
    taken = json.loads((run_dir / "init_from.json").read_text())
    assert taken["folder"] == str(source / "best") and taken["lineage"] == model.config.lineage


@pytest.mark.parametrize("settings_of_another", ["model.pose_encoder.kind=linear", "model.backbone=bart_large"])
def test_a_source_that_does_not_fit_is_refused_before_a_process_group(
    train_here: Run, arguments: list[str], settings_of_another: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.cluster.process_group.join_process_group", None)
    done = train_here(*arguments, settings_of_another, f"run.dir={tmp_path / 'run'}")
    assert done.code == 2 and "model.init_from" in done.err and len(done.errors) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("ds", ["zero0", "zero1", "zero2", "zero3_offload"])
def test_every_stage_starts_from_a_source_with_the_same_first_loss(
    run: Run, arguments: list[str], losses: Callable[[Path], list[float]], ds: str, tmp_path: Path
) -> None:
    found = []
    for name, ranks in (("one", 0), ("two", 2)):
        run_dir = tmp_path / name
        words = [*arguments, f"run.dir={run_dir}", "training.max_steps=1", "model.lora=null", "model.dropout=0"]
        done = run("launch/train.py", *words, "--ds", ds, "model.pose_encoder.dropout=0", ranks=ranks)
        assert done.code == 0, done.out + done.err
        found += losses(run_dir)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.nightly
def test_the_walk_of_the_document(run: Run, settings: list[str], clips: Path, source: Path, tmp_path: Path) -> None:
    """The first commands of docs/transfer.md, in their order, on small models."""
    commands = [shlex.split(text) for text in commands_of(ROOT / "docs" / "transfer.md")[:4]]
    for name in ("recipes", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pretrained").symlink_to(source)
    (tmp_path / "mine.csv").symlink_to(clips / "table.csv")
    (tmp_path / "my_poses").symlink_to(clips / "poses")
    small = [word for word in settings if not word.startswith("data.")]
    for words in commands:
        place = next(number for number, word in enumerate(words) if word.startswith("launch/"))
        script, *rest = words[place:]
        ranks = 2 if script == "launch/train.py" else 0
        added = small if script in ("launch/train.py", "launch/recipes.py") else []
        done = run(script, *rest, *added, *(["training.epochs=1"] if ranks else []), ranks=ranks, cwd=tmp_path)
        assert done.code == 0, (words, done.out, done.err)
    assert (tmp_path / "exported" / "fine" / "model.safetensors").is_file()


@pytest.mark.nightly
def test_overfit_starts_from_a_source(run: Run, arguments: list[str], tmp_path: Path) -> None:
    words = [*arguments, f"run.dir={tmp_path / 'run'}", "training.max_steps=2", "model.lora=null"]
    done = run("launch/train.py", *words, "--overfit", "8")
    assert done.code == 0, done.out + done.err
    assert "starting from" in done.out and (tmp_path / "run" / "init_from.json").is_file()
