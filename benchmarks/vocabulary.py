#!/usr/bin/env python
"""What trimming a vocabulary saves: mT5-Base on Hindi-like and English texts, with all tokens and with those it needs.

python benchmarks/vocabulary.py                            full depth and width: two models of 10 GB in memory
python benchmarks/vocabulary.py --in-pass                  states in a pass alone, of one model after the other
python benchmarks/vocabulary.py --layers 2                 fewer layers, whose states and time are then less
python benchmarks/vocabulary.py --width 64 --layers 1 --tokens 20000 --clips 64 --rounds 2      writes nothing

Writes benchmarks/results/vocabulary.json. Weights are random. The tokenizer is a unigram model with as many tokens as
mT5's: those learnt from the texts, 8,000 single ideographs, which stay, and made-up words of other scripts. English
texts are lines of this project's documents, Hindi-like ones are made of syllables. Two processes, one of each
vocabulary, take turns of a few steps on the same clips, so that both meet the same load of the machine.
``states_fall_gib`` is what weights, their fp32 copies and the optimizer's moments take less, after a step;
``states_in_a_pass_gib`` what these and the gradients take: by plan, and counted in the tensors of a process. That of a
pass is the most at the end of a backward pass or before the optimizer's step, in two further processes, one after the
other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from sides import started, take_turn
from training_corpus import make_corpus
from transformers import MT5Config, T5Tokenizer
from turns import answer

from toolkit.corpus.packed import Corpus
from toolkit.models.backbone import note_published
from toolkit.models.build import build_processor
from toolkit.models.tokenizers import train_tokenizer
from toolkit.models.vocabulary.needed import full_tokenizer
from toolkit.planning.costs.counts import count
from toolkit.planning.costs.zero import zero_memory
from toolkit.recipe.load import load_recipe
from toolkit.recipe.model_cards import load_model_yaml
from toolkit.recipe.resolve import ResolvedRun, resolve

RESULTS = ROOT / "benchmarks" / "results" / "vocabulary.json"
GIB = 2**30
SIDES = ("full", "corpus")
# Of glibc: what both processes free goes back to the system, else they would not fit into 24 GB together.
RETURNED = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "65536"}
SYLLABLES = [consonant + vowel for consonant in "कनतरमसपह" for vowel in ("", *"ािीुेैो")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of encoder and of decoder (default mT5-Base's 12)")
    parser.add_argument("--width", type=int, default=768, help="of the backbone (default mT5-Base's 768)")
    parser.add_argument("--tokens", type=int, default=250_100, help="of the tokenizer (default mT5's)")
    parser.add_argument("--clips", type=int, default=4096, help="of the corpus (default 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a turn (default 1)")
    parser.add_argument("--in-pass", action="store_true", help="measure only what states take in a pass")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        train_in_turns(arguments.folder, arguments.side, watches_passes=arguments.in_pass)
        return
    os.environ |= RETURNED
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(folder, arguments)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if arguments.in_pass else measure(folder, arguments)
        results["states_in_a_pass_gib"] = in_a_pass(folder)
    print(json.dumps(results, indent=2))
    if (arguments.tokens, arguments.width) == (250_100, 768):
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def make_inputs(folder: Path, arguments: argparse.Namespace) -> None:
    """The corpus, the backbone's configuration, and its tokenizer."""
    texts = sentences(arguments.clips)
    make_corpus(folder / "corpus", arguments.clips, texts)
    config = load_model_yaml("mt5_base").config
    changed = {"num_layers": arguments.layers, "num_decoder_layers": arguments.layers, "d_model": arguments.width}
    tokenizer = tokenizer_of(texts, arguments.tokens)
    tokenizer.save_pretrained(folder / "backbone")
    # mT5's table has twelve rows more than there are tokens.
    values = config | changed | {"vocab_size": len(tokenizer) + 12}
    backbone = MT5Config(**values)
    note_published(backbone, values)
    backbone.save_pretrained(folder / "backbone")


def sentences(number: int) -> list[str]:
    """Half of them English, from this project's documents, half of syllables; words as frequent as Zipf's law says."""
    draw = random.Random(0)
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))).split()
    english = [word for word in words if word.isascii() and word.strip(".,;:()").isalpha()]
    hindi = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(8000)]
    weights = [1 / (place + 1) for place in range(len(hindi))]
    found = []
    for place in range(number):
        length = max(3, round(draw.gauss(9, 4)))
        start = draw.randrange(len(english) - length)
        of_words = english[start : start + length] if place % 2 else draw.choices(hindi, weights, k=length)
        found.append(" ".join(of_words))
    return found


def tokenizer_of(texts: list[str], tokens: int) -> Any:
    """A tokenizer of mT5's kind with so many tokens: those of the texts, and words that no text has."""
    learnt = json.loads(train_tokenizer(texts).backend_tokenizer.to_str())["model"]["vocab"][3:]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    subwords = [*special, *((f"<0x{byte:02X}>", -30.0) for byte in range(256)), *map(tuple, learnt)]
    lowest = min(score for _, score in subwords)
    subwords += [(chr(place), lowest - 1) for place in range(0x4E00, 0x4E00 + 8000)]
    letters = [chr(place) for place in range(0x3041, 0x3094)]
    draw, known = random.Random(1), {subword for subword, _ in subwords}
    while len(subwords) < tokens:
        word = "▁" + "".join(draw.choices(letters, k=draw.randint(3, 7)))
        if word not in known:
            known.add(word)
            subwords.append((word, lowest - 1))
    return T5Tokenizer(vocab=subwords, extra_ids=0)


def resolved_run(folder: Path, vocabulary: str) -> ResolvedRun:
    settings = [
        f"data.corpus={folder / 'corpus'}",
        f"model.backbone={folder / 'backbone'}",
        f"model.tokenizer={folder / 'backbone'}",
        "model.from_scratch=true",
        f"model.vocabulary={vocabulary}",
        *("training.global_batch_size=16", "training.micro_batch_size=8", "training.workers=0"),
        f"run.dir={folder / 'runs' / vocabulary}",
    ]
    return resolve(load_recipe("mt5_base", settings), 1, has_gpu=torch.cuda.is_available())


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Turns of both sides, and the plan of each."""
    tokens, planned = {}, {}
    for side in SIDES:
        run = resolved_run(folder, side)
        processor = build_processor(run.recipe, Corpus.open(folder / "corpus"))
        tokens[side] = len(processor.tokenizer)
        planned[side] = sum(zero_memory(count(run.recipe).weights, run.recipe, run.deepspeed, 1).always.values())
        if side == "corpus":
            unknown, differ = compare_texts(folder, full_tokenizer(run.recipe), processor.tokenizer)
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    full, corpus = ([__file__, "--side", side, "--folder", str(folder)] for side in SIDES)
    with started(full) as full_side, started(corpus) as corpus_side:
        for number in range(arguments.rounds + 1):
            for side, process in zip(SIDES, (full_side, corpus_side), strict=True):
                turn = take_turn(process, arguments.steps)
                if number:  # the first makes the optimizer's states
                    taken[side].append(turn)
                print(f"{side}: {turn['clips'] / turn['seconds']:.2f} clips/s", flush=True)
    speeds = {side: sum(t["clips"] for t in turns) / sum(t["seconds"] for t in turns) for side, turns in taken.items()}
    held = {side: turns[-1]["tensors"] for side, turns in taken.items()}
    return {
        "layers": arguments.layers,
        "tokens_full": tokens["full"],
        "tokens_trimmed": tokens["corpus"],
        "texts_tokenised_otherwise": differ,
        "texts_with_an_unknown_token": unknown,
        "planned_states_gib": {side: round(size / GIB, 2) for side, size in planned.items()},
        "measured_states_gib": {side: round(size / GIB, 2) for side, size in held.items()},
        "states_fall_gib": {
            "planned": round((planned["full"] - planned["corpus"]) / GIB, 2),
            "measured": round((held["full"] - held["corpus"]) / GIB, 2),
        },
        "clips_per_second": {
            "target": "1.2 or more",
            "full": round(speeds["full"], 2),
            "trimmed": round(speeds["corpus"], 2),
            "ratio": round(speeds["corpus"] / speeds["full"], 2),
        },
    }


def in_a_pass(folder: Path) -> dict[str, Any]:
    """States and gradients of each side, by plan and counted in a process of its own, and how much they fall."""
    planned, measured = {}, {}
    for side in SIDES:
        run = resolved_run(folder, side)
        planned[side] = zero_memory(count(run.recipe).weights, run.recipe, run.deepspeed, 1).device
        with started([__file__, "--side", side, "--folder", str(folder), "--in-pass"]) as process:
            turns = [take_turn(process, 1) for _ in range(2)]  # the first makes the optimizer's states
            measured[side] = turns[-1]["in_pass"]
            print(f"{side}: {measured[side] / GIB:.2f} GiB in a pass", flush=True)
    found = {"planned": planned, "measured": measured}
    return {
        "target": "a fall of 5 or more",
        **{f"{how}_{side}": round(size / GIB, 2) for how, sizes in found.items() for side, size in sizes.items()},
        **{f"{how}_fall": round((sizes["full"] - sizes["corpus"]) / GIB, 2) for how, sizes in found.items()},
    }


def compare_texts(folder: Path, full: Any, trimmed: Any) -> tuple[int, int]:
    """How many texts have an unknown token or do not come back, and how many have other tokens than before."""
    texts = Corpus.open(folder / "corpus").splits["train"].texts
    ids, before = (each(text_target=list(texts))["input_ids"] for each in (trimmed, full))
    unknown = sum(
        trimmed.unk_token_id in found or trimmed.decode(found, skip_special_tokens=True).split() != text.split()
        for found, text in zip(ids, texts, strict=True)
    )
    pairs = zip(ids, before, strict=True)
    other = sum(trimmed.convert_ids_to_tokens(a) != full.convert_ids_to_tokens(b) for a, b in pairs)
    return unknown, other


def train_in_turns(folder: Path, vocabulary: str, *, watches_passes: bool = False) -> None:
    """One side: the toolkit's own loop."""
    from training_side import turns_of_ours

    corpus = Corpus.open(folder / "corpus")
    seen: list[int] = []
    for number, (trainer, _, clips, seconds) in enumerate(turns_of_ours(resolved_run(folder, vocabulary), corpus)):
        answer(clips, seconds, tensors=live_bytes(), in_pass=max(seen, default=0))
        if watches_passes and not number:
            watch_passes(trainer.engine, seen)


def watch_passes(engine: Any, seen: list[int]) -> None:
    """From now on write down what tensors hold at the end of each backward pass and before each step."""
    backward, step = engine.backward, engine.step

    def watched_backward(*values: Any, **named: Any) -> Any:
        result = backward(*values, **named)
        seen.append(live_bytes())
        return result

    def watched_step(*values: Any, **named: Any) -> Any:
        seen.append(live_bytes())
        return step(*values, **named)

    engine.backward, engine.step = watched_backward, watched_step


def live_bytes() -> int:
    """Bytes of all tensors that Python still holds, and of their gradients, each memory once."""
    storages = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or thing.device.type == "meta":
            continue
        gradient = thing.grad if thing.is_leaf else None
        for tensor in (thing, gradient):
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    main()
