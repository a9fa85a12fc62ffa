"""A web page to try a translator: upload a clip, see the skeleton move, read the translation.

Gradio, the extra ``[demo_app]``, does upload and queue. The script of the reports' samples draws the results, in a
sandboxed frame that may run scripts and access nothing else.
"""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from toolkit.decoding.search import Hypothesis
from toolkit.errors import UserError
from toolkit.inference.clip_sources import find_clips
from toolkit.inference.translate_files import translate_clips
from toolkit.models.processor import PoseProcessor, conditions_of
from toolkit.models.translator import PoseTranslator
from toolkit.poses.features import extract_features
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.pose_file import PoseError, RawPose
from toolkit.poses.video import VIDEO_SUFFIXES, check_video_support
from toolkit.reporting.report import render_page
from toolkit.reporting.skeletons import pack_clip, skeleton_layout

if TYPE_CHECKING:
    import gradio

SMOOTH_FPS = 25.0
"""Frames per second of the drawing; the model may read fewer."""
CLIP_BYTES = 1_000_000  # of the landmarks that a browser is sent
WAITING = 16  # visitors in the queue; others see a message to come back later


@dataclass(frozen=True)
class Reading:
    """The translation of one clip, and how sure the model is."""

    text: str  # the translation
    n_best: tuple[Hypothesis, ...]  # other readings, the best first; of the first window of a long clip
    parts: list[tuple[str, float]]  # of the translation, each with its probability (0..1) given what stands before it
    drawing: dict[str, Any]  # ``skeleton`` and ``clip`` for ``skeleton.js``


def accepted_suffixes() -> list[str]:
    """Suffixes of the files that can be read here; videos only where MediaPipe is installed."""
    try:
        check_video_support()
    except UserError:
        return [".pose"]
    return [".pose", *VIDEO_SUFFIXES]


def read_clip_file(
    model: PoseTranslator,
    processor: PoseProcessor,
    path: Path,
    *,
    n_best: int,
    most_seconds: float,
    conditions: Mapping[str, str] | None = None,
) -> Reading:
    """Translate a file that a visitor sent; ``conditions`` are what the visitor says about it.

    Raises:
        UserError: it is no clip, is broken, or is too long; the message names no folder of this machine.
    """
    if path.suffix.lower() not in accepted_suffixes():
        raise UserError(f"{path.name} is no clip", f"send a file that ends in {' or '.join(accepted_suffixes())}")
    (source,) = find_clips([str(path)])
    try:
        clip = source.read()
    except PoseError as error:
        raise UserError(f"{path.name} cannot be used: {error}", "send another recording of the clip") from error
    seconds = clip.num_frames / clip.fps
    if seconds > most_seconds:
        raise UserError(
            f"{path.name} lasts {seconds:,.0f} s and the limit is {most_seconds:,.0f} s", "send a shorter clip"
        )
    beams = max(model.generation_config.num_beams or 1, n_best)
    # Landmarks of a video are found once, because that takes long.
    sources = [replace(source, read=lambda: clip)]
    known = {name: value.strip() for name, value in (conditions or {}).items() if value.strip()}
    (translation,) = translate_clips(model, processor, sources, n_best=n_best, num_beams=beams, conditions=known)
    if translation.reason:
        raise UserError(
            f"{path.name} cannot be translated: {translation.reason}", "send a clip with the signer's hands in view"
        )
    parts = []
    for window in translation.windows:
        if window.hypotheses:
            its_clip = clip.between(window.start, window.end) if len(translation.windows) > 1 else clip
            parts += confidences(model, processor, its_clip, window.hypotheses[0].text, known)
    n_best_readings = next(window.hypotheses for window in translation.windows if window.hypotheses)
    return Reading(translation.text, n_best_readings, parts, draw(processor, clip))


@torch.no_grad()
def confidences(
    model: PoseTranslator,
    processor: PoseProcessor,
    clip: RawPose,
    text: str,
    conditions: Mapping[str, str] | None = None,
) -> list[tuple[str, float]]:
    """How sure the model is of each part of a text, given the clip and the text before it.

    Returns:
        parts that together are the text, each with a probability (0..1). A character of several tokens, as bytes
        are, is one part; its probability is the product of theirs.
    """
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    labels = torch.tensor([tokenizer(text_target=text).input_ids], device=model.device)
    inputs = processor.add_conditions(extractor.pad([extractor.features(clip)]), [conditions or {}]).to(model.device)
    if (first_tokens := inputs.pop("first_tokens", None)) is not None:
        labels[:, 0] = first_tokens
    logits = model(**inputs, labels=labels).logits.float()
    chances = logits.softmax(dim=-1).gather(2, labels[..., None])[0, :, 0].tolist()
    parts: list[tuple[str, float]] = []
    ids = labels[0].tolist()
    done, chance = "", 1.0
    for number, value in enumerate(chances, start=1):
        chance *= value
        decoded = tokenizer.decode(ids[:number], skip_special_tokens=True)
        # A character of which bytes are missing decodes to the replacement character.
        if len(decoded) > len(done) and not decoded.endswith("\ufffd"):
            parts.append((decoded[len(done) :], chance))
            done, chance = decoded, 1.0
    return parts


def draw(processor: PoseProcessor, clip: RawPose) -> dict[str, Any]:
    """The landmarks that the model reads, as smooth as the file has them."""
    extractor = processor.feature_extractor
    landmark_set = LandmarkSet.from_dict(extractor.landmark_set)
    fps = min(clip.fps, SMOOTH_FPS)
    features = extract_features(clip, landmark_set, fps)
    return {
        "skeleton": skeleton_layout(landmark_set),
        "clip": pack_clip(features.values, landmark_set, fps, CLIP_BYTES),
    }


def frame(reading: Reading, name: str) -> str:
    """Skeleton and confidences as an element that a page can hold: a sandboxed frame with a document of its own."""
    content = {"name": name, "parts": [list(part) for part in reading.parts], **reading.drawing}
    document = html.escape(render_page(name, content, script="demo_app.js"), quote=True)
    return f'<iframe title="moving skeleton" class="reading" sandbox="allow-scripts" srcdoc="{document}"></iframe>'


def check_gradio() -> None:
    """Raise UserError where Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo app needs Gradio", "pip install '.[demo_app]' in a clone of the toolkit")


def build_app(
    model: PoseTranslator, processor: PoseProcessor, *, title: str, n_best: int, most_seconds: float
) -> gradio.Blocks:
    """The page, ready to be launched, for a model in evaluation mode on its device.

    It lists ``n_best`` readings of a clip of at most ``most_seconds``.

    Raises:
        UserError: the model reads features of another network, which no visitor has.
    """
    import gradio

    if processor.feature_extractor.num_features:
        raise UserError("the demo app reads poses, and this model features", "translate by launch/translate.py")
    names = conditions_of(processor)

    def translate(upload: str | None, *values: str) -> tuple[str, list[list[Any]], str]:
        if not upload:
            return "", [], ""
        path = Path(upload)
        try:
            conditions = dict(zip(names, values, strict=True))
            reading = read_clip_file(
                model, processor, path, n_best=n_best, most_seconds=most_seconds, conditions=conditions
            )
        except UserError as error:
            # Gradio renders messages as HTML, and a file's name may be anything.
            raise gradio.Error(
                html.escape(f"{error.message}: {error.hint}"), duration=None, print_exception=False
            ) from error
        rows = [[item.text, None if item.score is None else round(item.score, 3)] for item in reading.n_best]
        return reading.text, rows, frame(reading, path.name)

    suffixes = accepted_suffixes()
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as app:
        gradio.Markdown("# Sign language translation")
        gradio.Markdown(
            f"Drop a clip ({', '.join(suffixes)}, at most {most_seconds:,.0f} seconds). "
            "It is deleted within twenty minutes."
        )
        with gradio.Row():
            with gradio.Column():
                known = [gradio.Textbox(label=name.replace("_", " "), elem_id=name) for name in names]
                upload = gradio.File(label="clip", file_types=suffixes, elem_id="clip")
                text = gradio.Textbox(label="translation", interactive=False, lines=2, elem_id="translation")
                others = gradio.Dataframe(
                    headers=["text", "score"],
                    datatype=["str", "number"],
                    label=f"{n_best} best",
                    interactive=False,
                    wrap=True,
                    elem_id="n_best",
                )
            with gradio.Column():
                picture = gradio.HTML(label="clip", elem_id="picture")
        upload.change(translate, [upload, *known], [text, others, picture], api_name="translate", concurrency_limit=1)
    return app.queue(max_size=WAITING)


def serve(app: gradio.Blocks, *, host: str, port: int | None, most_megabytes: float) -> str:
    """Start serving in the background, and return the address; without a port the first free one from 7860 on.

    Raises:
        UserError: the address cannot be used.
    """
    import gradio

    fonts = ["system-ui", "sans-serif"]
    theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = app.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=int(most_megabytes * 1_000_000),
            theme=theme,
            css=".reading { width: 100%; height: 40rem; border: 0; }",
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error}", "give an address of this machine and a free port"
        ) from error
    return str(url)
