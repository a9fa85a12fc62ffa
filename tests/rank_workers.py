"""Cases that several ranks run one after the other in one start, which costs more than a small training.

A test calls :func:`run_worker`, which starts a worker script on the ranks. The script calls :func:`run_cases`, or
:func:`joined` where its plan has no such cases.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpuinfo
import xxhash
from torch import Tensor
from torch import distributed as dist

from toolkit.checkpointing import run_directory
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.ops import use_extensions_dir
from toolkit.cluster.process_group import join_process_group, leave_process_group
from toolkit.cluster.ranks import Ranks, read_ranks
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import ensure_corpus
from toolkit.errors import UserError
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import ResolvedRun, resolve_named
from toolkit.training.monitoring.interruptions import Interruptions

Case = dict[str, Any]
Result = dict[str, Any]


def prepared(settings: list[str]) -> list[str]:
    """Overrides that name a prepared corpus in place of a table and poses, without those of the DeepSpeed JSON."""
    corpus = ensure_corpus(load_recipe("t5_small", [value for value in settings if value.startswith("data.")]).data)
    return [*(value for value in settings if not value.startswith(("data.", "ds."))), f"data.corpus={corpus}"]


def run_worker(run: Callable[..., Any], script: str, folder: Path, *, ranks: int, **plan: Any) -> Any:
    """Run a worker script on so many ranks.

    Args:
        run: runs a command to its end; the fixture of that name.
        script: path of the worker script, from the root of the repository.
        folder: gets the plan, the results and what the cases write.
        ranks: how many; 0 starts one without a launcher.
        plan: for the worker: its ``cases`` by name, the ``settings`` that they share, and what else it reads.

    Returns:
        what the worker wrote as results.
    """
    number = len(list(folder.glob("plan_*.json")))
    results, file = folder / f"results_{number}.json", folder / f"plan_{number}.json"
    file.write_text(json.dumps({"folder": str(folder), "results": str(results), **plan}))
    done = run(script, file, ranks=ranks)
    assert done.code == 0, done.out[-4000:] + done.err[-4000:]
    return json.loads(results.read_text())


@dataclass(frozen=True)
class Worker:
    """One rank of a worker script, in the process group.

    Attributes:
        plan: what the test gave to :func:`run_worker`.
        ranks: which rank this is.
    """

    plan: dict[str, Any]
    ranks: Ranks

    @property
    def folder(self) -> Path:
        return Path(self.plan["folder"])

    def write(self, results: Any) -> None:
        """Write the results of rank 0 for the test."""
        if self.ranks.is_main:
            Path(self.plan["results"]).write_text(json.dumps(results))


def once_for_all_engines() -> None:
    """Do once what DeepSpeed does again for every engine of this process.

    It collects garbage several times, over all objects of the imports, and asks for the maker of the processor with
    every CPUAdam, in a process of its own.
    """
    gc.freeze()
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


@contextmanager
def joined() -> Iterator[Worker]:
    """Within it this process is one rank of a worker script."""
    use_extensions_dir()
    once_for_all_engines()
    plan = json.loads(Path(sys.argv[-1]).read_text())
    ranks = read_ranks()
    log_to_file(None)
    join_process_group(ranks)
    yield Worker(plan, ranks)
    leave_process_group()


def run_cases(train: Callable[[Case, list[str], Path, Ranks], Result]) -> None:
    """Be one rank that trains all cases of the plan, each in a run directory of its own.

    Args:
        train: takes a case, the settings that all share, its run directory and the rank; gives the case's result.
    """
    with joined() as worker:
        cases, settings = worker.plan["cases"], worker.plan["settings"]
        worker.write({name: train(case, settings, worker.folder / name, worker.ranks) for name, case in cases.items()})


def start_run(case: Case, settings: list[str], run_dir: Path, ranks: Ranks) -> tuple[ResolvedRun, Corpus]:
    """Resolve a case and write its run directory; all ranks call this.

    Args:
        case: its ``ds`` names the DeepSpeed JSON, its ``overrides`` come after ``settings``.
    """
    overrides = [*settings, *case.get("overrides", []), f"run.dir={run_dir}"]
    resolved = resolve_named("t5_small", overrides, ranks.world_size, has_gpu=False, ds=case["ds"])
    corpus = Corpus.open(resolved.recipe.data.corpus or "")
    if ranks.is_main:
        run_directory.start(resolved, corpus)
    dist.barrier()
    return resolved, corpus


@contextmanager
def ends_in(result: Result, interruptions: Interruptions) -> Iterator[None]:
    """Put an error that ends a case into its result, so that the next case runs."""
    try:
        yield
    except UserError as error:
        result["refused"] = str(error)
    except Exception:
        result["failed"] = traceback.format_exc()
    finally:
        interruptions.close()


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of optimizer steps in a run's metrics.jsonl; none where there is no such file."""
    file = run_dir / "metrics.jsonl"
    entries = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return [entry for entry in entries if entry["kind"] == "train"]


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Digest of weights, alike only where all are equal bit by bit in fp32."""
    digest = xxhash.xxh3_64()
    for _, tensor in sorted(weights.items()):
        digest.update(tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


def change_weights(engine: Any) -> None:
    """Add one to every trained weight that the next forward pass would use, so that loading must restore it."""
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            stored = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
            stored.data.add_(1.0)
