import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.reporting.report import differences, json_for_html, write_comparison, write_report
from toolkit.reporting.run_files import CURVE_POINTS, not_above_floors, read_run, thin_curves

HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "{{script}} {{data}}",
    "\u2028\u2029 \x00 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "مرحبا بالعالم",
    "मौसम अच्छा है",
    "今天天气很好",
]


def content_of(page: Path) -> dict:
    """The JSON that a page holds."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0])


@pytest.fixture
def run(make_run, tmp_path) -> Path:
    return make_run(tmp_path / "run")


def test_a_report_holds_the_whole_run(run):
    content = content_of(write_report(run))
    assert content["status"] == "finished" and content["facts"]["steps"] == 60
    assert content["train"]["loss"]["y"][0] == 5 and content["evaluations"]["dev_cer"]["x"] == [20, 40, 60]
    (split,) = content["splits"]
    samples = [sample for group in split["samples"].values() for sample in group]
    assert len(samples) == 18 == len(content["clips"]) and len({sample["uid"] for sample in samples}) == 18
    assert all(content["clips"][sample["clip"]]["frames"] == 40 for sample in samples)
    assert content["history"]["steps"] == [20, 40, 60]
    assert content["scores"][0]["rows"][1][0] == "floor: constant" and "tok:13a" in content["signature"]["bleu"]
    low, high = content["scores"][0]["intervals"]["chrf"]
    assert low < content["scores"][0]["rows"][0][1]["chrf"] < high
    assert content["texts"].keys() == {
        "recipe.yaml",
        "deepspeed.json",
        "environment.json",
        "status.json",
        "scores.json",
    }
    assert content["events"] == [{"step": 60, "what": {"time": "1.0", "note": "saved"}}]
    assert content["corpus"]["facts"]["splits"] == "train 3, test 24"


def test_the_memory_of_each_phase_stands_beside_the_plan(run):
    assert content_of(write_report(run))["memory"] == []
    early = {"kind": "memory", "step": 20, "time": 1.0, "step_process_gib": 9.0, "gone_process_gib": 1.0}
    last = {"kind": "memory", "step": 60, "time": 1.0, "start_process_gib": 1.5, "step_process_gib": 2.5}
    last |= {"step_allocated_gib": 4.4, "step_reserved_gib": 5.0, "step_planned_gib": 4.0, "save_planned_gib": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{json.dumps(early)}\n{json.dumps(last)}\n")
    start, step = content_of(write_report(run))["memory"]
    unknown = dict.fromkeys(("reserved", "planned", "difference"))
    assert start == {"phase": "start", "measured": 1.5, "process": 1.5, **unknown}
    assert step.pop("difference") == pytest.approx(0.1)
    assert step == {"phase": "step", "measured": 4.4, "reserved": 5.0, "process": 2.5, "planned": 4.0}


def test_scores_of_groups_are_shown_where_they_are_well_formed(run):
    scores = json.loads((run / "scores.json").read_text())
    anna = {"clips": 3, "cer": 0.5, "bleu4": None, "new": 1}
    groups = {"signer": {"anna": anna, "ben": {"cer": 1}, "carl": 7}, "length": [1], "language": {}}
    scores["splits"]["test"]["groups"] = groups
    (run / "scores.json").write_text(json.dumps(scores))
    (split,) = content_of(write_report(run))["scores"]
    assert split["groups"] == [{"by": "signer", "rows": [["anna", 3, {"bleu4": None, "cer": 0.5}]]}]


def test_scores_without_or_with_broken_intervals_are_shown(run):
    scores = json.loads((run / "scores.json").read_text())
    for intervals in (None, "?", {"chrf": [1], "wer": ["a", "b"], "cer": [0.1, 0.2], "new": [1, 2]}):
        scores["splits"]["test"]["intervals"] = intervals
        (run / "scores.json").write_text(json.dumps(scores))
        (split,) = content_of(write_report(run))["scores"]
        assert split["intervals"] == ({"cer": [0.1, 0.2]} if isinstance(intervals, dict) else {})


def test_a_page_needs_nothing_but_itself_and_runs_nothing_else(run):
    page = write_report(run).read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page)) - {"http://www.w3.org/2000/svg"}
    assert not addresses
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,"}
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    assert policy.startswith("default-src 'none'")
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


def test_hostile_texts_stay_texts(make_run, tmp_path):
    run = make_run(tmp_path / "<b>run</b>", [(text, text[::-1] or "x") for text in HOSTILE])
    page = write_report(run)
    html = page.read_text(encoding="utf-8")
    assert html.count("<script") == 2 == html.count("</script>") and "<img" not in html and "<b>" not in html
    split = content_of(page)["splits"][0]
    assert {sample["reference"] for group in split["samples"].values() for sample in group} == set(HOSTILE)


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_embedded_json_is_the_same_json(content):
    text = json_for_html(content)
    assert not set("<>&") & set(text) and json.loads(text) == content


@pytest.mark.parametrize("kept", ["status.json", "metrics.jsonl"])
def test_a_missing_file_is_left_out(run, kept):
    for path in run.rglob("*"):
        if path.is_file() and path.name != kept:
            path.unlink()
    content = content_of(write_report(run))
    assert content["splits"] == [] == content["scores"] and content["clips"] == []


def test_a_broken_file_is_left_out_with_a_warning(run):
    for name in ("recipe.yaml", "deepspeed.json", "environment.json", "scores.json", "status.json"):
        (run / name).write_bytes(b"{\xff broken: [")
    (run / "predictions" / "test.csv").write_text("no,columns\n1,2\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n{"kind": "train", "step": true}\n{"kind": "train", "step": 61, "loss": null}\n')
        file.write('{"kind": "train", "step": 62, "loss": NaN, "grad_norm": "big", "x": 1e999}\n{"kind": "tr')
    content = content_of(write_report(run))
    warnings = "\n".join(content["warnings"])
    for name in ("recipe.yaml", "deepspeed.json", "environment.json", "scores.json", "status.json"):
        assert f"{name} is not readable" in warnings
    assert "loss was not finite for the first time at step 61" in warnings and "cannot be read" in warnings
    assert content["train"]["loss"]["x"][-1] == 60


def test_scores_of_another_shape_are_left_out(run):
    (run / "scores.json").write_text(json.dumps({"splits": {"test": {"scores": {"cer": "x"}, "floors": [1]}, "b": 3}}))
    content = content_of(write_report(run))
    only = {"name": "test", "clips": None, "rows": [["model", {"cer": None}]], "intervals": {}, "groups": []}
    assert content["scores"] == [only]


def test_a_failed_run_says_why_and_shows_its_last_evaluation(run):
    (run / "status.json").write_text('{"status": "failed", "reason": "TrainingStopped: the loss is\\nnot finite"}')
    (run / "scores.json").unlink()
    (run / "predictions" / "test.csv").rename(run / "predictions" / "predictions_epoch_002.csv")
    (run / "predictions" / "predictions_epoch_001.csv").write_text("unreadable")
    content = content_of(write_report(run))
    assert content["warnings"][0] == "the run failed: TrainingStopped: the loss is not finite"
    # Its clips lie in another split of the corpus than the name says, and are found all the same.
    assert content["splits"][0]["name"] == "dev" and len(content["clips"]) == 18


def test_warnings_of_the_log_are_counted(run):
    line = "2026-01-02 03:04:05,678 DeepSpeed WARNING Setting accelerator to CPU.\n"
    (run / "log.txt").write_text(line * 3 + "something else\n" + line.replace("WARNING", "INFO"))
    assert "DeepSpeed: Setting accelerator to CPU. (3 times)" in content_of(write_report(run))["warnings"]


def test_a_score_at_its_floor_is_a_warning(run):
    scores = json.loads((run / "scores.json").read_text())
    scores["splits"]["test"]["floors"]["constant"]["cer"] = scores["splits"]["test"]["scores"]["cer"]
    (run / "scores.json").write_text(json.dumps(scores))
    (warning,) = not_above_floors(read_run(run))
    assert warning.startswith("cer on test") and "floor 'constant'" in warning


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))) as refused:
        write_report(tmp_path / name)
    assert "status.json" in refused.value.hint


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
def test_thinned_curves_keep_mean_and_extremes(values):
    curve = thin_curves({"loss": (list(range(1, len(values) + 1)), values)})["loss"]
    assert len(curve["x"]) == min(len(values), CURVE_POINTS) and curve["x"][-1] == len(values)
    tolerance = 1e-4 * max(map(abs, values)) + 1e-9
    assert min(curve.get("low", curve["y"])) == pytest.approx(min(values), abs=tolerance)
    assert max(curve.get("high", curve["y"])) == pytest.approx(max(values), abs=tolerance)
    widths = [b - a for a, b in zip([0, *curve["x"]], curve["x"], strict=False)]
    mean = sum(width * y for width, y in zip(widths, curve["y"], strict=True)) / len(values)
    assert mean == pytest.approx(sum(values) / len(values), abs=tolerance)


def test_runs_are_compared(make_run, tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"training.learning_rate": 0.5})
    content = content_of(write_comparison([first, second], tmp_path / "both.html"))
    assert [run["name"] for run in content["runs"]] == ["a", "b"]
    assert ["training.learning_rate", "0.001", "0.5"] in content["settings"]
    assert [row[0] for row in content["settings"]] == ["training.learning_rate"]
    assert content["runs"][0]["epochs_per_step"] == pytest.approx(1 / 20)


def test_differences_name_what_only_one_has():
    rows = differences([{"a": "1", "b": "2"}, {"a": "1", "c": "3"}])
    assert rows == [["b", "2", None], ["c", None, "3"]]
