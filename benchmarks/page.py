#!/usr/bin/env python
"""Writes docs/benchmarks.md from benchmarks/results: the page holds no figure that a benchmark did not write.

python benchmarks/page.py     after any benchmark; a test says when the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_aims import aims_of, draw

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
SECTIONS = {  # results file -> heading, command, what it measures
    "training": (
        "Training",
        "python benchmarks/training.py",
        "Full-size T5-Small, clips and sentences as long as iSign's. All ways of training take turns on the same "
        "machine, with the same model, clips, micro-batch and optimizer. Ours is what recipe `t5_small` does: ZeRO-1, "
        "which on one rank sums gradients without sending them; `ratio_both_zero2` is ours under the ZeRO-2 that "
        "Seq2SeqTrainer gets. The bare loop has our ZeRO-1, quick layers and allocator settings, ready batches and "
        "DeepSpeed's sum of gradients over ranks, which ours leaves out where there is one: loading, guards and "
        "figures are what ours has besides. MFU is model FLOPs over those of a matrix product "
        "measured after each turn in the same process; a row has all changes of those above it. `auto_vs_...` is "
        "recipe `t5_small` as it is (128 clips a step, micro-batches that it chooses) against micro-batches of 8, "
        "against steps of 32 clips in micro-batches of 8 (`_before`: at the commit that the row names), and against "
        "Seq2SeqTrainer's defaults (steps of 8 clips, ZeRO-2); a turn is one epoch of 512 clips, a ratio "
        "the median over turns. So few clips are padded more in steps of 128 than in steps of 32, which many clips "
        "are not (see the padding of 4,096 below). `auto_bound` is a turn of `auto` in torch's profiler: what share of "
        "it are matrix products and convolutions, how near these come to the processor's peak, and how much faster "
        "the turn would be without all other calls; `frames_with_padding` are the frames of its batches by those of "
        "its clips.",
    ),
    "host_cost": (
        "What a micro-batch costs the host",
        "python benchmarks/host_cost.py",
        "T5-Base of full depth and hardly any width on one thread: what is left is Python, dispatch and hooks. The "
        "code is that of a GPU, where attention, dropout and normalisation are one call each; micro-batches have four "
        "clips, all of one length, for oneDNN makes a kernel for each new shape; `zero1_8` is ZeRO-1 with eight of "
        "them a step. ZeRO-0 computes in autocast, as its JSON says, the others in fp32. `ours_with_all_calls` is ours "
        "without [gpu_layers.py](../toolkit/models/gpu_layers.py) and with what DeepSpeed does for every parameter "
        "that ours leaves out; `plain` is PyTorch alone. Operator calls and kernels are those of a step, its optimizer "
        "included, by its micro-batches; kernels are the calls that start one, and `operator_calls_saved` is the share "
        "that ours saves of `ours_with_all_calls`. Waits are how often in a step the host would wait for a GPU, by "
        "whose code; `waits` has them under every DeepSpeed JSON that runs on a CPU, in its own precision, with eight "
        "micro-batches: see [performance.md](performance.md#waiting-for-the-host).",
    ),
    "launches": (
        "What a step asks of a GPU and its host",
        "/path/to/python benchmarks/launches.py",
        "T5-Base of full size, one rank's part of 128 clips on eight GPUs: 16 clips, one forward pass, ZeRO-0 with "
        "autocast (`hf`, Seq2SeqTrainer, ZeRO-2). A Python with a CUDA build of torch, and the pretended CUDA runtime "
        "(`tests/pretended_cuda`) in place of a GPU: dispatch, DeepSpeed, Inductor and CUDA graphs are those of a "
        "GPU, kernels do nothing, and a step takes what its host needs. Launches are the calls that start a kernel or "
        "a graph, waits the times that the host waits for the GPU. `first_epoch_seconds` are those of 32 steps that "
        "compile and capture. It is no speed of a GPU: on an H200 the kernels of such a step took 11 ms (below).",
    ),
    "roofline": (
        "What the kernels of a step compute and move",
        "/path/to/python benchmarks/roofline.py",
        "**Arithmetic, not a measurement**: what an H100 and an H200 (SXM) need at least for the kernels of an "
        "optimizer step, if each reads and writes its tensors once in their HBM (3.35 and 4.8 TB/s), computes at the "
        "peak of its type (989.4 TFLOPS in bf16, dense) and takes 3 us (assumed), as NVIDIA's data sheets say of the "
        "[H100](https://www.nvidia.com/en-us/data-center/h100/) and the "
        "[H200](https://www.nvidia.com/en-us/data-center/h200/). A kernel whose tensors are in the cache may be "
        "faster, and matrix products are slower. Kernels are those that torch, DeepSpeed and Inductor call on the "
        "pretended CUDA runtime (`tests/pretended_cuda`), without NCCL's; weights have their published sizes, and an "
        "epoch of four steps is padded more than that of a large corpus. Ways of training and their micro-batches are"
        " those of `gpu.py`, with layers as written in place of graphs; rows of T5-Large and T5-3B are of torch "
        "2.11 and have Seq2SeqTrainer under ZeRO-2. T5-Large and "
        "T5-3B keep their activations, as cards of 80 GB can, and smaller micro-batches than ours are padded less. "
        "`mfu` is that of such a step: FLOPs of products, padding included and recomputation not, by its time and "
        "peak. `kernels of ...` are those that take the H100 longest, all calls of a place together.",
    ),
    "gpu": (
        "On a GPU",
        "python benchmarks/gpu.py",
        "Random weights of published sizes, clips and sentences as long as iSign's; each row says its device. Sides "
        "take turns, every turn of a side over the same batches, which are loaded before it: `hf_16` is "
        "Seq2SeqTrainer with micro-batches of 16, `hf_best` with ours, both with our DeepSpeed JSON "
        "(`t5_base_16_as_written`: with ZeRO-2), workers, page-locked memory, fused AdamW and bf16; `bare` a "
        "DeepSpeed engine with our layers, `plain` PyTorch's autocast with transformers' layers, `fastest` the same "
        "loop with our layers, compiled as ours, and our loss. T5-Large is one micro-batch, as `auto` takes on such a"
        " card, and `ours_64` two, as its peers, whose clips are padded less. MFU is model FLOPs, padding included, "
        "over those of a matrix product measured after each turn in the same process (`product_tflops`; data sheets "
        "promise more, 989 of an H100). `busy` is the share of a step in which the chip computes or copies; a launch "
        "is a call of the host, which starts a kernel, a copy or a graph of many. `made_in_turns` says that layers "
        "were compiled or passes captured in turns that count; `first_turn_seconds` are those beside all other sides."
        " `t5_base_starts` are seconds from the start of a process to the end of an epoch, compiled for the first "
        "time, later from the cache, and without. `t5_base_as_typed` is the command that a user types, on 1, 2, 4 ..."
        " GPUs, its loader included: the share of its time that ranks wait for data, and its peak beside the plan. "
        "`evaluation` is 128 clips by ours and 64 by HuggingFace's `generate`, 16 at a time and all at once.",
    ),
    "large_models": (
        "Large models on a small machine",
        "python benchmarks/large_models.py",
        "Full-size models with random weights, clips of 64 frames. Memory is the largest resident size of one rank; "
        "[planning.md](planning.md) says how near its plan comes.",
    ),
    "auto_micro_batch": (
        "Micro-batches that are chosen",
        "python benchmarks/auto_micro_batch.py",
        "Clips a second of two ranks with the micro-batch that `auto` chooses, and with the best power of two that a "
        "sweep finds. The command also sweeps T5-Base with two of its layers, and takes runs of random models and "
        "DeepSpeed JSONs, two steps and an evaluation, under limits of addresses (`ulimit -v`) or of a memory cgroup "
        "that lie between the plans of the smallest and the largest micro-batches: `binds` where larger ones did not "
        "fit. Rows appear here when they have been measured.",
    ),
    "memory": (
        "Memory of each DeepSpeed JSON",
        "python benchmarks/memory.py",
        "The same model under every JSON that runs on a CPU.",
    ),
    "planning": (
        "Plans of memory",
        "python benchmarks/planning.py",
        "What a plan says against what a rank took, two ranks on CPUs: the growth of the resident set over its "
        "libraries; models have few layers of their published width. `off` is that of the larger phase. T5-3B has all "
        "of its layers, and the peak is that of the whole process, as `large_models.py` measured it. "
        "`python benchmarks/planning.py --plans` measures `launch/plan.py` over all JSONs, on 8 GPUs of 24 GiB each, "
        "from its start to its end.",
    ),
    "planning_gpu": (
        "Plans of a GPU's memory",
        "/path/to/python benchmarks/planning_gpu.py",
        "What a plan says against what torch's caching allocator held on the fullest rank, in each phase of a run, "
        "without the CUDA context and without what lies free between blocks: a Python with a CUDA build of torch, and "
        "the pretended CUDA runtime (`tests/pretended_cuda`) in place of GPUs. Weights are random and of published "
        "size, kernels compute nothing, clips have 150 frames and texts 20 words. The plan is that of the micro-batch "
        "that was computed; `off` is that of the largest phase, negative where a plan says too little.",
    ),
    "evaluation": (
        "Evaluation",
        "python benchmarks/evaluation.py --model runs/demo",
        "With the demo's model. Texts of both ways are compared and must be equal. `language_model` rows are of "
        "`python benchmarks/evaluation_prefixes.py`: SmolLM2-135M with random weights behind poses, beside "
        "HuggingFace's `generate(inputs_embeds=...)` in a process of its own, in processor time of one thread; memory "
        "is the peak beyond the weights. No text ends before its last token, so no clip leaves the search early.",
    ),
    "search_steps": (
        "What a token of a search costs the host",
        "python benchmarks/search_steps.py",
        "T5-Base of full depth and hardly any width, 16 clips with 5 beams on one thread: what is left is Python and "
        "dispatch. `ours_graphs` is the code of a GPU, whose steps are replays; a replay costs nothing here, where a "
        "GPU takes one launch. `ours_static_cache` runs the same calls as they are written. Kernels are the calls "
        "that start one; see [performance.md](performance.md#a-search-without-launches).",
    ),
    "positions": (
        "Pose encoders and positions",
        "python benchmarks/positions.py",
        "The demo's recipe, shortened and without CTC, after the same number of steps.",
    ),
    "data": (
        "Data",
        "python benchmarks/data.py",
        "Each figure beside the plain way in the same run; see [data.md](data.md).",
    ),
    "features": (
        "Features of another network",
        "python benchmarks/features.py",
        "768 numbers a frame, read out of the memory map into batches of 32 clips, texts and all, beside copies of the "
        "same clips held in memory. In the first epoch (`first_gb_per_s`) a process maps the pages and looks each clip "
        "up; the ratio is that of the following ones, for the first 32,768 clips of a split that it reads. See "
        "[data.md](data.md#features-of-another-network).",
    ),
    "padding": (
        "Padding to a ladder of lengths",
        "python benchmarks/padding.py",
        "Batches padded to at most 16 lengths, and texts to 6, beside batches padded to their longest clip and text: "
        "padding in percent of an epoch's frames, forward passes of a rank, and different shapes. `points` and "
        "`text_points` are what the ladder adds to the padding of frames and of target tokens; see "
        "[performance.md](performance.md#few-shapes).",
    ),
    "transfer": (
        "Transfer to another sign language",
        "python benchmarks/transfer.py --model runs/demo",
        "Character error rate on 160 phrases of sign languages that the demo never saw, after training on 200 others "
        "that share no word with them: from the demo's model and from scratch; with `--mix` besides mixed with the "
        "demo's corpus, and the demo's model alone; see [transfer.md](transfer.md).",
    ),
    "mixing": (
        "Mixes of corpora",
        "python benchmarks/mixing.py",
        "Several corpora opened and ordered as one, and four corpora beside one with as many clips: padding of an "
        "epoch, what the loader of one process gives in a second of processor time, and clips a second of training a "
        "tiny model, loading included, both sides in turn; see "
        "[transfer.md](transfer.md#a-mix-of-three-corpora).",
    ),
    "vocabulary": (
        "A trimmed vocabulary",
        "python benchmarks/vocabulary.py",
        "mT5-Base with random weights on Hindi-like and English texts, with all tokens and with those that the texts "
        "need; two processes take turns. States are weights, fp32 copies and moments; see "
        "[transfer.md](transfer.md#a-vocabulary-for-the-corpus).",
    ),
    "failures": (
        "Failures",
        "python benchmarks/failures.py",
        "Seconds from a fault in the last rank until its reason is on the terminal, and until no process of the run is "
        "left; the worst of all faults, then each by itself. The bare script meets the error of `step_1` on two ranks.",
    ),
    "demo": ("The demo", "python benchmarks/demo.py", "A bare clone of the repository, from nothing to scores."),
    "demo_kinds": (
        "The demo with a language model",
        "python benchmarks/demo_kinds.py --model runs/demo",
        "The demo's T5 and a language model of its width in its place (`--recipe demo model.backbone=demo_causal`), "
        "both from scratch, with the same clips and settings; the language model with fewer steps, and with as many, "
        "which the figures compare. `cer_decoder_alone` is the search without the CTC "
        "head's scores. Minutes are steps times the median processor time of a step of one rank, in turns.",
    ),
}
LONGEST = 120  # characters of an error in a table
HEAD = """# Benchmarks

Every figure here was written by the command above it into `benchmarks/results`, and this page is drawn from there by
`python benchmarks/page.py`. Machines are noisy: what holds is the ratio of two ways that took turns in one run.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="default %(default)s; pictures/ lies beside it")
    arguments = parser.parse_args()
    of_gpu = arguments.results / "gpu.json"
    if of_gpu.exists() and aims_of(results := json.loads(of_gpu.read_text(encoding="utf-8"))):
        draw(results, arguments.page.parent / "pictures" / "gpu.png")
    arguments.page.write_text(page(arguments.results, arguments.page), encoding="utf-8")
    print(f"wrote {arguments.page}")


def page(results_folder: Path = RESULTS, place: Path = PAGE) -> str:
    """The whole page, in Markdown, from a folder of results; a picture is drawn where it lies beside the page."""
    parts = [HEAD]
    for name, (heading, command, description) in SECTIONS.items():
        path = results_folder / f"{name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"## {heading}\n\n    {command}\n\n{description}\n")
        if (place.parent / "pictures" / f"{name}.png").exists():
            parts.append(f"![{heading}](pictures/{name}.png)\n")
        if name == "gpu" and (aims := aims_of(results)):
            parts.append(f"Asked of one GPU, and reached; speeds are by those of a peer:\n\n{table(aims)}\n")
        parts.extend(f"{table}\n" for table in tables(results))
    return "\n".join(parts)


def tables(results: Any) -> Iterator[str]:
    """One table of rows; or one of comparisons, one of plain figures, and one for each list or mapping inside."""
    if isinstance(results, list):
        yield table(results)
        return
    results = {key: value for key, value in results.items() if key != "machine"}
    comparisons = [{"figure": key, **flat(value)} for key, value in results.items() if is_comparison(value)]
    if comparisons:
        yield table(comparisons)
    figures = [{"figure": key, "value": value} for key, value in results.items() if is_figure(value)]
    if figures:
        yield table(figures)
    for key, value in results.items():
        if key == "splits":
            rows = [{"split": name, "clips": split["clips"], **split["scores"]} for name, split in value.items()]
            yield table(rows)
        elif isinstance(value, list):
            yield f"`{key}`\n\n{table(value)}"
        elif isinstance(value, dict):
            plain = {name: row for name, row in value.items() if is_figure(row)}
            if plain and not is_comparison(value):
                yield f"`{key}`\n\n{table([plain])}"
            for inner, rows in value.items():
                if (
                    inner != "machine"
                    and isinstance(rows, dict)
                    and all(isinstance(row, dict) for row in rows.values())
                ):
                    yield f"`{key}`, {inner}\n\n{table([{'': name, **row} for name, row in rows.items()])}"


def is_comparison(value: Any) -> bool:
    return isinstance(value, dict) and "target" in value


def is_figure(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A comparison as ``ours``, ``peer``, ``ratio`` and ``target``; what else it says follows in one column."""
    known: dict[str, Any] = {"ours": "", "peer": "", "ratio": "", "asked": row["target"]}
    rest = {}
    for key, value in row.items():
        if not is_figure(value) or key == "target":
            continue
        if key == "ratio":
            known["ratio"] = value
        elif key.startswith("ours_") and not known["ours"]:
            known["ours"] = f"{short(value)} {unit_of(key)}"
        elif key.startswith(("peer_", "plain_", "hf_", "bare_", "sacrebleu_")) and not known["peer"]:
            known["peer"] = f"{short(value)} {unit_of(key)}"
        else:
            rest[key] = value
    return known | {"besides": ", ".join(f"{key} {short(value)}" for key, value in rest.items())}


def unit_of(key: str) -> str:
    return key.split("_", 1)[1].replace("clips_per_second", "clips/s").replace("seconds", "s")


def short(value: Any) -> str:
    """A value as a cell of a table says it."""
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value).replace("|", "\\|")


def cell(row: dict[str, Any], column: str) -> str:
    """A row's value in a column of a table."""
    value = row.get(column, "")
    return failure(value) if column == "error" else short(value)


def failure(text: str) -> str:
    """An error as a cell: its last line, or its first one where others were left out after it."""
    lines = text.strip().split("\n")
    line = lines[0] if "..." in lines else lines[-1]
    return (line if len(line) <= LONGEST else f"{line[:LONGEST]} ...").replace("|", "\\|")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; columns in the order in which rows first have them, empty ones left out."""
    rows = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([cell(row, key) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
