"""The steps of a beam search as CUDA graphs: a token costs the host one call and not one for each kernel.

A graph belongs to a number of clips and a length of texts. Both have few values: clips are dropped by halves, and
lengths double. Graphs live as long as the translation of one split, because weights may lie elsewhere afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.cluster.memory_shortage import in_short
from toolkit.decoding.held_clips import EncodedClips, PrefixClips, set_attention
from toolkit.decoding.static_cache import STATIC_ATTENTION, StaticCache, StoredClips
from toolkit.models.adaptation.quantisation import is_packed
from toolkit.models.backbone import decoder_config
from toolkit.models.language_models.prefixes import is_language_model

# Encoder-decoders, by the model type of their decoder, which compute a step without an answer from the GPU.
ENCODER_DECODERS = frozenset({"t5", "mt5", "umt5", "bart", "mbart", "m2m_100", "pegasus", "marian", "gpt2"})
ASKING_POSITIONS = "M2M100SinusoidalPositionalEmbedding"
SHORTEST = 32  # tokens of the first graphs of a batch; the next ones are for twice as many
DROP_SHARE = 0.5  # of the clips that are done before the others are moved together
MOST_GRAPHS = 64  # of one split's; further steps run without

log = logging.getLogger("toolkit")
_failed: list[Any] = []  # graphs that torch still asks


class Capture(Protocol):
    """How a call becomes a graph."""

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Run the call, which may be repeated: its result, and what computes it again into the same memory.

        Raises:
            RuntimeError: it cannot be captured.
        """


class CudaGraphs:
    """Captures calls as CUDA graphs on the current device, in one pool of memory; each result is used at once.

    They run on the current stream, or on that of all graphs where that is the default one, which cannot be captured.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.first: Any = None  # a pool without a graph could not be used again

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with self._on_stream():
            call()  # libraries allocate what they need at their first call, which a capture forbids
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # within a capture the allocator cannot free what it keeps for others
        graph = torch.cuda.CUDAGraph()
        with self._on_stream(), _without_garbage_collection():
            try:
                # Other threads of this process may use the GPU meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                result = call()
                graph.capture_end()
            except BaseException:
                _end_failed(graph, self.pool)
                self.pool = self.first = None  # of the host's part of this pool torch says that it still records
                raise
        self.first = self.first or graph
        graph.replay()  # a capture computes nothing
        return result, graph.replay

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        around = torch.cuda.current_stream()
        if around != torch.cuda.default_stream():
            yield
            return
        with on_stream(stream_of_graphs()):
            yield


@cache
def stream_of_graphs() -> Any:
    """The stream of all CUDA graphs of this process, on its GPU.

    Each evaluation has graphs of its own. With streams of their own cuBLAS would keep a workspace for each.
    """
    return torch.cuda.Stream()


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Within it calls go to a stream of the current GPU, after all that went to the stream around it, which waits."""
    if stream is None:  # not a GPU
        yield
        return
    around = torch.cuda.current_stream()
    stream.wait_stream(around)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        around.wait_stream(stream)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """What is deleted within a capture, such as a compiled module, can end it; so nothing is collected."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _end_failed(graph: Any, pool: Any) -> None:
    """End a capture that has failed on the current stream, so that calls outside a graph work as before it.

    torch 2.11 leaves a failed one in the middle: the allocator stays in its pool and keeps freed memory of other
    streams, and random numbers are drawn as within a graph, which the next dropout refuses; an empty capture ends that.
    The allocator of pinned memory asks the graph at each allocation from then on, and crashes where it is deleted.
    torch 2.13 ends all of that itself; the end of a capture that has ended leaves it an error for the next kernel.
    Neither gives back the pool, whose memory would stay when all other graphs of it are gone.
    """
    _failed.append(graph)
    if torch.cuda.is_current_stream_capturing():
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_stream().device_index, pool)
    with contextlib.suppress(RuntimeError):
        _give_back(graph, pool)
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        empty = torch.cuda.CUDAGraph()
        empty.capture_begin(capture_error_mode="thread_local")
        empty.capture_end()


def _give_back(graph: Any, pool: Any) -> None:
    """Have a graph whose capture has failed count no longer among those that use a pool of memory."""
    try:
        graph.pool()  # refused unless its capture has ended, as one with work that is not joined has
    except RuntimeError:
        torch._C._cuda_releasePool(torch.cuda.current_stream().device_index, pool)
    else:
        graph.reset()


class StepGraphs:
    """Memory and graphs of the steps of one model's searches."""

    def __init__(self, capture: Capture) -> None:
        self.capture: Capture | None = capture
        self.cache: StaticCache | None = None
        self.graphs: dict[tuple[int, int], tuple[Tensor, Callable[[], None]]] = {}

    def take(self, stored: StoredClips, beams: int, length: int) -> int:
        """Store what a search holds after its first step; gives the tokens of each text so far."""
        clips = len(stored.mask)
        if self.cache is None or not self.cache.holds(stored, clips, beams, length):
            self.graphs.clear()
            self.cache = None  # its memory is free before the next one is made
            self.cache = StaticCache(stored, clips, beams, length)
        return self.cache.store(stored)

    def scores(self, model: Any, clips: int, tokens: int) -> Tensor:
        """Scores of the next tokens of the first clips [rows, vocabulary], after so many tokens."""
        cache = self.cache
        assert cache is not None
        now, span = _clips_of_graph(cache.clips, clips), _span_of_graph(cache.length, tokens)

        def call() -> Tensor:
            cache.begin(now, span)
            output = model(**cache.inputs(), past_key_values=cache.cache, use_cache=True, return_dict=True)
            return cache.scores[: now * cache.beams].copy_(output.logits[:, -1])

        if (now, span) in self.graphs:
            logits, replay = self.graphs[now, span]
            replay()
        elif self.capture is None or len(self.graphs) >= MOST_GRAPHS:
            logits = call()
        else:
            logits = self._captured(call, (now, span))
        return logits[: clips * cache.beams]

    def _captured(self, call: Callable[[], Tensor], key: tuple[int, int]) -> Tensor:
        assert self.capture is not None
        try:
            self.graphs[key] = self.capture(call)
        except RuntimeError as error:  # of torch or CUDA, which say what the capture met
            self.capture = None
            log.warning("search: steps run without CUDA graphs from here on: %s", in_short(error))
            return call()
        return self.graphs[key][0]


def capture_on(device: torch.device) -> Capture | None:
    """How calls on a device are captured; None where there are no graphs."""
    return CudaGraphs() if device.type == "cuda" else None


def graphs_of_search(model: Any, *, wanted: bool) -> StepGraphs | None:
    """Graphs for the searches of a translator; None where they are not wanted, or not possible.

    A line in the log names a backbone for which they are not.
    """
    capture = capture_on(next(model.parameters()).device) if wanted else None
    if capture is None:
        return None
    if reason := _obstacle(model.backbone):
        _say_once(reason)
        return None
    return StepGraphs(capture)


@cache
def _say_once(reason: str) -> None:
    """Not for every split of every evaluation."""
    log.info("search: steps run without CUDA graphs (%s)", reason)


def _obstacle(backbone: Any) -> str | None:
    """Why the steps of a backbone cannot be captured; None where they can."""
    if any(map(is_packed, backbone.parameters())):
        return "bitsandbytes launches kernels of quantised layers by itself"
    kind, attention = decoder_config(backbone.config).model_type, backbone.config._attn_implementation
    if is_language_model(backbone.config) or (kind in ENCODER_DECODERS and attention == "sdpa"):
        return None
    return f"a decoder of {kind} with {attention} attention"


class GraphedClips:
    """What a search holds of its clips; the first step runs as it is written, all others by graphs."""

    drop_share = DROP_SHARE

    def __init__(self, held: EncodedClips | PrefixClips, graphs: StepGraphs, length: int) -> None:
        self.held: EncodedClips | PrefixClips | None = held
        self.model, self.beams, self.graphs, self.length = held.model, held.beams, graphs, length
        self.clips, self.tokens = 0, 0
        self.first_scores: Any = None

    def scores(self, ids: Tensor) -> Tensor:
        """Scores of the next tokens [rows, vocabulary], after these [rows, 1]."""
        cache = self.graphs.cache
        if self.held is not None or cache is None:
            assert self.held is not None
            self.first_scores = self.held.scores(ids)
            return self.first_scores
        cache.ids[: len(ids)].copy_(ids)
        cache.position.add_(1)
        self.tokens += 1
        return self.graphs.scores(self.model, self.clips, self.tokens)

    def follow(self, rows: Tensor, clips: Tensor | None) -> None:
        """Continue with the texts of these rows, and with these clips alone where some are done."""
        if self.held is not None:
            self.held.follow(rows, clips)
            self.tokens = self.graphs.take(self.held.stored(self.first_scores[:0]), self.beams, self.length)
            self.held = self.first_scores = None
            set_attention(self.model, STATIC_ATTENTION)
        else:
            assert self.graphs.cache is not None
            self.graphs.cache.follow(rows, clips)
        self.clips = len(rows) // self.beams

    def keep_one(self) -> None:
        """Ranks that step together hold no graphs."""
        raise NotImplementedError


class _Positions:
    """Mixed into M2M100's positions: those of one token of each text, without a look how long the table is."""

    padding_idx: int
    weights: Tensor

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, past_key_values_length: Any = 0
    ) -> Tensor:
        """Rows of the table for tokens [rows, 1] after so many others."""
        if not isinstance(past_key_values_length, Tensor):
            own: Tensor = super().forward(input_ids, inputs_embeds, past_key_values_length)  # type: ignore[misc]
            return own
        places = input_ids.ne(self.padding_idx).long() * (1 + past_key_values_length) + self.padding_idx
        return self.weights[places]


@contextmanager
def graphed_clips(held: EncodedClips | PrefixClips, graphs: StepGraphs, length: int) -> Iterator[GraphedClips]:
    """What a search of texts of so many tokens holds; the model's positions change within it."""
    with _positions_without_looks(held.model, length):
        yield GraphedClips(held, graphs, length)


@contextmanager
def _positions_without_looks(model: Any, length: int) -> Iterator[None]:
    """Within it tables of positions serve texts of so many tokens without a question to the GPU."""
    tables: list[Any] = [module for module in model.modules() if type(module).__name__ == ASKING_POSITIONS]
    classes = [type(table) for table in tables]
    for table, own in zip(tables, classes, strict=True):
        if length + table.padding_idx + 1 > table.weights.shape[0]:
            table.make_weights(length + table.padding_idx + 1 + table.offset, table.embedding_dim, table.padding_idx)
        table.__class__ = type(f"Static{own.__name__}", (_Positions, own), {})
    try:
        yield
    finally:
        for table, own in zip(tables, classes, strict=True):
            table.__class__ = own


def _clips_of_graph(most: int, clips: int) -> int:
    """The least of all, a half, a quarter … of the clips that there is room for, in which these find place."""
    size = most
    while -(-size // 2) >= clips and size > 1:
        size = -(-size // 2)
    return size


def _span_of_graph(longest: int, tokens: int) -> int:
    """The least of the lengths of graphs that texts of so many tokens have place in."""
    span = min(SHORTEST, longest)
    while span < tokens:
        span = min(2 * span, longest)
    return span
