"""The parallel part of preparation on a Ray cluster: one builder for each processor, wherever it is.

The machines must see the same folders, as those of an array job must. What comes out is the same, byte for byte.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.corpus.shards import Record, Shard, Work, build_shards
from toolkit.errors import UserError

CODE = Path(__file__).resolve().parents[2]


def build_on_ray(work: Work, shards: Sequence[Shard], address: str, workers: int = 0) -> Iterator[Record]:
    """Build shards on a Ray cluster that is already running.

    Args:
        work: what they are functions of.
        shards: those to build.
        address: of the cluster's head (``host:6379``), or ``auto`` on one of its machines.
        workers: most builders at a time; 0 = as many as the cluster has processors.

    Yields:
        the record of each shard as it is finished.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    if not shards:
        return
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise UserError('--ray needs Ray: pip install "sign-language-translation-toolkit[ray]"') from error
    _knock(address)
    try:
        # Builders may start in any folder; they find the toolkit where this process has it.
        ray.init(
            address=address,
            runtime_env={"env_vars": {"PYTHONPATH": f"{CODE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no Ray cluster answers there ({_first_line(error)})") from error
    try:
        processors = int(ray.cluster_resources().get("CPU", 1))
        shared = ray.put(replace(work, folder=work.folder.absolute()))
        # A builder whose machine is lost starts again elsewhere: a shard does not mind being built twice.
        builder: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Builder)
        builders = min(workers or processors, processors, len(shards))
        pool: Any = ActorPool([builder.remote(shared) for _ in range(builders)])
        yield from pool.map_unordered(lambda actor, shard: actor.build.remote(shard), shards)
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See that something listens at ``host:port``: Ray itself would go on trying for many minutes.

    Raises:
        UserError: nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like, which Ray looks up in this machine's own files
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"--ray {address}: nothing answers there ({error}); is the cluster up?") from error


class _Builder:
    """Builds shards one after the other in a process of its own; it gets the work once, not with every shard."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def build(self, shard: Shard) -> Record:
        (record,) = build_shards(self.work, [shard], workers=1)
        return record


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
