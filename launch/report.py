#!/usr/bin/env python
"""Write a run's report again, or compare several runs.

python launch/report.py runs/demo                         writes runs/demo/report.html
python launch/report.py runs/demo runs/demo.1             writes comparison.html, curves in one chart
python launch/report.py runs/a runs/b --out a_and_b.html
python launch/report.py runs/demo --corpus corpora/mine   a run that was copied from another machine

A page is one file that opens in any browser, offline.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from toolkit.errors import UserError, exit_code_of, parsed
from toolkit.reporting.report import COMPARISON, write_comparison, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory; several are compared")
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="where the run's corpus is now (one run)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where a comparison goes (default {COMPARISON})")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parsed(parser.parse_args)
    sys.exit(exit_code_of(lambda: _report(arguments), debug=arguments.debug))


def _report(arguments: argparse.Namespace) -> None:
    if len(arguments.runs) == 1:
        if arguments.out:
            raise UserError(
                "--out is given with one run", "leave --out away: one run's report is written into its folder"
            )
        path = write_report(arguments.runs[0], arguments.corpus)
    else:
        if arguments.corpus:
            raise UserError("--corpus is given with several runs", "leave --corpus away: a comparison shows no clips")
        path = write_comparison(arguments.runs, arguments.out or Path(COMPARISON))
    print(json.dumps({"page": str(path), "bytes": path.stat().st_size}) if arguments.json else path)


if __name__ == "__main__":
    main()
