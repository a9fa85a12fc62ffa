"""Learnt metrics are computed by another Python, which has their packages; here these are tiny stand-ins."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.scoring.neural import neural_score, parse_neural

TEXTS = ["we go", "it rains"], ["we went", "it rains"]
# COMET's interface as far as it is used; it prints more than the score, as the real one does.
COMET = """
from statistics import median  # torch needs Python's own, and we have files of such names
from types import SimpleNamespace
def download_model(name):
    if name == "gone":
        raise KeyError("Model 'gone' not supported by COMET.")
    return name + ".ckpt"
class Model:
    def predict(self, rows, batch_size, gpus, progress_bar):
        print("GPU available: False")
        assert all(row["src"] == "" for row in rows)
        return SimpleNamespace(system_score=sum(row["mt"] == row["ref"] for row in rows) / len(rows))
def load_from_checkpoint(path):
    assert path.endswith(".ckpt")
    return Model()
"""


@pytest.fixture
def comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "comet.py").write_text(COMET)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_the_score_comes_from_the_other_python(comet: None) -> None:
    metrics = parse_neural(["comet=Unbabel/some"], sys.executable)
    assert neural_score(metrics, "comet", *TEXTS) == 0.5


def test_a_checkpoint_that_cannot_be_used_is_one_line(comet: None) -> None:
    with pytest.raises(UserError, match=r"the comet checkpoint gone cannot be used: .*not supported"):
        neural_score(parse_neural(["comet=gone"]), "comet", *TEXTS)


@pytest.mark.parametrize(
    ("words", "python", "complaint"),
    [
        (["meteor=x"], None, "a name of comet, bleurt, not 'meteor'"),
        (["comet"], None, "--neural wants NAME=CHECKPOINT"),
        (["comet=x"], "/nowhere/python", "/nowhere/python is no program"),
        (
            ["comet=x"],
            None,
            r"cannot import unbabel-comet \(ModuleNotFoundError.*--neural-python neural-env/bin/python",
        ),
    ],
)
def test_what_cannot_be_computed_is_said_before_anything_is_translated(
    words: list[str], python: str | None, complaint: str
) -> None:
    if "import" in complaint and importlib.util.find_spec("comet"):
        pytest.skip("COMET is installed here")
    with pytest.raises(UserError, match=complaint):
        parse_neural(words, python)
