"""A model that reads features is exported, and translates feature files; what does not fit is refused in a line."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.models.warm_start.makers import HANDS, corpus_of, make, save, with_features
from toolkit.corpus.packed import Corpus
from toolkit.models.adaptation.export import export_model
from toolkit.models.loading.load import load_translator
from toolkit.poses.pose_file import read_pose

WIDTH, FPS = 12, 25.0


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    poses = corpus_of(folder / "poses", HANDS)
    return {
        "both": with_features(poses, folder / "both", WIDTH),
        "features": with_features(poses, folder / "features", WIDTH, poses=False),
    }


@pytest.fixture(scope="module")
def folders(corpora: dict[str, Corpus], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained models: of features alone, and of poses and features behind them."""
    settings = ("training.ctc_weight=0", "model.fusion=concat", "model.feature_encoder.hidden=16")
    folder = tmp_path_factory.mktemp("models")
    return {name: save(folder / name, make(corpus, *settings)) for name, corpus in corpora.items()}


@pytest.fixture
def run(command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(name: str, *arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            command(name).main()
        return Done(int(left.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def place(tmp_path: Path, clip_files: list[Path]) -> Path:
    """A folder of three poses, and one of their features."""
    for path in clip_files[:3]:
        raw = read_pose(path.read_bytes())
        for folder in ("poses", "features"):
            (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "poses")
        frames = round(raw.num_frames / raw.fps * FPS)
        values = np.random.default_rng(frames).normal(size=(frames, WIDTH)).astype(np.float16)
        np.savez(tmp_path / "features" / f"{path.stem}.npz", features=values, fps=FPS)
    return tmp_path


def test_an_exported_model_translates_features_from_files(
    run: Callable[..., Done], folders: dict[str, Path], place: Path
) -> None:
    export_model(*load_translator(folders["features"]), place / "exported", card="", dtype=None, replace=False)
    texts = {}
    for model in (folders["features"], place / "exported"):
        done = run("translate", "--model", model, place / "features", "--max-new-tokens", 6)
        assert done.code == 0 and len(done.out.splitlines()) == 3, done.err
        texts[model] = done.out
    assert len(set(texts.values())) == 1
    one = sorted((place / "features").iterdir())[0]
    alone = run("translate", "--model", folders["features"], one, "--max-new-tokens", 6)
    assert alone.out == next(iter(texts.values())).splitlines()[0].split("\t")[1] + "\n"


def test_poses_and_features_are_translated_together(
    run: Callable[..., Done], folders: dict[str, Path], place: Path
) -> None:
    words = ("translate", "--model", folders["both"], "--max-new-tokens", 6)
    done = run(*words, place / "poses", "--features", place / "features")
    assert done.code == 0 and len(done.out.splitlines()) == 3, done.err
    pose, features = (sorted((place / name).iterdir())[0] for name in ("poses", "features"))
    alone = run(*words, pose, "--features", features)
    assert alone.out == done.out.splitlines()[0].split("\t")[1] + "\n"
    missing = run(*words, place / "poses")
    assert missing.code == 2 and "--features" in missing.err
    features.unlink()
    lost = run(*words, place / "poses", "--features", place / "features")
    assert lost.code == 2 and pose.stem in lost.err and len(lost.err.splitlines()) == 2


def test_what_is_not_for_the_model_is_refused(
    run: Callable[..., Done], folders: dict[str, Path], model_folder: Path, place: Path
) -> None:
    pose, features = (sorted((place / name).iterdir())[0] for name in ("poses", "features"))
    np.save(place / "wide.npy", np.zeros((40, WIDTH + 1), np.float32))
    for words, named in (
        ((model_folder, pose, "--features", place / "features"), "--features"),
        ((folders["features"], features, "--features", place / "features"), "--features"),
        ((folders["features"], place / "wide.npy", "--features-fps", FPS), f"{WIDTH + 1} features"),
        ((folders["features"], place / "wide.npy"), "frame rate"),
        ((folders["features"], pose), ".npy"),
    ):
        done = run("translate", "--model", *words)
        assert done.code == 2 and named in done.err and len(done.err.splitlines()) == 2, (words, done)
