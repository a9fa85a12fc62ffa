#!/usr/bin/env python
"""Show what works on this machine, or build DeepSpeed's C++ ops before the first run.

python launch/doctor.py                          versions, devices, and a list of what works
python launch/doctor.py --json                   the same as one JSON object
python launch/doctor.py build-ops                what this machine needs, in one process
python launch/doctor.py build-ops cpu_adam async_io
python launch/doctor.py build-ops --force        from scratch, after a build was killed
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from toolkit.cluster.checks import examine
from toolkit.cluster.environment import describe_environment
from toolkit.cluster.ops import ARCHITECTURES, OPS, build_ops, use_extensions_dir
from toolkit.errors import exit_code_of, parsed

MARKS = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command")
    build = commands.add_parser("build-ops", help="build DeepSpeed's C++ ops in one process")
    build.add_argument("names", nargs="*", metavar="OP", help=f"{', '.join(OPS)}; default: shm_comm")
    build.add_argument("--force", action="store_true", help="remove what a killed build left and build from scratch")
    arguments = parsed(parser.parse_args)
    architectures = os.environ.get(ARCHITECTURES, "")
    use_extensions_dir()
    is_build = arguments.command == "build-ops"
    command = (lambda: _build(arguments)) if is_build else (lambda: _report(architectures, as_json=arguments.json))
    sys.exit(exit_code_of(command, debug=arguments.debug))


def _build(arguments: argparse.Namespace) -> None:
    # Under --json stdout holds the one object alone.
    stream = sys.stderr if arguments.json else sys.stdout
    seconds = build_ops(
        arguments.names or ["shm_comm"], force=arguments.force, echo=lambda line: print(line, file=stream, flush=True)
    )
    if arguments.json:
        print(json.dumps({"ops": {name: round(value, 1) for name, value in seconds.items()}}))


def _report(architectures: str, *, as_json: bool) -> None:
    environment, findings = describe_environment(), examine(architectures)
    if as_json:
        print(json.dumps({"environment": environment, "findings": [asdict(finding) for finding in findings]}))
        return
    commit = f" at {environment['git_commit'][:12]}" if environment["git_commit"] else ""
    print(f"toolkit {environment['toolkit']}{commit}, Python {environment['python']}, {environment['platform']}")
    print(", ".join(f"{name} {version}" for name, version in environment["packages"].items()))
    print(f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']:g} GiB\n")
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{MARKS[finding.state]}  {finding.name:{width}}  {finding.detail}")
        if finding.remedy:
            print(f"{'':{len(MARKS['ok']) + width + 4}}-> {finding.remedy}")


if __name__ == "__main__":
    main()
