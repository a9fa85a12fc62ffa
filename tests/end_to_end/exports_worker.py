"""One rank of test_exports.py: trains, saves, loads and exports under one DeepSpeed JSON after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist
from transformers import AutoModel

from tests.rank_workers import run_cases, start_run
from toolkit.batching.collate import Batch
from toolkit.batching.loader import train_batches
from toolkit.checkpointing.checkpoints import Progress
from toolkit.cluster.ranks import Ranks
from toolkit.models.adaptation.export import export_model
from toolkit.models.loading.load import load_translator
from toolkit.models.loading.weights import whole_state_dict
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.run import open_trainer, start_loader
from toolkit.training.start import Start

TABLES = ("backbone.shared.weight", "backbone.model.embed_tokens.weight")  # of encoder-decoders and of language models


def train(case: dict[str, Any], settings: list[str], run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    resolved, corpus = start_run(case, settings, run_dir, ranks)
    interruptions = Interruptions()
    with open_trainer(resolved, ranks, corpus, Start(Progress()), interruptions, lambda _: None) as trainer:
        first = table(trainer.engine.module)
        trainer.run(start_loader(resolved, ranks, corpus, trainer.progress))
        last = table(trainer.engine.module)
        batch = next(
            iter(
                train_batches(
                    corpus.splits["train"],
                    trainer.processor.tokenizer,
                    resolved,
                    landmark_set=corpus.landmark_set,
                    epoch=0,
                    start_step=0,
                    rank=0,
                )
            )
        )[0]
        trainer.engine.eval()
        expected = answers(trainer.engine, batch)
        trainer.engine.destroy()
    interruptions.close()
    dist.barrier()
    if not ranks.is_main:
        return {}
    best = run_dir / "best"
    return {
        "files": sorted(str(path.relative_to(best)) for path in best.rglob("*.safetensors")),
        "elements": sum(tensor.numel() for path in best.rglob("*.safetensors") for tensor in load_file(path).values()),
        "loaded": difference(expected, load_translator(run_dir)[0], batch),
        "exported": {
            str(merge): difference(expected, export(run_dir, f"merged-{merge}", merge=merge), batch)
            for merge in ((False, True) if (best / "adapter").is_dir() else (False,))
        },
        "changed_rows": (first != last).any(dim=1).nonzero().flatten().tolist(),
    }


def table(model: Any) -> Tensor:
    """The token table as it is in effect, with the rows of new tokens."""
    weights = whole_state_dict(model, keep=True)
    rows = next(weights[name] for name in TABLES if name in weights).clone()
    if "new_rows.0.weight" in weights:
        rows[384:386] = weights["new_rows.0.weight"]
    return rows.float()


def export(run_dir: Path, name: str, *, merge: bool) -> Any:
    """The exported folder as its users load it."""
    model, processor = load_translator(run_dir)
    folder = run_dir / name
    export_model(model, processor, folder, card="", dtype=None, replace=False, merge_adapter=merge)
    return AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def answers(model: Any, batch: Batch) -> Tensor:
    output = model(poses=batch.poses, visible=batch.visible, frame_mask=batch.frame_mask, labels=batch.labels)
    return output.logits.float().softmax(dim=-1)


def difference(expected: Tensor, model: Any, batch: Batch) -> float:
    return float((answers(model, batch) - expected).abs().max())


if __name__ == "__main__":
    run_cases(train)
