#!/usr/bin/env python
"""Translate clips: poses or videos in, text out.

python launch/translate.py --model runs/demo clip.pose                    the text
python launch/translate.py --model runs/demo clips/ archive.zip           one line a clip: name, tab, text
python launch/translate.py --model runs/demo archive.zip:day1/clip.pose   one member of an archive
python launch/translate.py --model runs/demo long.pose --srt long.srt     a recording of hours, as subtitles
python launch/translate.py --model runs/demo clip.mp4                     a video (needs the extra [video])
python launch/translate.py --model runs/i3d clip.npy                      features, for a model that reads these alone
python launch/translate.py --model runs/both clips/ --features features/  poses and features, for one that reads both
cat clip.pose | python launch/translate.py --model runs/demo - --json     from a pipe, with all details

A clip longer than the model reads is split into overlapping windows; each gets its own line, with its time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from toolkit.errors import TooManyRejects, UserError, exit_code_of, parsed

if TYPE_CHECKING:
    from toolkit.inference.clip_sources import ClipSource
    from toolkit.inference.translate_files import Translation


# What a user may say about the clips, if the model was trained with it.
CONDITIONS = {
    "language": "sign language of the clips",
    "target_language": "language of the texts, as the model's tokenizer writes it (hi_IN, hin_Deva)",
    "prompt": "a prompt, if the model was trained with prompts",
    "context": "what is known from elsewhere, such as the sentence before",
}


def main() -> None:
    arguments = parsed(parse)
    sys.exit(exit_code_of(lambda: run(arguments), debug=arguments.debug))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a run directory, a model folder or a hub id")
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="file, folder, zip, tar, archive.zip:member, or -")
    parser.add_argument("--fps", type=float, metavar="N", help="frames per second of the clips, when files are wrong")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="PLACE",
        help="features of the clips, for a model that reads poses and features",
    )
    parser.add_argument("--features-fps", type=float, metavar="N", help="frames per second of features")
    parser.add_argument("--num-beams", type=int, metavar="N", help="beams of the search (default: the model's own)")
    parser.add_argument("--n-best", type=int, default=1, metavar="N", help="print N texts a clip, with their scores")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest text (default: the model's own)")
    parser.add_argument("--batch-frames", type=int, metavar="N", help="frames translated together (default: what fits)")
    parser.add_argument(
        "--window",
        type=float,
        metavar="SECONDS",
        help="split longer clips into windows of this length; 0 splits none (default: the longest of the model)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        metavar="SECONDS",
        help="least overlap of windows (default 4, at most a quarter of a window)",
    )
    for name, meaning in CONDITIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=meaning)
    parser.add_argument("--srt", type=Path, metavar="FILE.srt", help="write subtitles of the one clip")
    parser.add_argument("--vtt", type=Path, metavar="FILE.vtt", help="write subtitles of the one clip, for browsers")
    parser.add_argument(
        "--max-rejects",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="largest share of unusable clips (default 0.01); beyond it the exit code is 3",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(
        # `*.pose` in a folder of YouTube's clips gives names such as --7E2sU6zP4.pose, which are no options.
        [f"./{word}" if word[:1] == "-" != word and os.path.exists(word) else word for word in sys.argv[1:]]
    )
    for name in ("num_beams", "n_best", "max_new_tokens", "batch_frames"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.num_beams and arguments.n_best > arguments.num_beams:
        parser.error(f"--n-best {arguments.n_best} needs at least as many beams: --num-beams {arguments.n_best}")
    if arguments.fps is not None and not 1 <= arguments.fps <= 1000:
        parser.error("--fps is frames per second: 1 to 1000")
    if not 0 <= arguments.max_rejects <= 1:
        parser.error("--max-rejects is a share: 0 to 1")
    for name in ("srt", "vtt"):
        path = getattr(arguments, name)
        if path and path.suffix.lower() != f".{name}":
            parser.error(f"--{name} wants a file whose name ends in .{name}, not {path}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Wrong names are found before the model is loaded, which takes seconds."""
    from toolkit.files import check_place
    from toolkit.inference.clip_sources import find_clips
    from toolkit.poses.video import check_video_support

    sources = find_clips(arguments.clips, arguments.fps)
    if (arguments.srt or arguments.vtt) and len(sources) != 1:
        raise UserError(f"--srt and --vtt are for one clip, and there are {len(sources):,}", "translate it alone")
    for path in filter(None, (arguments.srt, arguments.vtt)):
        check_place(path.parent, f"--{path.suffix[1:].lower()} {path}", "give a file in another folder")
    if any(source.is_video for source in sources):
        check_video_support()

    from toolkit.cluster.memory_shortage import explained_shortage

    what = f"--model {arguments.model}"
    with explained_shortage(what, "add --num-beams 1, a lower --window, or --device cpu"):
        translate(arguments, sources)


def translate(arguments: argparse.Namespace, sources: list[ClipSource]) -> None:
    """Load the model, translate the clips and print their texts."""
    from toolkit.inference.clip_sources import with_features

    model, processor = load(arguments)
    sources = with_features(sources, processor.feature_extractor, arguments.features, arguments.features_fps)
    conditions = given_conditions(arguments, processor)
    from toolkit.inference.translate_files import Windowing, translate_clips

    search: dict[str, Any] = {}
    if arguments.max_new_tokens:
        search["max_new_tokens"] = arguments.max_new_tokens
    beams = arguments.num_beams or max(model.generation_config.num_beams or 1, arguments.n_best)
    start = time.perf_counter()
    translations = translate_clips(
        model,
        processor,
        sources,
        windowing=Windowing(arguments.window, arguments.overlap),
        n_best=arguments.n_best,
        batch_frames=arguments.batch_frames or fitting_frames(model, processor, beams, arguments.max_new_tokens),
        num_beams=beams,
        conditions=conditions,
        **search,
    )
    rejects: list[Translation] = []
    done: list[dict[str, Any]] = []
    for translation in watched(translations, len(sources)):
        if translation.reason:
            rejects.append(translation)
            if len(sources) > 1:
                hint = f"\nhint: {translation.hint}" if translation.hint else ""
                print(f"rejected: {translation.where}: {translation.reason}{hint}", file=sys.stderr, flush=True)
        elif arguments.json:
            done.append(as_json(translation))
        else:
            print(as_lines(translation, several=len(sources) > 1, n_best=arguments.n_best), flush=True)
        write_subtitles(translation, arguments)
    if arguments.json:
        rejected = [{"uid": item.uid, "source": item.where, "reason": item.reason} for item in rejects]
        seconds = round(time.perf_counter() - start, 3)
        print(json.dumps({"translations": done, "rejects": rejected, "clips": len(sources), "seconds": seconds}))
    if len(sources) == 1 and rejects:
        raise UserError(f"{rejects[0].where}: {rejects[0].reason}", rejects[0].hint or "replace the file")
    if len(rejects) > arguments.max_rejects * len(sources):
        raise TooManyRejects(
            f"{len(rejects):,} of {len(sources):,} clips could not be translated (listed above; all others are done)",
            f"correct them, or allow more by --max-rejects {len(rejects) / len(sources):.2g}",
        )


def given_conditions(arguments: argparse.Namespace, processor: Any) -> dict[str, str]:
    """What the command line says about the clips.

    Raises:
        UserError: the model was not trained with it.
    """
    from toolkit.models.processor import conditions_of

    given = {name: value for name in CONDITIONS if (value := getattr(arguments, name))}
    known = conditions_of(processor)
    for name in given:
        if name not in known:
            options = ", ".join(f"--{item.replace('_', '-')}" for item in known)
            raise UserError(
                f"--{name.replace('_', '-')}: the model was trained without a {name.replace('_', ' ')} of each clip",
                f"give one of {options}, or none" if options else "leave it out",
            )
    return given


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, on its device, and its processor."""
    from toolkit.cluster.devices import choose_device
    from toolkit.cluster.logs import show_errors_only
    from toolkit.cluster.memory_shortage import is_out_of_memory
    from toolkit.models.loading.load import load_translator

    show_errors_only()
    device = choose_device(arguments.device)
    model, processor = load_translator(arguments.model)
    try:
        return model.to(device), processor
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(  # torch was built without it
            f"--device {device}: {str(error).splitlines()[0]}", "give another device, --device cpu for instance"
        ) from error


def fitting_frames(model: Any, processor: Any, beams: int, max_new_tokens: int | None) -> int:
    """Frames that are translated together, of the longest clips or of short ones, for which the device has room."""
    import numpy as np

    from toolkit.inference.translate_files import BATCH_FRAMES, MOST_CLIPS_OF_A_BATCH
    from toolkit.planning.memory import fitting_batch_frames

    longest = max(1, min(processor.feature_extractor.max_frames or BATCH_FRAMES, BATCH_FRAMES))
    clips = [longest] * (BATCH_FRAMES // longest) + [BATCH_FRAMES // MOST_CLIPS_OF_A_BATCH] * MOST_CLIPS_OF_A_BATCH
    return fitting_batch_frames(
        model,
        next(model.parameters()).device,
        frames=np.array(clips),
        most=BATCH_FRAMES,
        beams=beams,
        max_new_tokens=max_new_tokens or model.generation_config.max_new_tokens,
    )


def watched(translations: Iterable[Translation], total: int) -> Iterator[Translation]:
    """The same, with a progress bar on standard error once it takes long."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    interval = 0.5 if sys.stderr.isatty() else 10.0
    yield from tqdm(translations, total=total, unit=" clips", delay=3, mininterval=interval, disable=total == 1)


def as_lines(translation: Translation, *, several: bool, n_best: int) -> str:
    """One line for each window and hypothesis; the clip and the time only where there are several."""
    from toolkit.corpus.names import one_line
    from toolkit.inference.subtitles import timestamp

    lines = []
    for window, text in zip(translation.windows, translation.texts, strict=True):
        first = [one_line(translation.uid)] if several else []
        if len(translation.windows) > 1:
            first += [timestamp(window.start), timestamp(window.end)]
        if n_best == 1:
            lines.append([*first, one_line(text)])
        else:
            lines += [[*first, _number(found.score), one_line(found.text)] for found in window.hypotheses]
    return "\n".join("\t".join(line) for line in lines)


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"


def as_json(translation: Translation) -> dict[str, Any]:
    """One clip of the JSON object."""
    windows = [
        {
            "start": round(window.start, 3),
            "end": round(window.end, 3),
            "text": text,
            "n_best": [{"text": found.text, "score": found.score} for found in window.hypotheses],
            **({"reason": window.reason} if window.reason else {}),
        }
        for window, text in zip(translation.windows, translation.texts, strict=True)
    ]
    return {"uid": translation.uid, "source": translation.where, "text": translation.text, "windows": windows}


def write_subtitles(translation: Translation, arguments: argparse.Namespace) -> None:
    """The subtitle files that were asked for."""
    if translation.reason or not (arguments.srt or arguments.vtt):
        return
    from toolkit.files import write_text_atomically
    from toolkit.inference.subtitles import to_srt, to_vtt

    for path, make in ((arguments.srt, to_srt), (arguments.vtt, to_vtt)):
        if path:
            write_text_atomically(path, make(translation))


if __name__ == "__main__":
    main()
