"""HuggingFace's ``Seq2SeqTrainer`` as a side of ``training_side.py``: the peer of our own loop."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional
from turns import answer, elapsed, orders

from toolkit.batching.collate import collate
from toolkit.batching.workers import PREFETCHED_BATCHES
from toolkit.cluster.process_group import leave_process_group
from toolkit.corpus.packed import Corpus
from toolkit.errors import Interrupted
from toolkit.recipe.resolve import ResolvedRun


def train_by_hf(resolved: ResolvedRun, corpus: Corpus, processor: Any, model: Any, max_tokens: int) -> None:
    """Train with the same DeepSpeed JSON, its default sampling, and workers as many and as far ahead as ours.

    It gets what ours has besides: AdamW in one kernel, bf16 as the JSON says, no cuDNN attention, no timer of
    DeepSpeed, and page-locked memory, which is its default. Its workers live on from epoch to epoch, because epochs of
    a benchmark are short.
    """
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
    from transformers.modeling_outputs import Seq2SeqLMOutput

    split, training = corpus.splits["train"], resolved.recipe.training
    whole_forward = model.forward

    def forward(**inputs: Any) -> Seq2SeqLMOutput:
        logits = whole_forward(**{key: inputs[key] for key in ("poses", "visible", "frame_mask", "labels")}).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), inputs["labels"].flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits)

    model.forward = forward

    def collator(indices: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(split.read(indices), indices, processor.tokenizer, max_target_tokens=max_tokens)
        return {key: getattr(batch, key) for key in ("poses", "visible", "frame_mask", "labels")}

    class Turns(TrainerCallback):
        """Waits for an order before the steps of a turn and answers after them."""

        def __init__(self) -> None:
            self.orders = orders()
            self.left = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.left == 0:
                self.left = self.taken = next(self.orders, 0)
                if self.left == 0:
                    raise Interrupted("no more orders")
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.left -= 1
            if self.left == 0:
                answer(self.taken * training.global_batch_size, elapsed(self.started))

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(resolved.run_dir),
        deepspeed=resolved.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        bf16=resolved.precision == "bf16",
        per_device_train_batch_size=resolved.micro_batch_size,
        gradient_accumulation_steps=resolved.accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.gradient_clipping,
        max_steps=100_000,
        dataloader_num_workers=training.workers,
        dataloader_persistent_workers=training.workers > 0,
        dataloader_prefetch_factor=PREFETCHED_BATCHES if training.workers else None,
        dataloader_drop_last=True,  # a step has as many clips as it answers
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",  # it would print beside the answers
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=[*range(len(split))],  # type: ignore[arg-type]
        data_collator=collator,
        callbacks=[Turns()],
    )
    try:
        trainer.train()
    except Interrupted:
        leave_process_group()
