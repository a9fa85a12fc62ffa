"""Steps of a search as graphs: on a machine without GPUs a stand-in records their operator calls and repeats them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import EncoderDecoderConfig, GPT2Config, PreTrainedConfig
from transformers.models.bert import BertConfig

from tests.recorded_calls import RecordedCalls
from tests.scripts import load_script
from tests.small_configs import translator_config
from toolkit.batching.loader import evaluation_batches
from toolkit.corpus.packed import Corpus
from toolkit.decoding import beam_search as searching
from toolkit.decoding import step_graphs
from toolkit.decoding.decode_split import find_hypotheses
from toolkit.decoding.step_graphs import StepGraphs, graphs_of_search
from toolkit.models import PoseProcessor, PoseTranslator

Make = Callable[..., PoseTranslator]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> RecordedCalls:
    """CPUs pretend to have graphs, and are asked which clips are done as seldom as GPUs."""
    recorded = RecordedCalls()
    monkeypatch.setattr(step_graphs, "capture_on", lambda device: recorded)
    monkeypatch.setattr(searching, "tokens_between_looks", lambda device: 10)
    return recorded


def texts_and_scores(found: list[list[Any]]) -> tuple[list[list[str]], list[float]]:
    return [[one.text for one in row] for row in found], [one.score for row in found for one in row]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("t5", {"max_new_tokens": 24}),
        ("bart", {"n_best": 4, "length_penalty": 2.0}),
        ("t5", {"num_beams": 7, "no_repeat_ngram_size": 2}),
        ("bart", {"max_new_tokens": 1}),
        ("bart", {"num_beams": 2, "early_stopping": True, "forced_bos_token_id": 7}),
    ],
)
def test_a_split_gets_the_texts_and_scores_that_it_gets_without(
    translator: Make, corpus: Corpus, processor: PoseProcessor, capture: RecordedCalls, kind: str, settings: Any
) -> None:
    model, split = translator(kind), corpus.splits["test"]
    given = {"batch_frames": 400, "few_shapes": True, **settings}
    plain = find_hypotheses(model, split, processor, **given, graphs=False)
    assert not capture.captured
    graphed = find_hypotheses(model, split, processor, **given)
    (texts, scores), (expected, wanted) = map(texts_and_scores, (graphed, plain))
    assert texts == expected
    assert scores == pytest.approx(wanted, abs=2e-4)
    assert len(set(wanted)) > 10, "too much alike to show much"
    assert bool(capture.captured) == (settings.get("max_new_tokens") != 1)
    assert model.backbone.config._attn_implementation == "sdpa"


def test_batches_of_one_shape_share_memory_and_graphs(
    translator: Make, corpus: Corpus, processor: PoseProcessor, capture: RecordedCalls
) -> None:
    model = translator()
    graphs, batch = StepGraphs(capture), next(evaluation_batches(corpus.splits["test"], processor.tokenizer, 1200))
    inputs = (batch.poses, batch.visible, batch.frame_mask)

    def search(count: int) -> torch.Tensor:
        return model.generate(
            *(tensor[:count] for tensor in inputs), custom_generate=searching.beam_search, graphs=graphs
        )

    first = search(len(batch))
    cache, keys = graphs.cache, dict(graphs.graphs)
    assert cache is not None
    addresses = [tensor.data_ptr() for tensor in (*cache.states(), cache.scores)]
    captured = len(capture.captured)
    assert torch.equal(search(len(batch)), first)
    assert graphs.cache is cache and graphs.graphs == keys and len(capture.captured) == captured
    assert [tensor.data_ptr() for tensor in (*cache.states(), cache.scores)] == addresses
    # Fewer clips use the front of it, by a graph of half, a quarter … of the clips.
    alone = model.generate(*(tensor[:3] for tensor in inputs), custom_generate=searching.beam_search)
    assert torch.equal(search(3)[:, : alone.shape[1]], alone)
    assert graphs.cache is cache
    assert all(clips in {len(batch) // 2**k + bool(len(batch) % 2**k) for k in range(6)} for clips, _ in graphs.graphs)
    # Clips of another length have memory of their own.
    shorter = tuple(tensor[-2:, :20] for tensor in inputs)
    model.generate(*shorter, custom_generate=searching.beam_search, graphs=graphs)
    assert graphs.cache is not cache and len(graphs.graphs) == 1


def test_long_texts_get_longer_graphs(
    translator: Make, corpus: Corpus, processor: PoseProcessor, capture: RecordedCalls
) -> None:
    model, graphs = translator(), StepGraphs(capture)
    batch = next(evaluation_batches(corpus.splits["test"], processor.tokenizer, 300))
    settings = {"min_new_tokens": 79, "max_new_tokens": 80, "custom_generate": searching.beam_search}
    inputs = (batch.poses, batch.visible, batch.frame_mask)
    graphed = model.generate(*inputs, **settings, graphs=graphs)
    assert {span for _, span in graphs.graphs} == {32, 64, 81}
    assert torch.equal(graphed, model.generate(*inputs, **settings))


def test_the_host_waits_once_in_ten_tokens(
    translator: Make, corpus: Corpus, processor: PoseProcessor, capture: RecordedCalls
) -> None:
    """Of all of a search: the decoder's own calls included."""
    model, graphs = translator(), StepGraphs(capture)
    batch = next(evaluation_batches(corpus.splits["test"], processor.tokenizer, 300))
    inputs = (batch.poses, batch.visible, batch.frame_mask)
    settings = {"min_new_tokens": 29, "max_new_tokens": 30, "custom_generate": searching.beam_search}
    model.generate(*inputs, **settings, graphs=graphs)

    def waits(tokens: int) -> int:
        with load_script("benchmarks/operator_calls.py").Calls() as calls:
            model.generate(
                *inputs, **settings | {"min_new_tokens": tokens - 1, "max_new_tokens": tokens}, graphs=graphs
            )
        return sum(calls.waits.values())

    assert waits(30) - waits(10) <= 2


def test_a_step_that_cannot_be_captured_runs_as_it_is_written(
    translator: Make, corpus: Corpus, processor: PoseProcessor, capture: RecordedCalls, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook that looks at a value asks the GPU, which a capture forbids."""
    model, split = translator(), corpus.splits["test"]
    plain = find_hypotheses(model, split, processor, batch_frames=400, graphs=False)
    looks: list[float] = []
    model.backbone.decoder.block[1].register_forward_hook(
        lambda module, inputs, output: looks.append(float(output[0].sum()))
    )
    with caplog.at_level(logging.INFO, logger="toolkit"):
        found = find_hypotheses(model, split, processor, batch_frames=400)
    (texts, scores), (expected, wanted) = map(texts_and_scores, (found, plain))
    assert texts == expected and scores == pytest.approx(wanted, abs=2e-4)
    assert looks and not capture.captured
    said = [record for record in caplog.records if "CUDA graphs" in record.message]
    assert [record.levelname for record in said] == ["WARNING"]


def test_no_more_graphs_than_there_is_memory_for(
    translator: Make, corpus: Corpus, processor: PoseProcessor, capture: RecordedCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, split = translator(), corpus.splits["test"]
    plain = find_hypotheses(model, split, processor, batch_frames=1200, graphs=False)
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 1)
    monkeypatch.setattr(step_graphs, "SHORTEST", 4)
    found = find_hypotheses(model, split, processor, batch_frames=1200)
    (texts, scores), (expected, wanted) = map(texts_and_scores, (found, plain))
    assert texts == expected and scores == pytest.approx(wanted, abs=2e-4)
    assert capture.replays


BERT = BertConfig(
    vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True)


@pytest.mark.parametrize("decoder", [GPT2, BERT], ids=["gpt2", "bert"])
def test_two_models_with_a_projection_between_them(
    corpus: Corpus, processor: PoseProcessor, capture: RecordedCalls, decoder: PreTrainedConfig
) -> None:
    torch.manual_seed(2)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    backbone = EncoderDecoderConfig.from_encoder_decoder_configs(BERT, decoder, **tokens)
    model = PoseTranslator(translator_config(backbone)).eval()
    with torch.no_grad():
        for weight in model.backbone.parameters():
            weight.mul_(4.0)
    model.generation_config.update(**tokens, num_beams=3, max_new_tokens=12)
    split = corpus.splits["test"]
    (texts, scores), (expected, wanted) = (
        texts_and_scores(find_hypotheses(model, split, processor, batch_frames=900, graphs=given))
        for given in (True, False)
    )
    assert texts == expected and scores == pytest.approx(wanted, abs=2e-4)
    assert bool(capture.replays) == (decoder is GPT2)


def test_all_graphs_of_a_process_are_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace for each stream; each evaluation has graphs of its own."""
    made: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(object()) or made[-1])
    step_graphs.stream_of_graphs.cache_clear()
    used: list[object] = []
    monkeypatch.setattr(step_graphs, "on_stream", lambda stream: nullcontext(used.append(stream)))
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: "default")
    for graphs in (step_graphs.CudaGraphs(), step_graphs.CudaGraphs()):
        with graphs._on_stream():
            pass
    step_graphs.stream_of_graphs.cache_clear()
    assert made == used[:1] == used[1:]


def test_only_attention_that_is_ours_is_captured(
    translator: Make, capture: RecordedCalls, caplog: pytest.LogCaptureFixture
) -> None:
    model = translator()
    assert graphs_of_search(model, wanted=False) is None
    assert isinstance(graphs_of_search(model, wanted=True), StepGraphs)
    step_graphs._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "toolkit"):
        for _ in range(2):
            assert graphs_of_search(translator(attention="eager"), wanted=True) is None
    assert [record.getMessage().count("eager attention") for record in caplog.records] == [1], "said once"
