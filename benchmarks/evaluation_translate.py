#!/usr/bin/env python
"""How long one clip takes from the shell, beside the least that any such program must take.

python benchmarks/evaluation_translate.py    writes translate_vs_bare into benchmarks/results/evaluation.json

The peer imports torch and transformers, makes a backbone of the same dimensions, and calls ``generate`` once for as
many positions, beams and tokens: it reads no clip, loads no weights, encodes no poses and prints no text. Processes of
both take turns, so that other load of the machine affects both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"
RUNS = 7
BEAMS, TOKENS = 4, 16

BARE = """
import json, sys
import torch, transformers
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
settings = json.loads(sys.argv[1])
model = T5ForConditionalGeneration(T5Config(**settings["backbone"])).eval()
hidden = torch.zeros(1, settings["positions"], model.config.d_model)
model.generate(
    encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
    num_beams=settings["beams"], min_new_tokens=settings["tokens"], max_new_tokens=settings["tokens"],
)
"""


def translate_vs_bare() -> dict[str, Any]:
    """Wall-clock and processor seconds of ``launch/translate.py`` on one clip and of the bare peer, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder, clip, bare = _make(Path(name))
        commands = {
            "translate": [str(ROOT / "launch" / "translate.py"), "--model", str(folder), str(clip)],
            "bare": ["-c", BARE, json.dumps(bare)],
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in commands}
        processor: dict[str, list[float]] = {kind: [] for kind in commands}
        for run in range(RUNS + 1):
            for kind, command in commands.items():
                wall, busy = _timed([sys.executable, *command])
                if run:  # the first finds cold files
                    seconds[kind].append(wall)
                    processor[kind].append(busy)
    return {
        "ratio": round(median(seconds["translate"]) / median(seconds["bare"]), 3),
        "processor_ratio": round(median(processor["translate"]) / median(processor["bare"]), 3),
        "wanted": "at most 1.3",
        "translate_s": round(median(seconds["translate"]), 3),
        "bare_s": round(median(seconds["bare"]), 3),
        "translate_processor_s": round(median(processor["translate"]), 3),
        "bare_processor_s": round(median(processor["bare"]), 3),
        "runs": RUNS,
        "beams": BEAMS,
        "tokens": TOKENS,
        "positions": bare["positions"],
    }


def _make(folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """An untrained model of the demo's dimensions, a clip of the demo, and what the peer needs to know of them."""
    from toolkit.corpus.demo import DemoSizes, make_demo
    from toolkit.corpus.packed import Corpus
    from toolkit.corpus.prepare import prepare
    from toolkit.models.build import build_processor, build_translator
    from toolkit.recipe.resolve import resolve_named
    from toolkit.recipe.schema import Data

    clips = make_demo(folder / "clips", DemoSizes(4, 1, 1, 1))
    data = Data(table=str(clips / "table.csv"), poses=str(clips / "poses"), workers=1)
    corpus = Corpus.open(prepare(data, folder / "corpus").path)
    resolved = resolve_named("demo", [], 1, has_gpu=False)
    processor = build_processor(resolved.recipe, corpus)
    model = build_translator(resolved, corpus, processor.tokenizer).eval()
    model.generation_config.update(num_beams=BEAMS, min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    clip = next((clips / "poses").glob("test-*.pose"))
    positions = model.encode(**processor([clip]))[0].shape[1]
    backbone = model.config.backbone
    return folder / "model", clip, {"backbone": backbone, "positions": positions, "beams": BEAMS, "tokens": TOKENS}


def _timed(command: list[str]) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds of a process."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, busy


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figures = translate_vs_bare()
    from toolkit.files import write_text_atomically

    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    write_text_atomically(RESULTS, json.dumps(known | {"translate_vs_bare": figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
