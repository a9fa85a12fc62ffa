#!/usr/bin/env python
"""Turn a table, pose files and feature files into a packed corpus that training maps into memory.

python launch/prepare.py --recipe demo                                        what this recipe will train on
python launch/prepare.py --table T.csv --poses DIR --out corpora/mine         my own data
python launch/prepare.py --source isign --table iSign_v1.1.csv --poses POSES --out corpora/isign
python launch/prepare.py --source how2sign --table 'how2sign_{split}.csv' --poses POSES --out corpora/how2sign
python launch/prepare.py --source phoenix14t --table annotations/manual --poses POSES --out corpora/phoenix
python launch/prepare.py --table T.jsonl --poses POSES.zip --columns uid=id,text=sentence --json
python launch/prepare.py ... --out corpora/isign --shard 3/16          one of 16 jobs; the last one makes the corpus
python launch/prepare.py ... --out corpora/isign --ray head-node:6379  on all machines of a Ray cluster
python launch/prepare.py show corpora/mine UID --poses DIR                    one clip as an animation, UID.gif

Without --out the corpus goes to the cache, where a recipe with the same settings finds it. Training reads it by
data.corpus=OUT. The same command resumes an interrupted preparation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from pydantic import ValidationError

from toolkit.corpus.archives.files import open_poses
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import Prepared, find_or_prepare, prepare
from toolkit.corpus.published.presets import presets
from toolkit.corpus.show import animate
from toolkit.errors import UserError, exit_code_of, parsed
from toolkit.recipe.load import load_recipe
from toolkit.recipe.schema import Data

# Options that are settings of the same name in the section `data` of a recipe.
SETTINGS = {
    "table": (str, "CSV, TSV or JSONL with a line for each clip; {split} in its name: a table for each split"),
    "poses": (str, "where the pose files are"),
    "features": (str, "where the feature files of another network are, besides the poses or instead of them"),
    "features_fps": (float, "frames per second of the features (default: as the table or the files say)"),
    "landmarks": (str, "landmark set: name or YAML file"),
    "fps": (float, "frames per second after resampling"),
    "max_frames": (int, "longest clip, in frames after resampling"),
    "min_frames": (int, "shortest clip, in frames after resampling"),
    "too_long": (str, "treatment of longer clips: `subsample`, `cut` (the end off) or `reject`"),
    "no_hands": (str, "treatment of clips of which no frame shows a hand: keep or reject"),
    "shared_texts": (
        str,
        "treatment of held-out clips whose text is in train: keep, remove, or remove_near (nearly the same text, too)",
    ),
    "time_unit": (str, "unit of the columns start and end: seconds, milliseconds or frames"),
    "split_by": (str, "what no two splits share: as the table says, `video`, or `signer`"),
    "dev_share": (float, "share of the clips in dev, by source video or signer"),
    "test_share": (float, "share of the clips in test, by source video or signer"),
    "split_seed": (int, "seed of the random choice of videos"),
    "max_rejects": (
        float,
        "largest share of unusable clips; above it nothing is written and the exit code is 3",
    ),
    "cache": (str, "folder of prepared corpora, used without --out"),
    "workers": (int, "processes; 0 = all cores"),
}

SHOW_OPTIONS = ("-h", "--help", "--poses", "--out", "--debug")


def main() -> None:
    if sys.argv[1:2] == ["show"]:
        arguments = parsed(lambda: _parse_show(sys.argv[2:]))
        sys.exit(exit_code_of(lambda: _show(arguments), debug=arguments.debug))
    arguments = parsed(_parse)
    sys.exit(exit_code_of(lambda: _prepare(arguments), debug=arguments.debug))


def _parse_show(command_line: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare.py show", description="Draw a clip as a model sees it, and with --poses beside it as recorded."
    )
    parser.add_argument("corpus", metavar="CORPUS", help="folder of a prepared corpus")
    parser.add_argument("uid", metavar="UID", help="name of the clip")
    parser.add_argument("--poses", type=Path, metavar="WHERE", help="the poses that the corpus was made from")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the GIF to write (default: UID.gif here)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(_uids_last(command_line))


def _uids_last(command_line: list[str]) -> list[str]:
    """``argparse`` takes uids that begin with ``-``, as YouTube's ids may, for options unless ``--`` precedes them."""

    def is_uid(word: str) -> bool:
        option = word.partition("=")[0]
        return word.startswith("-") and not any(known.startswith(option) for known in SHOW_OPTIONS)

    if "--" in command_line or not any(map(is_uid, command_line)):
        return command_line
    return [*(word for word in command_line if not is_uid(word)), "--", *filter(is_uid, command_line)]


def _show(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path(Path(arguments.uid).name + ".gif")
    animate(Corpus.open(arguments.corpus), arguments.uid, out, open_poses(arguments.poses) if arguments.poses else None)
    print(out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", metavar="NAME", help="take the settings from a recipe; the options below change them"
    )
    parser.add_argument(
        "--source", choices=["demo", "table", *presets()], help="demo, or the public corpus whose table it is"
    )
    defaults = Data()
    for name, (kind, meaning) in SETTINGS.items():
        default = getattr(defaults, name)
        text = meaning if default is None else f"{meaning} (default {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    parser.add_argument(
        "--columns", metavar="OURS=THEIRS,...", help="column names that differ from uid, text, video ..."
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the corpus goes (default: the cache)")
    parser.add_argument(
        "--shard", metavar="K/N", help="build the K-th of N shares; another job builds each of the others"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="prepare on the Ray cluster whose head is HOST:PORT, or auto")
    parser.add_argument("--replace", action="store_true", help="replace the corpus that --out holds already")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments, rest = parser.parse_known_args()
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest and not arguments.recipe:
        parser.error(f"{rest[0]}: key=value changes a recipe, and no --recipe is given")
    arguments.overrides = rest
    return arguments


def _settings(arguments: argparse.Namespace) -> Data:
    """The section `data` of the recipe, or the defaults, overridden by the command line.

    Raises:
        UserError: a value is out of bounds.
    """
    base = load_recipe(arguments.recipe, arguments.overrides).data if arguments.recipe else Data()
    given: dict[str, Any] = {
        name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None
    }
    columns = _columns(arguments.columns) if arguments.columns else {}
    if arguments.source:
        given["source"] = arguments.source
    if columns:
        given["columns"] = columns
    try:
        return Data(**(base.model_dump() | given))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # raised by a validator of the schema, with its hint
            message, hint = first["ctx"]["error"].args
            raise UserError(message, hint) from error
        where = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "the options"
        raise UserError(f"{where}: {first['msg']}", "see python launch/prepare.py --help") from error


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.split("=", 1) for pair in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise UserError(f"--columns {text}: not a list of pairs", "write --columns OURS=THEIRS,OURS=THEIRS")
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}


def _share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard {text}: not a share", "write K/N with K from 1 to N, for instance 3/16")
    return int(number), int(count)


def _prepare(arguments: argparse.Namespace) -> None:
    data = _settings(arguments)
    share = _share(arguments.shard) if arguments.shard else (1, 1)
    if arguments.shard and arguments.ray:
        raise UserError("--shard and --ray are two ways to use many machines", "give one of them")
    if arguments.out:
        prepared = prepare(data, arguments.out, replace=arguments.replace, share=share, ray=arguments.ray)
    elif arguments.shard:
        raise UserError("--shard needs --out", "add --out FOLDER, the same folder for all shares")
    else:
        prepared = find_or_prepare(data, ray=arguments.ray)
    if prepared.missing_shards:
        _print_share(arguments, prepared)
        return
    summary = Corpus.open(prepared.path).summary() | {"clips_per_second": prepared.clips_per_second}
    if arguments.json:
        print(json.dumps(summary))
    else:
        _print_summary(prepared, summary)


def _print_summary(prepared: Prepared, summary: dict[str, Any]) -> None:
    speed = f", {prepared.clips_per_second:,.0f} clips/s" if prepared.clips_per_second else " (was there already)"
    size = f"{summary['clips']:,} clips, {summary['frames']:,} frames, {summary['bytes'] / 1e6:,.1f} MB"
    print(f"{prepared.path}: {size}{speed}")
    print("  splits   " + ", ".join(f"{name} {clips:,}" for name, clips in summary["splits"].items()))
    print(
        f"  rejects  {summary['rejects']:,}"
        + (f", listed in {prepared.path / 'rejects.csv'}" if summary["rejects"] else "")
    )
    for title, values in (("counts", summary["counts"]), ("leakage", summary["leakage"])):
        notable = [f"{name.replace('_', ' ')} {value:,}" for name, value in values.items() if value]
        print(f"  {title:7}  " + (", ".join(notable) or "none"))
    if summary["lacking"]:
        names = list(summary["lacking"])
        few = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        print(f"  lacking  {len(names)} landmarks of the set are not in the files: {few}")


def _print_share(arguments: argparse.Namespace, prepared: Prepared) -> None:
    if arguments.json:
        report = {"path": str(prepared.path), "shard": arguments.shard, "missing_shards": prepared.missing_shards}
        print(json.dumps(report | {"clips_per_second": prepared.clips_per_second}))
        return
    print(
        f"share {arguments.shard} of {prepared.path} is done; shards of other shares that are missing: "
        f"{prepared.missing_shards}. The job that builds the last of them completes the corpus"
    )


if __name__ == "__main__":
    main()
