#!/usr/bin/env python
"""Try a translator in the browser: upload a clip, see its skeleton move, read the translation and the confidence.

python launch/demo_app.py --model runs/demo                          on this machine only, at http://127.0.0.1:7860
python launch/demo_app.py --model runs/demo --port 8000 --n-best 10
python launch/demo_app.py --model runs/demo --host 0.0.0.0           for the whole network: there is no password

Needs the extra [demo_app]; videos also the extra [video].
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from toolkit.errors import exit_code_of, parsed


def main() -> None:
    arguments = parsed(parse)
    sys.exit(exit_code_of(lambda: run(arguments), debug=arguments.debug))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a run directory, a model folder or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--n-best", type=int, default=5, metavar="N", help="translations that are listed (default 5)")
    parser.add_argument("--max-megabytes", type=float, default=100, metavar="MB", help="of an upload (default 100)")
    parser.add_argument("--max-seconds", type=float, default=300, metavar="S", help="of a clip (default 300)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    for name in ("n_best", "max_megabytes", "max_seconds"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if arguments.port is not None and not 0 < arguments.port < 65536:
        parser.error("--port is a number from 1 to 65535")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before its import, which would access the network
    from toolkit.inference.demo_app import build_app, check_gradio, serve

    check_gradio()
    from toolkit.cluster.devices import choose_device
    from toolkit.cluster.logs import show_errors_only
    from toolkit.models.loading.load import load_translator

    show_errors_only()
    device = choose_device(arguments.device)
    model, processor = load_translator(arguments.model)
    model.to(device)
    title = f"sign language translation: {Path(arguments.model).name}"
    app = build_app(model, processor, title=title, n_best=arguments.n_best, most_seconds=arguments.max_seconds)
    url = serve(app, host=arguments.host, port=arguments.port, most_megabytes=arguments.max_megabytes)
    print(f"{url} serves {arguments.model}; Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        app.close()


if __name__ == "__main__":
    main()
