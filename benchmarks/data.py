#!/usr/bin/env python
"""How fast data is prepared, opened, loaded and augmented, each figure beside the plain way in the same run.

python benchmarks/data.py              all figures; writes benchmarks/results/data.json and docs/pictures/data.png
python benchmarks/data.py --quick      smaller corpora, to see that it runs; writes nothing
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch
from pose_format import Pose
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader
from pose_format.utils.generic import reduce_holistic

from toolkit.batching.collate import collate
from toolkit.batching.loader import train_batches
from toolkit.batching.order import epoch_order
from toolkit.cluster.devices import own_device
from toolkit.corpus.demo import find_lexicon
from toolkit.corpus.packed import Clip, Corpus, Metadata, Split
from toolkit.corpus.prepare import prepare
from toolkit.corpus.writer import finish_corpus, finish_split, shard_name, write_shard
from toolkit.models.build import build_processor, build_translator
from toolkit.models.loss import token_loss
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.augmentation import augment, draw_lengths
from toolkit.poses.features import extract_features
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import resolve
from toolkit.recipe.schema import Augmentation, Data

RESULTS = Path(__file__).parent / "results" / "data.json"
CHART = Path(__file__).parents[1] / "docs" / "pictures" / "data.png"
FRAMES = 97  # of a clip in the preparation benchmarks
BATCH = 32
_PLAIN, _OURS = "#b5b5b5", "#3b6ea5"
LANDMARKS = "holistic_178"  # the points that the plain way keeps, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller corpora; nothing is written")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        clips = _clips(Path(folder) / "clips", 512 if quick else 4096)
        for measure in (_preparation, _two_workers, _loading, _data_wait):
            results |= _print_rounded(measure(clips, Path(folder), quick))
        results |= _print_rounded(_index(Path(folder), 20_000 if quick else 1_000_000))
    results |= _print_rounded(_padding())
    results |= _print_rounded(_augmentation())
    results["machine"] = {"cores": psutil.cpu_count(), "torch_threads": 1, "quick": quick}
    if quick:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _chart(results, CHART)


def _print_rounded(figures: dict[str, float]) -> dict[str, float]:
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    print("  ".join(f"{name} {value:g}" for name, value in rounded.items()), flush=True)
    return rounded


def _interleaved(ours: Callable[[], float], plain: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Median seconds (or rate) of ours and of the plain way, and median of plain / ours over rounds that take turns.

    Other programs slow both halves of a round, so the ratio holds where the seconds do not.
    """
    pairs = [(ours(), plain()) for _ in range(rounds)]
    first, second = np.median(pairs, axis=0).tolist()
    return first, second, float(np.median([theirs / mine for mine, theirs in pairs]))


def _seconds(work: Callable[[], Any], calls: int) -> Callable[[], float]:
    """A round of so many calls, as seconds a call."""
    work()

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - started) / calls

    return measure


def _best(work: Callable[[], Any], repeats: int = 5, calls: int = 20) -> float:
    """Seconds of one call in the fastest of several rounds: other programs can only make a round slower."""
    work()
    rounds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        rounds.append((time.perf_counter() - started) / calls)
    return min(rounds)


def _clips(folder: Path, count: int) -> Path:
    """A table and ``count`` names of 32 different clips of 97 frames and 576 points, made from real letters."""
    (folder / "poses").mkdir(parents=True)
    files = sorted(find_lexicon().glob("ase/*.pose")) + sorted(find_lexicon().glob("asq/*.pose"))
    contents = [_as_576_points(file.read_bytes()) for file in files[:32]]
    rows = ["uid,text,split"]
    for index in range(count):
        path = folder / "poses" / f"clip-{index}.pose"
        first = folder / "poses" / f"clip-{index % len(contents)}.pose"
        if index < len(contents):
            path.write_bytes(contents[index])
        else:
            path.symlink_to(first)
        rows.append(f"clip-{index},a sentence of number {index} that is about as long as sentences are,train")
    (folder / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def _as_576_points(content: bytes) -> bytes:
    """A recording lengthened to 97 frames, its face of 478 points reduced to the 468 that most corpora have."""
    pose = Pose.read(content)
    frames = np.arange(FRAMES) % len(pose.body.data)
    kept = [point for point in range(586) if not 33 + 468 <= point < 33 + 478]
    components = list(pose.header.components)
    face = components[1]
    components[1] = type(face)(face.name, face.points[:468], [], [], face.format)
    header = PoseHeader(0.2, pose.header.dimensions, components)
    body = NumPyPoseBody(25, pose.body.data.data[frames][:, :, kept], pose.body.confidence[frames][:, :, kept])
    buffer = io.BytesIO()
    Pose(header, body).write(buffer)
    return buffer.getvalue()


def _plain_features(content: bytes) -> np.ndarray[Any, Any]:
    """The plain way: read, reduce, normalise, fill with zeros, take every second frame."""
    pose = reduce_holistic(Pose.read(content)).normalize()
    return pose.body.data.filled(0)[::2, 0]


def _preparation(clips: Path, folder: Path, quick: bool) -> dict[str, float]:
    landmarks = load_landmark_set(LANDMARKS)
    contents = [(clips / "poses" / f"clip-{index}.pose").read_bytes() for index in range(8)]
    ours, plain, speedup = _interleaved(
        _seconds(lambda: [extract_features(content, landmarks, 12.5) for content in contents], 20),
        _seconds(lambda: [_plain_features(content) for content in contents], 5),
        rounds=9,
    )
    return {
        "preparation_speedup": speedup,
        "preparation_clips_per_second_per_core": len(contents) / ours,
        "plain_clips_per_second_per_core": len(contents) / plain,
    }


def _prepared(clips: Path, out: Path, workers: int) -> tuple[Corpus, float]:
    data = Data(table=str(clips / "table.csv"), poses=str(clips / "poses"), landmarks=LANDMARKS, workers=workers)
    shutil.rmtree(out, ignore_errors=True)
    prepared = prepare(data, out)
    assert prepared.clips_per_second is not None
    return Corpus.open(out), prepared.clips_per_second


def _two_workers(clips: Path, folder: Path, quick: bool) -> dict[str, float]:
    one, two, speedup = _interleaved(
        lambda: _prepared(clips, folder / "corpus", 1)[1], lambda: _prepared(clips, folder / "corpus", 2)[1], rounds=5
    )
    return {
        "two_worker_speedup": speedup,
        "one_worker_clips_per_second": one,
        "two_worker_clips_per_second": two,
    }


def _loading(clips: Path, folder: Path, quick: bool) -> dict[str, float]:
    split = _prepared(clips, folder / "corpus", 2)[0].splits["train"]
    tokenizer = make_tokenizer("train", split.texts)
    indices = list(range(BATCH))

    def packed() -> None:
        collate(split.read(indices), indices, tokenizer, max_target_tokens=128)

    def plain() -> None:
        read = [_plain_features((clips / "poses" / f"clip-{index}.pose").read_bytes()) for index in indices]
        torch.nn.utils.rnn.pad_sequence([torch.from_numpy(np.asarray(values)) for values in read], batch_first=True)
        tokenizer(text_target=[split.texts[index] for index in indices])

    ours, theirs, speedup = _interleaved(_seconds(packed, 40), _seconds(plain, 3), rounds=9)
    return {"loading_speedup": speedup, "batches_per_second": 1 / ours, "plain_batches_per_second": 1 / theirs}


def _data_wait(clips: Path, folder: Path, quick: bool) -> dict[str, float]:
    """Share of the time of t5_small's steps that is spent waiting for the next batch, on this machine."""
    overrides = ["model.from_scratch=true", "model.tokenizer=train", f"data.corpus={folder / 'corpus'}"]
    overrides += [f"training.global_batch_size={BATCH}", f"training.micro_batch_size={BATCH}", "training.workers=1"]
    resolved = resolve(load_recipe("t5_small", overrides), 1, has_gpu=torch.cuda.is_available())
    corpus = Corpus.open(folder / "corpus")
    device = own_device()
    processor = build_processor(resolved.recipe, corpus)
    model = build_translator(resolved, corpus, processor.tokenizer).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    batches = train_batches(
        corpus.splits["train"], processor.tokenizer, resolved, landmark_set=corpus.landmark_set, epoch=0
    )
    next(batches)  # starting the workers is not a step's wait
    waited = worked = 0.0
    for _ in range(2 if quick else 6):
        started = time.perf_counter()
        (batch,) = next(batches)
        arrived = time.perf_counter()
        batch = batch.to(device)
        logits = model(batch.poses, batch.visible, batch.frame_mask, labels=batch.labels).logits
        loss = token_loss(logits, batch.labels) / batch.num_target_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        waited, worked = waited + arrived - started, worked + time.perf_counter() - arrived
    return {"data_wait_percent": 100 * waited / (waited + worked)}


def _index(folder: Path, clips: int) -> dict[str, float]:
    """A corpus of many tiny clips: opening it, the next epoch's order, and the memory of a process that reads it."""
    landmarks = LandmarkSet("one", (("POSE_LANDMARKS", "NOSE"),), {"body": (0,)}, (0,), (), ("x", "y"))
    corpus_folder, rng = folder / "index", np.random.default_rng(0)
    (corpus_folder / "train").mkdir(parents=True)
    shards = 256
    for number in range(shards):
        first, last = clips * number // shards, clips * (number + 1) // shards
        features = rng.normal(size=(4, 1, 2)).astype(np.float16)
        rows = [
            Clip(f"clip-{index}", f"the text of clip {index}", features, f"v{index}") for index in range(first, last)
        ]
        write_shard(corpus_folder / "train" / shard_name(number, shards), rows, landmarks.width)
    finish_split(corpus_folder / "train", landmarks.width)
    splits = {"train": {"clips": clips, "frames": 4 * clips}}
    finish_corpus(corpus_folder, Metadata(landmarks.to_dict(), 12.5, "none", splits=splits))

    started = time.perf_counter()
    split = Corpus.open(corpus_folder).splits["train"]
    split.clip(len(split) - 1), split.frames
    opened = time.perf_counter() - started
    lengths = _isign_like_lengths(clips)
    started = time.perf_counter()
    epoch_order(lengths, BATCH * 8, 0, 1)
    ordered = time.perf_counter() - started
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_read_much, args=(split, queue))
    worker.start()
    grown = queue.get(timeout=600)
    worker.join()
    return {"index_open_s": opened, "epoch_order_s": ordered, "worker_private_mib": grown, "index_clips": clips}


def _read_much(split: Split, queue: Any) -> None:
    """Report by how many MiB this process's own memory grows while it reads clips all over the corpus."""
    process = psutil.Process()
    before = process.memory_full_info().uss
    for index in np.random.default_rng(0).integers(0, len(split), 50_000).tolist():
        split.clip(index)
    queue.put((process.memory_full_info().uss - before) / 2**20)


def _isign_like_lengths(clips: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).lognormal(np.log(90), 0.6, clips).clip(16, 300).astype(np.int32)


def _padding() -> dict[str, float]:
    lengths = _isign_like_lengths(50_000)
    batches = epoch_order(lengths, BATCH, 0, 0)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return {
        "padding_percent": 100 * (1 - lengths.sum() / padded),
        "plain_padding_percent": 100 * (1 - lengths.mean() / 300),
    }


def _augmentation() -> dict[str, float]:
    settings = Augmentation(
        rotation=10, scale=0.1, shear=0.1, translation=0.1, noise=0.01, speed=0.1, time_warp=0.05, frame_drop=0.05,
        landmark_drop=0.02, hand_drop=0.02, mirror=0.5, temporal_crop=0.1,
    )  # fmt: skip
    landmarks = load_landmark_set(LANDMARKS)
    rng = np.random.default_rng(0)
    poses = torch.from_numpy(rng.normal(size=(BATCH, 128, landmarks.num_points, 3)).astype(np.float32))
    visible, mask = torch.ones(poses.shape[:3], dtype=torch.bool), torch.ones(poses.shape[:2], dtype=torch.bool)
    lengths = draw_lengths(np.full(BATCH, 128), settings, rng)
    generators = [np.random.default_rng(clip) for clip in range(BATCH)]
    seconds = _best(lambda: augment(poses, visible, mask, settings, landmarks, lengths, generators), calls=5)
    return {"augmentation_ms": 1000 * seconds}


def _chart(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    speedups = ("preparation_speedup", "loading_speedup", "two_worker_speedup")
    preparation, loading, workers = (f"{results[name]:.2g} times as fast" for name in speedups)
    plain, ours = "pose-format,\nevery epoch again", "packed corpus"
    # Of each panel: title, what the figure shows, and a bar each of name, key and color.
    panels = [
        (f"Preparation, {preparation}", "clips/s on one core", [
            ("pose-format\nand numpy", "plain_clips_per_second_per_core", _PLAIN),
            ("toolkit", "preparation_clips_per_second_per_core", _OURS)]),
        (f"Loading, {loading}", f"batches of {BATCH}/s on one core", [
            (plain, "plain_batches_per_second", _PLAIN), (ours, "batches_per_second", _OURS)]),
        (f"A second worker, {workers}", "clips/s", [
            ("1 worker", "one_worker_clips_per_second", _OURS), ("2 workers", "two_worker_clips_per_second", _OURS)]),
        ("Padding", "% of a batch's frames", [
            ("all to\n300 frames", "plain_padding_percent", _PLAIN), ("by length", "padding_percent", _OURS)]),
    ]  # fmt: skip
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axis, (title, unit, bars) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        names, keys, colors = zip(*bars, strict=True)
        drawn = axis.bar(names, [results[key] for key in keys], color=colors, width=0.6)
        axis.bar_label(drawn, labels=[_short(results[key]) for key in keys], padding=2)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    figure.savefig(path, dpi=100)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
