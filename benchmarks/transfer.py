#!/usr/bin/env python
"""What a trained translator gives to a sign language that it has never seen, from 200 labelled phrases.

python benchmarks/transfer.py --model runs/demo        the demo's model (`make demo`) against from scratch, same steps
python benchmarks/transfer.py --model runs/demo --work transfer_work     keeps corpora and runs there, and resumes them
python benchmarks/transfer.py --model runs/demo --mix  besides, a mix with the demo's corpus, as many steps as the demo

The demo's corpus holds four sign languages for tests alone. Their phrases are split here so that no word is in two of
train, dev and test. Both runs have the demo's recipe, the same 200 phrases and the same steps; the dev split picks the
step. A mix of these phrases with the demo's corpus, drawn by the root of its size (`data.temperature=2`), starts from
scratch, too, and its best model is picked by the phrases; beside it stands the demo's model, which has only the demo's
corpus. Writes benchmarks/results/transfer.json and docs/pictures/transfer.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.corpus.demo import UNSEEN_LANGUAGES, DemoSizes, make_demo
from toolkit.files import write_text_atomically

RESULTS = ROOT / "benchmarks" / "results" / "transfer.json"
CHART = ROOT / "docs" / "pictures" / "transfer.png"
PHRASES = {"train": 200, "dev": 40, "test": 160}
POOL = 1600  # phrases that are made; those that hold words of two splits are left out
STEPS = 500  # of 32 clips
TARGET = "at most half of from scratch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo", help="the pretrained translator: run, folder or hub id")
    parser.add_argument("--work", type=Path, help="folder of corpora and runs (default: a temporary one)")
    parser.add_argument("--num-gpus", default="2", help="ranks (default 2)")
    parser.add_argument("--mix", action="store_true", help="train the mix, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        clips = make_clips(work / "clips")
        runs = {"init_from": [f"model.init_from={arguments.model}"], "from scratch": []}
        scores = {
            name: train(work, name, phrases(work, clips) + extra, arguments.num_gpus) for name, extra in runs.items()
        }
        cer = {name: summary["splits"]["test"]["scores"]["cer"] for name, summary in scores.items()}
        if arguments.mix:
            demo, own = corpus_of(Path(arguments.model)), corpus_of(work / "from_scratch")
            scores["mix"] = train(work, "mix", mixed(demo, own, arguments.model), arguments.num_gpus)
            cer["mix"] = scores["mix"]["splits"]["test"]["scores"]["cer"]
            scores["demo alone"] = evaluate(arguments.model, own, work / "demo_alone")
            cer["demo alone"] = scores["demo alone"]["splits"]["test"]["scores"]["cer"]
    content = {
        "languages": ", ".join(UNSEEN_LANGUAGES),
        "phrases": PHRASES,
        "steps": STEPS,
        "model": Path(arguments.model).name,
        "cer": {name: round(value, 4) for name, value in cer.items()},
        "cer of init_from over from scratch": {
            "value": round(cer["init_from"] / cer["from scratch"], 3),
            "target": TARGET,
        },
        "splits": {
            f"{name}, {split}": result
            for name, summary in scores.items()
            for split, result in summary["splits"].items()
        },
    }
    write_text_atomically(RESULTS, json.dumps(content, indent=2) + "\n")
    draw(content, CHART)
    print(f"CER {cer['init_from']:.3f} from {arguments.model}, {cer['from scratch']:.3f} from scratch; wrote {RESULTS}")


def draw(content: dict[str, Any], path: Path) -> None:
    """The character error rate of each way on the phrases, with its 95 % interval."""
    from matplotlib.figure import Figure

    labels = {
        "init_from": f"the {content['model']}'s model,\nthen the phrases",
        "mix": f"phrases and the {content['model']}'s\ncorpus, from scratch",
        "from scratch": "the phrases alone,\nfrom scratch",
        "demo alone": f"the {content['model']}'s model\nas it is",
    }
    names = [name for name in labels if name in content["cer"]]
    rates = [content["cer"][name] for name in names]
    bounds = [content["splits"][f"{name}, test"]["intervals"]["cer"] for name in names]
    distances = [[rate - low for rate, (low, _) in zip(rates, bounds, strict=True)],
                 [high - rate for rate, (_, high) in zip(rates, bounds, strict=True)]]  # fmt: skip
    figure = Figure(figsize=(2 + 1.7 * len(names), 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    colours = ["#2563a8" if name in ("init_from", "mix") else "#b8bec6" for name in names]
    bars = axes.bar([labels[name] for name in names], rates, color=colours, width=0.6, yerr=distances, ecolor="#6b7280")
    axes.bar_label(bars, [f"{rate:.3f}" for rate in rates], padding=2)
    axes.set_ylim(0, 1.15 * max(high for _, high in bounds))
    axes.set_ylabel("character error rate (less is better)")
    axes.set_title(f"{content['phrases']['train']} phrases of sign languages that the {content['model']} never saw")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def make_clips(folder: Path) -> Path:
    """Phrases of the unseen languages, with splits by word."""
    table = folder / "split.csv"
    if table.is_file():
        return folder
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_demo(folder, DemoSizes(train=1, dev=1, test=1, test_unseen_languages=POOL), seed=11, workers=2)
    with open(folder / "table.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test_unseen_languages"]
    known = sorted({word for row in rows for word in row["text"].split()})
    random.Random(0).shuffle(known)  # words that begin alike are in all splits
    total, place = sum(PHRASES.values()), 0
    split_of: dict[str, str] = {}
    for split, count in PHRASES.items():
        last = place + round(len(known) * count / total)
        split_of |= dict.fromkeys(known[place:last] if split != "test" else known[place:], split)
        place = last
    chosen: list[dict[str, str]] = []
    for split, count in PHRASES.items():
        of_split = [row for row in rows if {split_of[word] for word in row["text"].split()} == {split}]
        if len(of_split) < count:
            sys.exit(f"{len(of_split)} phrases hold only words of {split}, {count} are needed: raise POOL")
        chosen += [row | {"split": split} for row in of_split[:count]]
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["uid", "text", "split", "language"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(chosen)
    return folder


def phrases(work: Path, clips: Path) -> list[str]:
    """Settings of a run on the phrases alone."""
    return [
        *("data.source=table", f"data.table={clips / 'split.csv'}", f"data.poses={clips / 'poses'}"),
        *(f"data.cache={work / 'corpora'}", f"training.max_steps={STEPS}", "training.eval_every=15"),
    ]


def mixed(demo: str, own: str, model: str) -> list[str]:
    """Settings of a run on the phrases and the demo's corpus, as long as the demo's own."""
    steps = json.loads((Path(model) / "scores.json").read_text(encoding="utf-8"))["steps"]
    parts = [{"corpus": own, "name": "phrases"}, {"corpus": demo, "name": "demo", "splits": ["train"]}]
    return [
        *("data.source=table", f"data.corpora={json.dumps(parts)}", "data.temperature=2"),
        *("evaluation.select_corpus=phrases", f"training.max_steps={steps}", "training.eval_every=1"),
    ]


def corpus_of(run_dir: Path) -> str:
    """The folder of the corpus that a run was trained on."""
    return json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["corpus"]


def evaluate(model: str, corpus: str, out: Path) -> dict:
    """The scores of a model on a corpus."""
    command = ("python", "launch/evaluate.py", "--model", model, "--corpus", corpus, "--out", str(out))
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((out / "scores.json").read_text(encoding="utf-8"))


def train(work: Path, name: str, settings: list[str], ranks: str) -> dict:
    """Train a run, or resume it, and give its ``scores.json``."""
    run_dir = work / name.replace(" ", "_")
    command = [
        *("deepspeed", "--num_gpus", ranks, "launch/train.py", "--recipe", "demo", f"run.dir={run_dir}"),
        *("training.epochs=1000", "training.save_every=100", *settings),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((run_dir / "scores.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
