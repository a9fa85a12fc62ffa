"""Learnt metrics are computed by another Python, which has their packages; here these are tiny stand-ins."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.hidden_gpus import python_path
from toolkit.errors import UserError
from toolkit.scoring.neural import neural_score, parse_neural

TEXTS = ["we go", "it rains"], ["we went", "it rains"]
# COMET's interface as far as it is used; it prints more than the score, as the real one does.
COMET = """
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
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))


@pytest.mark.process
def test_the_score_comes_from_the_other_python(comet: None) -> None:
    metrics = parse_neural(["comet=Unbabel/some"], sys.executable)
    assert neural_score(metrics, "comet", *TEXTS) == 0.5


@pytest.mark.process
def test_a_checkpoint_that_cannot_be_used_is_one_line(comet: None) -> None:
    with pytest.raises(UserError, match=r"comet .*\bgone\b"):
        neural_score(parse_neural(["comet=gone"]), "comet", *TEXTS)


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "python", "complaint"),
    [
        (["meteor=x"], None, "--neural meteor"),
        (["comet"], None, "--neural comet"),
        (["comet=x"], "/nowhere/python", "/nowhere/python"),
        (["comet=x"], None, r"import unbabel-comet \(ModuleNotFoundError"),
    ],
)
def test_a_metric_that_cannot_be_computed_is_refused_before_the_translation(
    words: list[str], python: str | None, complaint: str
) -> None:
    if "import" in complaint and importlib.util.find_spec("comet"):
        pytest.skip("COMET is installed here")
    with pytest.raises(UserError, match=complaint) as caught:
        parse_neural(words, python)
    assert "import" not in complaint or "--neural-python neural-env/bin/python" in caught.value.hint
