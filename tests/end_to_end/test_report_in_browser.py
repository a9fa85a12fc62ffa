"""Reports as readers see them: in headless Chromium, on a desk, on a phone, and on paper."""

import base64
import json
import time
from pathlib import Path

import pytest

from toolkit.reporting.report import write_comparison, write_report
from toolkit.scoring.metrics import score

PHONE = {"width": 390, "height": 844}
HOSTILE = [
    ("</script><script>document.title='pwned'</script>", "<img src=x onerror=\"document.title='pwned'\">"),
    ("<b>bold</b> & bolder", "<svg onload=\"document.title='pwned'\">"),
    ("مرحبا بالعالم", "今天天气很好 मौसम"),
    ("a" * 300, ""),
]
# What a canvas shows, as a short text; a canvas without a single drawn point gives the same as an empty one.
CANVASES = "return [...document.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL())"
EMPTY = (
    "const seen = document.querySelector('canvas'); const empty = document.createElement('canvas');"
    "empty.width = seen.width; empty.height = seen.height; return empty.toDataURL()"
)


@pytest.fixture(scope="module")
def report(make_run, tmp_path_factory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "demo"))


@pytest.fixture(scope="module")
def hostile(make_run, tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "<i>name", HOSTILE)
    (run / "log.txt").write_text("2026-01-02 03:04:05,678 <script>x</script> WARNING <img src=x>\n")
    return write_report(run)


@pytest.fixture(scope="module")
def grouped(make_run, tmp_path_factory) -> Path:
    """Scores of two splits by signer, sign language and length; there are more signers than a screen has lines."""
    run = make_run(tmp_path_factory.mktemp("runs") / "grouped")
    whole = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    signers = [
        "مترجم",
        "a signer with a long name, of the evening news",
        *(f"Signer{number:02d}" for number in range(58)),
    ]
    names = {"signer": signers, "language": ["ase", "gsg", "unknown"], "length": ["1-5", "6-10", "11-20", "21+"]}
    groups = {
        kind: {
            name: {"clips": 7000 - 100 * place, **score(["a b c d e"], ["a b c d e f"]).values()}
            for place, name in enumerate(of_kind)
        }
        for kind, of_kind in names.items()
    }
    test = whole["splits"]["test"] | {"groups": groups}
    whole["splits"] = {"test": test, "test@news": test}
    (run / "scores.json").write_text(json.dumps(whole), encoding="utf-8")
    return write_report(run)


def overflow(browser) -> int:
    """Pixels by which the page is wider than its window."""
    return browser.run("return document.documentElement.scrollWidth - window.innerWidth")


def test_charts_are_drawn_and_the_console_is_silent(browser, report):
    browser.open(report.as_uri())
    assert browser.errors() == []
    headings = browser.run("return [...document.querySelectorAll('h2')].map((heading) => heading.textContent)")
    assert headings == ["Scores", "Curves", "Samples", "Lengths", "Progress", "Settings"]
    titles = browser.run("return [...document.querySelectorAll('figure.chart h3')].map((title) => title.textContent)")
    assert {"Training loss", "Learning rate", "Throughput", "dev: scores", "test: chrF++ by length"} <= set(titles)
    for curve in browser.run("return [...document.querySelectorAll('path.line')].map((path) => path.getBBox().width)"):
        assert curve > 100
    assert browser.run("return document.querySelectorAll('rect.bar').length") > 5
    said = browser.run("return [...document.querySelectorAll('figure svg')].map((chart) => chart.ariaLabel)")
    assert all(said) and any("from 5 to" in label for label in said)


def test_scores_stand_with_their_intervals_and_fit_a_phone(browser, report):
    browser.open(report.as_uri(), **PHONE)
    shown = browser.run("return [...document.querySelectorAll('#scores td .interval')].map((cell) => cell.textContent)")
    assert len(shown) >= 5 and all(" – " in text for text in shown)
    assert overflow(browser) <= 0 and browser.errors() == []


def test_groups_have_tables_whose_names_stay_in_sight(browser, grouped):
    """On a phone the scores of a group lie to the right, and names neither take their place nor leave with them."""
    browser.open(grouped.as_uri(), **PHONE)
    titles = browser.run("return [...document.querySelectorAll('#scores summary')].map((one) => one.textContent)")
    kinds = ("signer", "language", "words of the reference")
    assert titles[:-1] == [f"{split}, by {kind}" for split in ("test", "test@news") for kind in kinds]
    browser.run("document.querySelectorAll('#scores details').forEach((one) => (one.open = true))")
    rows = "return [...document.querySelectorAll('.groups')].map((one) => one.querySelectorAll('tbody tr').length)"
    assert browser.run(rows) == [60, 3, 4] * 2
    second = "return document.querySelector('.groups tbody tr:nth-child(2)').textContent"
    assert browser.run(second).startswith("a signer with a long name, of the evening news6,900")
    seen = """
        const table = document.querySelector('.groups').parentElement, frame = () => table.getBoundingClientRect();
        const name = table.querySelector('tbody tr:nth-child(2) th').getBoundingClientRect();
        table.scrollLeft = 1000;
        const last = table.querySelector('tbody tr:nth-child(2) td:last-child').getBoundingClientRect();
        const after = table.querySelector('tbody tr:nth-child(2) th').getBoundingClientRect();
        const inSight = last.right <= frame().right + 1 && after.left >= frame().left - 1;
        return [name.width < frame().width / 2, table.scrollLeft > 0, inSight];
    """
    assert browser.run(seen) == [True] * 3
    # Scores that no clip has, of glosses and of reduced BLEU, have no line.
    assert "gloss" not in browser.run("return document.getElementById('scores').textContent")
    assert overflow(browser) <= 0 and browser.errors() == []


def test_skeletons_move_pause_and_go_where_the_slider_says(browser, report):
    browser.open(report.as_uri())
    browser.run("document.getElementById('samples').scrollIntoView()")
    browser.wait_for(lambda: browser.run(CANVASES)[0] != browser.run(EMPTY), "a drawn skeleton")
    before = browser.run(CANVASES)[0]
    browser.wait_for(lambda: browser.run(CANVASES)[0] != before, "a moved skeleton")
    browser.run("document.querySelector('.player button').click()")
    paused = browser.run(CANVASES)[0]
    time.sleep(0.4)
    assert browser.run(CANVASES)[0] == paused
    browser.run("const s = document.querySelector('.player input'); s.value = 20; s.dispatchEvent(new Event('input'))")
    assert browser.run("return document.querySelector('.clock').textContent") == "1.6 / 3.2 s"
    assert browser.run(CANVASES)[0] != paused and browser.errors() == []


def test_missing_landmarks_are_not_drawn(browser, report):
    """The last point of every clip is missing; two of its neighbours are not."""
    browser.open(report.as_uri())
    strokes = browser.run("""
        const data = JSON.parse(document.getElementById('data').textContent);
        const clip = data.clips[0];
        const values = new Int16Array(Uint8Array.from(atob(clip.data), (x) => x.charCodeAt(0)).buffer);
        const places = [];
        const canvas = CanvasRenderingContext2D.prototype;
        const arc = canvas.arc;
        canvas.arc = function (...where) { places.push(where); return arc.apply(this, where); };
        skeletons.redraw();
        return [places.length / document.querySelectorAll('canvas').length, data.skeleton.points, values[49 * 2]];
    """)
    assert strokes == [49, 50, -1]


def test_without_motion_for_those_who_asked_for_less(browser, report):
    preference = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.command("Emulation.setEmulatedMedia", features=preference)
    try:
        browser.open(report.as_uri())
        playing = browser.run("return [...document.querySelectorAll('.player')].map((one) => one.dataset.playing)")
        assert set(playing) == {"false"}
    finally:
        browser.command("Emulation.setEmulatedMedia", features=[])


def test_hostile_texts_are_shown_and_do_nothing(browser, hostile):
    browser.open(hostile.as_uri())
    assert browser.errors() == []
    assert browser.run("return document.title") == "<i>name: report"
    assert browser.run("return document.querySelectorAll('img, i:not(.bar i, .legend i), b').length") == 0
    text = browser.run("return document.getElementById('page').textContent")
    assert all(reference in text for reference, _ in HOSTILE) and "<script>x</script>: <img src=x>" in text


@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
def test_no_page_is_wider_than_its_window(browser, report, hostile, tmp_path, size):
    both = write_comparison([report.parent, hostile.parent], tmp_path / "both.html")
    for page in (report, hostile, both):
        browser.open(page.as_uri(), **size)
        assert overflow(browser) <= 0, page
        browser.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert overflow(browser) <= 0 and browser.errors() == [], page


def test_paper_gets_everything(browser, report):
    browser.open(report.as_uri())
    before = browser.run("return document.getElementById('page').innerHTML.length")
    pdf = base64.b64decode(browser.command("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and b"/Page" in pdf and len(pdf) > 30_000
    assert browser.errors() == []
    # Afterwards the page is as it was: folded, and one kind of samples at a time.
    assert browser.run("return document.querySelectorAll('details[open]').length") == 0
    assert browser.run("return document.querySelectorAll('.player').length") == 6
    assert abs(browser.run("return document.getElementById('page').innerHTML.length") - before) < 500


def test_a_comparison_lays_curves_over_each_other(browser, report, make_run, tmp_path):
    other = make_run(tmp_path / "other", **{"training.learning_rate": 0.25})
    page = write_comparison([report.parent, other, report.parent], tmp_path / "three.html")
    browser.open(page.as_uri())
    assert browser.errors() == []
    curves = (
        "return [...document.querySelectorAll('figure.chart')].map((one) => one.querySelectorAll('path.line').length)"
    )
    assert set(browser.run(curves)) == {3}
    assert browser.run("return document.querySelector('#settings td').textContent") == "0.001"
    labels = "return [...document.querySelectorAll('#runs tbody th')].map((one) => one.textContent)"
    assert browser.run(labels) == ["demo (1)", "other", "demo (3)"]
    browser.run("document.querySelector('#curves .toolbar button').click()")
    assert set(browser.run(curves)) == {3} and "over steps" in browser.run("return document.body.textContent")


def test_a_crashed_run_has_a_page(browser, make_run, tmp_path):
    run = make_run(tmp_path / "crashed")
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("status.json", "metrics.jsonl"):
            path.unlink()
    (run / "status.json").write_text('{"status": "failed", "reason": "OutOfMemoryError: 80 GiB are not enough"}')
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 5.0}\n{"kind": "tr')
    browser.open(write_report(run).as_uri())
    assert browser.errors() == []
    text = browser.run("return document.getElementById('page').textContent")
    assert "80 GiB are not enough" in text and "Training loss" in text
