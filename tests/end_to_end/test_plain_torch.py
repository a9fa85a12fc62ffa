"""Two ranks of DeepSpeed train the weights that a loop of plain PyTorch trains, one clip at a time on one process.

The loop below has losses, clipping, schedule, optimizer and average of its own; model and clips are the toolkit's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker
from toolkit.batching.collate import Batch
from toolkit.batching.loader import train_batches
from toolkit.checkpointing.random_states import seed_everything
from toolkit.corpus.packed import Corpus
from toolkit.models.build import build_processor, build_translator
from toolkit.models.loading.load import load_translator
from toolkit.models.tokenizers import special_ids
from toolkit.recipe.resolve import resolve_named

STEPS, CLIPS = 5, 24
BATCH = 7  # the last step of an epoch has three clips: of four micro-batches of one clip one is a filler
SMOOTHING, CTC, CLIPPING, DECAY, AVERAGE, RATE = 0.1, 0.3, 0.5, 0.1, 0.6, 3e-3
PARTITION_ALL = "ds.zero_optimization.stage3_param_persistence_threshold=0"
SHARED = [
    *("ds.bf16.enabled=false", "ds.torch_autocast.enabled=false", "ds.data_types=null", "model.dropout=0"),
    *("model.pose_encoder.dropout=0", f"training.max_steps={STEPS}", "training.epochs=9", "training.eval_every=99"),
    *(f"training.global_batch_size={BATCH}", "training.micro_batch_size=1", "training.warmup_ratio=0.4"),
    *(f"training.label_smoothing={SMOOTHING}", f"training.ctc_weight={CTC}", f"training.weight_decay={DECAY}"),
    *(f"training.gradient_clipping={CLIPPING}", f"training.ema={AVERAGE}", f"training.learning_rate={RATE}"),
    *("training.schedule=cosine", "evaluation.ctc_weight=0"),
]
# DeepSpeed JSON -> overrides. The pairs of tests/end_to_end/test_strategies.py tie all other ways to these.
WAYS = {
    "zero0": [],
    "zero1": [],
    "zero2": [],
    "zero3": [],  # small weights whole on all ranks
    "zero3, partitioned": [PARTITION_ALL],
    "zero2_offload": [],
    "zero1, checkpoints": ["training.gradient_checkpointing=true"],
    "zero2, two clips": ["training.micro_batch_size=2"],
}
BY_DAY = ("zero0", "zero2, two clips")

Plain = tuple[list[float], list[float], dict[str, tuple[Tensor, Tensor]]]


@pytest.fixture(scope="module")
def shared(settings: list[str]) -> list[str]:
    return [*prepared(settings), *SHARED]


@pytest.fixture(scope="module")
def folder(
    fork: Callable[..., Any],
    shared: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    """Holds the run directories of all ways."""
    folder = tmp_path_factory.mktemp("plain")
    chosen = {
        name: {"ds": name.split(",")[0], "overrides": overrides}
        for name, overrides in WAYS.items()
        if name in BY_DAY or is_night(request)
    }
    found = run_worker(fork, "tests/end_to_end/strategies_worker.py", folder, ranks=2, cases=chosen, settings=shared)
    for name, result in found.items():
        torch.save(result, folder / name / "result.pt")
    return folder


@pytest.fixture(scope="module")
def plain(shared: list[str], tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Losses and gradient norms of plain PyTorch, and by name its first weights and the average of all later ones."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    resolved = resolve_named("t5_small", [*shared, f"run.dir={run_dir}"], 1, has_gpu=False, ds="zero0")
    recipe, corpus = resolved.recipe, Corpus.open(resolved.recipe.data.corpus or "")
    seed_everything(recipe.training.seed)
    tokenizer = build_processor(recipe, corpus).tokenizer
    model = build_translator(resolved, corpus, tokenizer).train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [
        {"params": [weight for weight in weights.values() if (weight.dim() > 1) is decays], "weight_decay": decay}
        for decays, decay in ((True, DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=recipe.training.betas, eps=recipe.training.eps)
    losses, norms, average = [], [], {}
    first = {name: weight.detach().clone() for name, weight in weights.items()}
    for step, clips in enumerate(steps_of(resolved, corpus, tokenizer), start=1):
        tokens = sum(int((clip.labels >= 0).sum()) for clip in clips)
        loss = 0.0
        for clip in clips:
            nll, ctc = losses_of(model, clip, special_ids(tokenizer))
            ((nll + CTC * ctc) / tokens).backward()
            loss += nll.item() / tokens
        losses.append(loss)
        norms.append(float(nn.utils.clip_grad_norm_(weights.values(), CLIPPING)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share_of_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        old = min(AVERAGE, (1 + step) / (10 + step))
        for name, weight in weights.items():
            now = weight.detach().clone()
            average[name] = now if step == 1 else old * average[name] + (1 - old) * now
    return losses, norms, {name: (first[name], value) for name, value in average.items()}


def steps_of(resolved: Any, corpus: Corpus, tokenizer: Any) -> Iterator[list[Batch]]:
    """The clips of each step, one by one."""
    split = corpus.splits["train"]
    assert len(split) == CLIPS
    batches = train_batches(split, tokenizer, resolved, landmark_set=corpus.landmark_set, epochs=2)
    for clips, _ in zip(batches, range(STEPS), strict=False):
        assert all(len(clip) == clip.num_clips == 1 for clip in clips)
        yield clips


def losses_of(model: Any, clip: Batch, special: list[int]) -> tuple[Tensor, Tensor]:
    """Token loss and CTC loss of one clip, in nats, by torch's own functions."""
    output = model(clip.poses, clip.visible, clip.frame_mask, clip.labels)
    nll = functional.cross_entropy(
        output.logits[0], clip.labels[0], reduction="sum", label_smoothing=SMOOTHING, ignore_index=-100
    )
    signed = torch.tensor([label for label in clip.labels[0].tolist() if label >= 0 and label not in special])
    scores = output.ctc_logits[0].log_softmax(-1)
    lengths = torch.tensor(len(scores)), torch.tensor(len(signed))
    return nll, functional.ctc_loss(scores, signed, *lengths, blank=scores.shape[-1] - 1, reduction="sum")


def share_of_rate(step: int) -> float:
    """Of the peak learning rate: a rise over two steps, then half a cosine to the end."""
    warmup = 2
    if step <= warmup:
        return step / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (STEPS - warmup)))


@pytest.mark.parametrize("name", cases(WAYS, BY_DAY))
def test_losses_norms_and_averaged_weights_are_those_of_plain_torch(folder: Path, plain: Plain, name: str) -> None:
    losses, norms, average = plain
    found = torch.load(folder / name / "result.pt", weights_only=True)
    # Adam makes steps of the usual size of the few gradients that are rounding alone.
    assert found["losses"] == pytest.approx(losses, rel=2e-4)
    assert found["grad_norms"] == pytest.approx(norms, rel=2e-3) and min(norms) > CLIPPING
    if name == "zero0":
        assert sum(found["micro_batches"]) == 4 + 4 + 4 + 2 + 4
    best = load_translator(folder / name / "best")[0].state_dict()
    for key, (first, wanted) in average.items():
        assert float((best[key] - wanted).norm()) < 5e-2 * float((wanted - first).norm()), key
