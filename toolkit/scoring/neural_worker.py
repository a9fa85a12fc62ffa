"""A program that computes one learnt metric, run by the Python of an environment that has the metric's package.

Standard input is one JSON object, ``name, checkpoint, hypotheses, references``; the last line of standard output is
``{"score": ...}``, or ``{"error": ...}`` where the checkpoint cannot be used. It imports nothing of this toolkit:
COMET and BLEURT need other versions of transformers.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

BATCH = 32


def main() -> None:
    task = json.load(sys.stdin)
    try:
        score = METRICS[task["name"]](task["checkpoint"], task["hypotheses"], task["references"])
        print(json.dumps({"score": score}))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        print(json.dumps({"error": " ".join(str(error).split())}))


def comet(checkpoint: str, hypotheses: list[str], references: list[str]) -> float:
    """COMET's system score: the mean over all pairs."""
    package = import_module("comet")
    path = checkpoint if checkpoint.endswith(".ckpt") else package.download_model(checkpoint)
    model = package.load_from_checkpoint(path)
    # The source is signing and has no text, so COMET scores against the reference alone.
    rows = [{"src": "", "mt": given, "ref": wanted} for given, wanted in zip(hypotheses, references, strict=True)]
    gpus = 1 if import_module("torch").cuda.is_available() else 0
    return float(model.predict(rows, batch_size=BATCH, gpus=gpus, progress_bar=False).system_score)


def bleurt(checkpoint: str, hypotheses: list[str], references: list[str]) -> float:
    """The mean of BLEURT over all pairs."""
    torch, package = import_module("torch"), import_module("bleurt_pytorch")
    tokenizer = package.BleurtTokenizer.from_pretrained(checkpoint)
    model = package.BleurtForSequenceClassification.from_pretrained(checkpoint).eval()
    total = 0.0
    for start in range(0, len(references), BATCH):
        pairs = references[start : start + BATCH], hypotheses[start : start + BATCH]
        with torch.no_grad():
            batch = tokenizer(*pairs, padding=True, truncation=True, max_length=512, return_tensors="pt")
            total += float(model(**batch).logits.sum())
    return total / len(references)


METRICS = {"comet": comet, "bleurt": bleurt}

if __name__ == "__main__":
    main()
