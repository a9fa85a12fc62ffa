#!/usr/bin/env python
"""How fast a GPU trains here and by other means, on a bare machine that may be there for minutes only.

python benchmarks/gpu.py                     eight minutes, the most important first; nothing is downloaded
python benchmarks/gpu.py --minutes 35        all rows
python benchmarks/gpu.py --only t5_base_128  one of them, even if it is there already
python benchmarks/gpu.py --cpu               toy sizes without a GPU: only to see that the command works

Each row is written to benchmarks/results/gpu.json as soon as it is measured, with the device, torch and the driver. It
ends when the minutes are over, or by SIGINT or SIGTERM: what the last row has measured by then is written. A later call
does the rows that are not there for this device yet, again those that failed or were ended before they were whole, and
last those of which one side failed. What was measured stays until more of a row is there.
Weights are random, of published sizes; clips and sentences are as long as iSign's. Ways of training are processes that
build their model once, those of two rows at the same time where the GPU has the memory, and then take turns: nothing
else runs beside a turn. ``python benchmarks/page.py`` draws what was measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_rows import ROWS, Row
from gpu_training import TRAINED, Processes, Training, opened_together
from sides import begin_again, end_all, ended_after, in_short

RESULTS = HERE / "results" / "gpu.json"
HELD_OUT = 128  # clips of its dev split, and of its test split
SHARE = 0.9  # of a GPU's memory that the sides of two rows may hold
TURNS = 14.0  # seconds of a side's turns, when it is open
ABOUT = {"error", "warning", "ended_after_seconds", "took_seconds", "device", "torch", "driver"}  # are no figures
LONGEST = 1.5  # of the seconds of a row: it hangs, and the others need the time
LATEST = 200.0  # seconds of a start or a turn of one side: so does it


class Measuring:
    """Measures rows of ``gpu.py``, each the next one of ``rows`` that was not measured.

    Processes of two training rows that follow each other start together, where the GPU has the memory for both.
    """

    def __init__(self, rows: Sequence[Row], folder: Path, toy: bool, gib: float) -> None:
        self.rows, self.folder, self.toy, self.gib = list(rows), folder, toy, gib
        self.opened: dict[str, Processes] = {}

    def __call__(self, row: Row, seconds: float) -> dict[str, Any]:
        """A row; or what of it was measured before a signal came, or so many seconds or far too many were over."""
        began, opening = time.monotonic(), self._opening(row, seconds)
        limit = seconds if self.toy else min(seconds, LONGEST * sum(each.seconds for each in opening))
        with ended_after(limit) as is_over:
            try:
                found = self._measured(row, opening)
            except (Exception, SystemExit):
                if not is_over.is_set():
                    raise
                found = {}
        if is_over.is_set():
            self.close()
            begin_again()
            found["ended_after_seconds"] = round(time.monotonic() - began)
        return found

    def _measured(self, row: Row, opening: Sequence[Row]) -> dict[str, Any]:
        if not isinstance(row.measure, Training):
            return row.measure(self.folder, self.toy)
        began, more = time.monotonic(), {}
        if row.name not in self.opened:
            ways = {each.name: each.measure for each in opening if isinstance(each.measure, Training)}
            opened = opened_together([*ways.values()], self.folder, self.toy, None if self.toy else LATEST)
            self.opened |= dict(zip(ways, opened, strict=True))
            more = {"opened_in_seconds": round(time.monotonic() - began, 1)}
        processes = self.opened.pop(row.name)
        with processes.stack:
            return row.measure.measure(processes, self.toy) | more

    def _opening(self, row: Row, seconds: float) -> list[Row]:
        """A row and, where the GPU has the memory for both, the training row after it, which starts with it."""
        pair = self.rows[self.rows.index(row) :][:2]
        training = [each.measure for each in pair if isinstance(each.measure, Training)]
        is_room = sum(each.gib for each in training) <= SHARE * self.gib
        is_time = sum(each.seconds for each in pair) <= seconds
        is_new = row.name not in self.opened and not self.toy
        return pair if len(training) == 2 and is_room and is_time and is_new else [row]

    def seconds(self, row: Row) -> float:
        """How long a row takes from now on."""
        return TURNS * len(self.opened[row.name].commands) if row.name in self.opened else row.seconds

    def close(self) -> None:
        """End the processes of rows for which no time was left."""
        for processes in self.opened.values():
            processes.stack.close()
        self.opened.clear()


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="default 8")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="ROW", help="these rows again")
    parser.add_argument("--cpu", action="store_true", help="toy sizes; writes no results unless --results names a file")
    parser.add_argument("--results", type=Path, default=None, help=f"default {RESULTS.relative_to(HERE.parent)}")
    arguments = parser.parse_args()
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    device, gib = machine(arguments.cpu)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = arguments.results or (folder / "gpu.json" if arguments.cpu else RESULTS)
        rows = [row for row in ROWS if not arguments.only or row.name in arguments.only]
        rows = rows if arguments.only else missing(rows, read(path), device)
        prepare(folder, arguments.cpu)
        stop.is_taking = True
        with closing(Measuring(rows, folder, arguments.cpu, gib)) as measure:
            left = take(rows, path, device, began + 60 * arguments.minutes, measure, stop=stop)
    if stop.name:
        sys.exit(f"stopped by {stop.name}; the same command does the rows that are missing")
    for name in left:
        print(f"left for the next call: {name}")


class Stop:
    """Handler of the signals that end the command: the row that is being measured ends at once, and is written.

    Attributes:
        name: of the signal that came.
        is_taking: whether rows are being measured; before them there is nothing to write.
    """

    def __init__(self) -> None:
        self.name = ""
        self.is_taking = False

    def __call__(self, number: int, _: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # `timeout` and a terminal send it to each process of a group
        self.name = signal.Signals(number).name
        if not self.is_taking:
            sys.exit(f"stopped by {self.name} before a row was measured")
        end_all()  # threads that wait for processes return when these have ended


def machine(cpu: bool) -> tuple[dict[str, str], float]:
    """What the rows are measured on, and the GiB of its memory."""
    import torch

    if cpu:
        return {"device": "a CPU, toy sizes", "torch": torch.__version__, "driver": "none"}, 0.0
    if not torch.cuda.is_available():
        sys.exit("error: no GPU is visible\nhint: --cpu tries the command at toy sizes")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ""
    driver = answer.split("\n")[0].strip() or "unknown"
    found = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "driver": driver}
    return found, torch.cuda.get_device_properties(0).total_memory / 2**30


def prepare(folder: Path, toy: bool) -> None:
    """The corpus and the tokenizer that all rows share."""
    from training_corpus import make_corpus

    from toolkit.models.tokenizers import make_tokenizer

    held_out = 16 if toy else HELD_OUT
    clips = (64 if toy else TRAINED) + 2 * held_out
    texts = make_corpus(folder / "corpus", clips, held_out=held_out, names=("dev", "test")).splits["train"].texts
    make_tokenizer("train", texts).save_pretrained(folder / "tokenizer")


def read(path: Path) -> dict[str, Any]:
    """The rows that were written; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def missing(rows: Sequence[Row], results: dict[str, Any], device: dict[str, str]) -> list[Row]:
    """Rows that are not there for this device, failed or were ended; and last those of which a side failed."""

    def what_is_there(row: Row) -> int:
        found = results.get(row.name, {})
        if found.get("device") != device["device"] or "error" in found or "ended_after_seconds" in found:
            return 0
        return 2 if is_whole(found) else 1

    there = {row.name: what_is_there(row) for row in rows}
    return [row for number in (0, 1) for row in rows if there[row.name] == number]


def take(
    rows: Sequence[Row],
    path: Path,
    device: dict[str, str],
    ends: float,
    measure: Measuring,
    *,
    stop: Stop | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Measure rows in their order, as far as the time goes, and write each as it comes.

    A row that fails is written with its error, and one that was ended with what it has, unless more of it is there.

    Args:
        rows: to be measured.
        path: of the results.
        device: what they are measured on.
        ends: when the time is over, by the clock.
        measure: measures them.
        stop: says when a signal has ended the row; no other is begun.
        clock: seconds.

    Returns:
        names of the rows for which no time was left.
    """
    left = []
    for row in rows:
        if (stop and stop.name) or clock() + measure.seconds(row) > ends:
            left.append(row.name)
            continue
        started = clock()
        try:
            found = measure(row, ends - started)
        except (Exception, SystemExit) as error:
            found = {"error": f"{type(error).__name__}: {in_short(error)}"}
        found |= {"took_seconds": round(clock() - started, 1)} | device
        print(row.name, json.dumps(found), flush=True)
        results = read(path)
        there = results.get(row.name, {})
        if there.get("device") == device["device"] and not is_whole(found) and figures_in(there) > figures_in(found):
            print(f"{row.name}: more was measured before, which stays", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results | {row.name: found}, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    return left


def is_whole(row: dict[str, Any]) -> bool:
    """Whether a row was measured to its end, with all of its sides."""
    parts = [row, *row.get("sides", {}).values()]
    return bool(row) and "ended_after_seconds" not in row and not any("error" in part for part in parts)


def figures_in(row: dict[str, Any]) -> int:
    """How many figures of a row, or of its sides, were measured."""
    parts = row["sides"].values() if "sides" in row else [row]
    return sum(key not in ABOUT for part in parts for key in part)


if __name__ == "__main__":
    main()
