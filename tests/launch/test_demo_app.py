"""The demo app, started by its command and used in headless Chromium; and what it computes, on small models."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, T5Config

from tests.small_configs import T5, translator_config
from tests.time_limits import limit
from toolkit.corpus.demo import DemoSizes, make_demo
from toolkit.errors import UserError
from toolkit.inference.demo_app import Reading, accepted_suffixes, confidences, frame, read_clip_file
from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.features import read_clip
from toolkit.poses.landmarks import load_landmark_set

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "demo_app.py"
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio, the extra [demo_app], is not installed"
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    folder = make_demo(tmp_path_factory.mktemp("demo") / "clips", DemoSizes(2, 1, 1, 1))
    return sorted((folder / "poses").iterdir())


@pytest.fixture(scope="module")
def translator() -> tuple[PoseTranslator, PoseProcessor]:
    """Untrained, which is all that a page needs."""
    torch.manual_seed(3)
    landmark_set = load_landmark_set("hands_body_50")
    model = PoseTranslator(translator_config(T5Config(**T5))).eval()
    model.generation_config.max_new_tokens = 6
    extractor = PoseFeatureExtractor(landmark_set=landmark_set.to_dict(), max_frames=64)
    return model, PoseProcessor(extractor, make_tokenizer("bytes"))


@pytest.fixture(scope="module")
def language_model() -> tuple[PoseTranslator, PoseProcessor]:
    """The same with a language model, which reads words before and behind the poses."""
    torch.manual_seed(3)
    landmark_set = load_landmark_set("hands_body_50")
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 30}
    words = {"prefix_token_ids": [5, 6, 7], "suffix_token_ids": [8]}
    model = PoseTranslator(translator_config(Qwen2Config(**sizes, **heads, **ids), **words)).eval()
    model.generation_config.update(max_new_tokens=6, pad_token_id=0, eos_token_id=1)
    extractor = PoseFeatureExtractor(landmark_set=landmark_set.to_dict(), max_frames=64)
    return model, PoseProcessor(extractor, make_tokenizer("bytes"))


every_kind = pytest.mark.parametrize("kind", ["translator", "language_model"])


@every_kind
@pytest.mark.parametrize("text", ["word", "für मौसम 今天 😀", ""])
def test_confidences_belong_to_whole_characters(kind, clips, text, request):
    model, processor = request.getfixturevalue(kind)
    clip = read_clip(clips[0].read_bytes())
    parts = confidences(model, processor, clip, text)
    assert "".join(part for part, _ in parts) == text and len(parts) == len(text)
    assert all(0 < chance < 1 for _, chance in parts)
    # The same, from the probability of the text as a whole.
    labels = torch.tensor([processor.tokenizer(text_target=text).input_ids])
    inputs = processor.feature_extractor.pad([processor.feature_extractor.features(clip)])
    with torch.no_grad():
        logits = model(**inputs, labels=labels).logits.log_softmax(-1)
    chosen = logits.gather(2, labels[..., None])[0, :-1].sum()  # without the end
    product = torch.tensor([chance for _, chance in parts]).log().sum()
    assert product == pytest.approx(float(chosen), rel=1e-4)


@every_kind
def test_long_clips_are_read_in_windows(kind, clips, request):
    model, processor = request.getfixturevalue(kind)
    longest = max(clips, key=lambda path: path.stat().st_size)
    reading = read_clip_file(model, processor, longest, n_best=3, most_seconds=300)
    assert len(reading.n_best) == 3 and reading.drawing["clip"]["frames"] > 64
    assert reading.drawing["skeleton"]["points"] == 50


def test_what_visitors_send_may_be_anything(translator, clips, tmp_path):
    model, processor = translator
    broken = tmp_path / "broken.pose"
    broken.write_bytes(clips[0].read_bytes()[:5000])
    other = tmp_path / "x.zip"
    other.write_bytes(b"PK")
    cases = [
        (broken, "broken.pose", 300),
        (other, "x.zip", 300),
        (clips[0], "1 s", 1),
    ]
    for path, complaint, most_seconds in cases:
        with pytest.raises(UserError, match=re.escape(complaint)) as error:
            read_clip_file(model, processor, path, n_best=1, most_seconds=most_seconds)
        assert str(path.parent) not in str(error.value) and "\n" not in str(error.value)
    assert accepted_suffixes()[0] == ".pose"


def test_the_frame_keeps_its_document_to_itself():
    name = '"></iframe><script>alert(1)</script>'
    drawing = {"skeleton": {"points": 0, "parts": {}, "edges": []}, "clip": {"frames": 1, "data": ""}}
    markup = frame(Reading("x", (), [("<b>", 0.5)], drawing), name)
    assert markup.count("<") == 2 and 'sandbox="allow-scripts"' in markup


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def test_mistakes_are_a_message_and_a_hint(tmp_path):
    cases = [["--model", tmp_path], ["--model", "x", "--port", "0"], ["--model", "x", "--max-seconds", "-1"]]
    for arguments in cases:
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=limit(120))
        *_, last = done.stderr.rpartition("error: ")
        assert done.returncode == 2 and "error: " in done.stderr and len(last.strip().splitlines()) <= 2


@pytest.fixture(scope="module")
def address(translator, tmp_path_factory) -> Iterator[str]:
    """A running app, which takes 1 MB a clip."""
    folder = tmp_path_factory.mktemp("model") / "best"
    for part in translator:
        part.save_pretrained(folder)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = folder.parent / "log.txt"
    with log.open("w") as file:
        app = subprocess.Popen(
            command("--model", folder, "--port", port, "--n-best", 3, "--max-megabytes", 1),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"GRADIO_TEMP_DIR": str(folder.parent / "uploads"), "HF_HUB_OFFLINE": "1"},
        )
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"^(http://\S+) serves", log.read_text(), re.MULTILINE)):
            assert app.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield found[1]
    finally:
        app.terminate()
        app.wait(30)


def sent(browser, address: str, path: Path) -> None:
    """Drop a file onto the page."""
    browser.open(address)
    chooser = "#clip input[type=file]"
    field = browser.wait_for(lambda: browser.driver.find_elements("css selector", chooser), "the field for the clip")
    field[0].send_keys(str(path))


@needs_gradio
def test_a_dropped_clip_moves_and_is_translated(browser, address, clips):
    small = min(clips, key=lambda path: path.stat().st_size)
    assert small.stat().st_size < 1_000_000
    sent(browser, address, small)
    table = "return document.querySelector('#n_best').innerText"
    browser.wait_for(lambda: len(re.findall(r"-\d+\.\d+", browser.run(table))) >= 3, "three readings with scores")
    frames = browser.wait_for(lambda: browser.driver.find_elements("css selector", "iframe.reading"), "the skeleton")
    browser.driver.switch_to.frame(frames[0])
    try:
        picture = "return document.querySelector('canvas').toDataURL()"
        before = browser.wait_for(lambda: browser.run(picture), "a drawn skeleton")
        browser.wait_for(lambda: browser.run(picture) != before, "a moved skeleton")
        parts = browser.run("return [...document.querySelectorAll('.part small')].map((one) => one.textContent)")
    finally:
        browser.driver.switch_to.default_content()
    assert all(re.fullmatch(r"\d+ %", part) for part in parts)
    assert [message for message in browser.errors() if address in message] == []


@needs_gradio
def test_a_broken_clip_is_refused_in_words(browser, address, tmp_path):
    broken = tmp_path / "<img src=x onerror=alert(1)>.pose"
    broken.write_bytes(b"this is no pose")
    sent(browser, address, broken)
    shown = "return [...document.querySelectorAll('.toast-body')].map((toast) => toast.innerText).join()"
    assert "cannot be used" in browser.wait_for(lambda: browser.run(shown), "a message")
    assert browser.run("return document.querySelectorAll('.toast-body img').length") == 0


@needs_gradio
def test_an_upload_is_bounded(browser, address, tmp_path):
    large = tmp_path / "large.pose"
    large.write_bytes(bytes(2_000_000))
    sent(browser, address, large)
    shown = "return [...document.querySelectorAll('.toast-body')].map((toast) => toast.innerText).join()"
    assert "size" in browser.wait_for(lambda: browser.run(shown), "a message")


@needs_gradio
def test_only_this_machine_is_served(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    assert address.startswith("http://127.0.0.1:")
    with socket.socket() as elsewhere:
        # Another address of this machine; a server for the whole network would answer there.
        assert elsewhere.connect_ex(("127.0.0.2", port)) != 0
