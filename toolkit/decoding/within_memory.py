"""Searches for which memory is short: without the graphs of others, whose memory they get, and then in halves.

The texts of a clip do not depend on its batch. Ranks that step together cannot search so: one would leave the others in
a collective.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from toolkit.cluster.memory_shortage import in_short, is_out_of_memory
from toolkit.decoding.search import Hypothesis
from toolkit.decoding.step_graphs import StepGraphs

log = logging.getLogger("toolkit")


class Clips(Protocol):
    """A batch."""

    def __len__(self) -> int: ...


Part = TypeVar("Part", bound=Clips)


@dataclass
class SearchWithinMemory(Generic[Part]):
    """Finds the hypotheses of batches.

    Attributes:
        search: finds those of a batch, with graphs or None.
        halves: the two halves of a batch.
        graphs: None where steps run as they are written, and from the first batch on for which memory was short.
        is_halving: whether a batch was searched in halves; a line in the log says so once.
    """

    search: Callable[[Part, StepGraphs | None], list[list[Hypothesis]]]
    halves: Callable[[Part], tuple[Part, Part]]
    graphs: StepGraphs | None = None
    is_halving: bool = False

    def find(self, part: Part) -> list[list[Hypothesis]]:
        """The hypotheses of a batch.

        Raises:
            RuntimeError, MemoryError: there is too little memory for a single clip.
        """
        try:
            return self.search(part, self.graphs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or (self.graphs is None and len(part) < 2):
                raise
            said = in_short(error)
        # The error and its traceback are gone, and with them the tensors of the search.
        had_graphs, self.graphs = self.graphs is not None, None
        gc.collect()
        torch.cuda.empty_cache()
        if had_graphs:
            log.warning("search: steps run without CUDA graphs from here on, whose memory was needed: %s", said)
            return self.find(part)
        if not self.is_halving:
            self.is_halving = True
            log.warning("search: batches for which memory is short are searched in halves from here on: %s", said)
        return [row for half in self.halves(part) for row in self.find(half)]
