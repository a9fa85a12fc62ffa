#!/usr/bin/env python
"""One rank of ``vs_hf_zero3`` in evaluation.py, which starts two of these under ``deepspeed``.

The same weights are evaluated by HuggingFace's ``Seq2SeqTrainer.evaluate`` and by ours, in turns. On both sides every
weight is partitioned over the ranks (``stage3_param_persistence_threshold: 0``), as the weights of a large model are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import deepspeed
import torch
from evaluation import BATCH_FRAMES, MICRO_BATCH, SEARCH, TARGETS, open_split
from sacrebleu.metrics import BLEU
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.modeling_outputs import Seq2SeqLMOutput

from toolkit.batching.collate import collate
from toolkit.cluster.devices import barrier
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.process_group import join_process_group, leave_process_group
from toolkit.cluster.ranks import read_ranks
from toolkit.corpus.packed import Split
from toolkit.decoding.decode_split import evaluation_mode, translate_split
from toolkit.decoding.whole_weights import whole_weights
from toolkit.models import PoseTranslator
from toolkit.models.loading.load import find_model, load_translator
from toolkit.scoring.metrics import score


class ForTrainer(PoseTranslator):
    """The translator as HuggingFace's trainer wants it: the loss among the outputs, labels ignored by ``generate``."""

    def forward(self, **inputs: Any) -> Seq2SeqLMOutput:
        logits = super().forward(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits)

    def generate(self, labels: Any = None, **inputs: Any) -> Any:
        return super().generate(**inputs)


class Clips(Dataset):
    """A split as HuggingFace's data loader reads it, in the order of the corpus."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> int:
        return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log_to_file(None)
    ranks = read_ranks()
    join_process_group(ranks)
    split = open_split(arguments.model, arguments.corpus)
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "train_batch_size": MICRO_BATCH * ranks.world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    model, processor = load_translator(arguments.model)
    model.config.ctc_search_weight = 0.0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    trainer = make_trainer(find_model(arguments.model), split, processor, config)

    def ours() -> list[str]:
        with evaluation_mode(engine.module), whole_weights(engine, gather=True) as synced:
            predictions = translate_split(
                engine.module,
                split,
                processor,
                batch_frames=BATCH_FRAMES,
                rank=ranks.rank,
                world_size=ranks.world_size,
                synced=synced,
                **SEARCH,
            )
        texts = [row.hypothesis for row in predictions]
        score(texts, list(split.texts))
        return texts

    def theirs() -> list[str]:
        trainer.evaluate()
        return trainer.texts

    seconds: dict[str, list[float]] = {"hf": [], "ours": []}
    texts: dict[str, list[str]] = {}
    for _ in range(arguments.repeats):
        for name, way in (("hf", theirs), ("ours", ours)):
            barrier()
            start = time.perf_counter()
            texts[name] = way()
            barrier()
            seconds[name].append(time.perf_counter() - start)
    hf, own = median(seconds["hf"]), median(seconds["ours"])
    result = {
        "clips": len(split),
        "ranks": ranks.world_size,
        "beams": SEARCH["num_beams"],
        "hf_clips_per_second": round(len(split) / hf, 2),
        "ours_clips_per_second": round(len(split) / own, 2),
        "ratio": round(hf / own, 2),
        "target": f">= {TARGETS['vs_hf_zero3']}",
        "same_texts": sum(one == other for one, other in zip(texts["hf"], texts["ours"], strict=True)),
    }
    if ranks.is_main:
        print(json.dumps(result), flush=True)
    leave_process_group()


def make_trainer(folder: str, split: Split, processor: Any, config: dict[str, Any]) -> Any:
    """HuggingFace's trainer on the same weights, with generation settings and batch size as ours."""

    def pad(indices: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(split.read(indices), indices, processor.tokenizer, max_target_tokens=512)
        return {name: getattr(batch, name) for name in ("poses", "visible", "frame_mask", "labels")}

    def metrics(prediction: Any) -> dict[str, float]:
        padding = processor.tokenizer.pad_token_id
        tokens = prediction.predictions
        tokens[tokens < 0] = padding
        trainer.texts = [" ".join(text.split()) for text in processor.batch_decode(tokens)]
        return {"bleu": BLEU().corpus_score(trainer.texts, [list(split.texts)]).score}

    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(config, file)
    settings = Seq2SeqTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=MICRO_BATCH,
        per_device_eval_batch_size=MICRO_BATCH,
        predict_with_generate=True,
        remove_unused_columns=False,
        deepspeed=file.name,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.0,
        bf16=False,
    )
    model = ForTrainer.from_pretrained(folder).eval()
    model.config.ctc_search_weight = 0.0
    model.generation_config.update(**SEARCH)
    model.backbone.generation_config.update(**SEARCH)
    trainer = Seq2SeqTrainer(
        model=model, args=settings, data_collator=pad, eval_dataset=Clips(split), compute_metrics=metrics
    )
    return trainer


if __name__ == "__main__":
    main()
