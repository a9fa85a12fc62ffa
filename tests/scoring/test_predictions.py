"""Prediction files: whole or not at all, and read back exactly."""

import csv
import errno
import math
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.scoring.metrics import sentence_chrf
from toolkit.scoring.predictions import Prediction, make_predictions, read_predictions, write_predictions

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
any_number = st.none() | st.floats(allow_nan=False, allow_infinity=False)
any_prediction = st.builds(Prediction, any_text, any_text, any_text, any_number, any_number)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(any_prediction, max_size=5))
def test_any_predictions_survive_a_round_trip(tmp_path, predictions):
    write_predictions(tmp_path / "p.csv", predictions)
    assert read_predictions(tmp_path / "p.csv") == predictions


@pytest.mark.parametrize(
    "text", ["a\0b", "\\0", "\\", "\\\\0\0", "line\nbreak", "carriage\rreturn", "both\r\n", 'quo"te', "a,b", "", " "]
)
def test_awkward_texts_survive_a_round_trip(tmp_path, text):
    prediction = Prediction(text, text, text, -0.25, 1e-9)
    write_predictions(tmp_path / "p.csv", [prediction, prediction])
    assert read_predictions(tmp_path / "p.csv") == [prediction, prediction]
    assert b"\0" not in (tmp_path / "p.csv").read_bytes()


def test_the_file_is_ordinary_csv(tmp_path):
    write_predictions(tmp_path / "p.csv", [Prediction("u1", "Grüße", 'हैं, "ja"', -1.5)])
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"uid": "u1", "reference": "Grüße", "hypothesis": 'हैं, "ja"', "score": "-1.5", "chrf": ""}]


def test_make_predictions_adds_each_pairs_own_chrf():
    predictions = make_predictions(["u", "v"], ["a b", "c"], ["a b", "d"], [-1.0, -2.0])
    assert [item.chrf for item in predictions] == sentence_chrf(["a b", "d"], ["a b", "c"])
    assert predictions[0].chrf == pytest.approx(100) and predictions[1].score == -2.0
    assert make_predictions(["u"], ["a"], ["a"])[0].score is None
    with pytest.raises(ValueError):
        make_predictions(["u"], ["a", "b"], ["a", "b"])


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "epoch" / "p.csv"
    write_predictions(path, [Prediction("old", "a", "b")])

    def interrupted():
        yield Prediction("new", "a", "b")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, interrupted())
    assert [item.uid for item in read_predictions(path)] == ["old"]
    assert [file.name for file in path.parent.iterdir()] == ["p.csv"]


def test_files_made_elsewhere_are_read(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes("\ufeffhypothesis,extra,uid,reference\r\nh,x,u,r\r\n".encode())
    assert read_predictions(path) == [Prediction("u", "r", "h")]
    path.write_text("uid,reference,hypothesis,score,chrf\nu,r,h,nan,3\n")
    assert math.isnan(read_predictions(path)[0].score)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "uid, reference, hypothesis"),
        (b"uid,text\nu,t\n", "reference, hypothesis"),
        (b"uid,reference,hypothesis\nu,r\n", "line 2"),
        (b"uid,reference,hypothesis,score\nu,r,h,high\n", "line 2.*'high'"),
        (b"uid,reference,hypothesis\nu,r,\xff\n", "UTF-8"),
        (b'uid,reference,hypothesis\nu,r,"h\n', "CSV"),
        (b"uid,reference,hypothesis\nu,r," + b"h" * 200_000 + b"\n", "CSV"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, message):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_predictions(tmp_path / "p.csv")
    assert "\n" not in str(caught.value) and "p.csv" in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=rf"nothing\.csv.*{os.strerror(errno.ENOENT)}"):
        read_predictions(tmp_path / "nothing.csv")
