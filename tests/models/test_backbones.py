"""Every promised backbone, shrunk: it trains, is saved and loaded, translates, and padding changes nothing."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from tests.recorded_calls import RecordedCalls
from tests.scripts import load_script
from tests.written_corpora import write_corpus
from toolkit.batching.collate import places_of_labels
from toolkit.corpus.packed import Clip, Corpus
from toolkit.decoding import step_graphs
from toolkit.decoding.beam_search import beam_search
from toolkit.models import PoseTranslator
from toolkit.models.backbone import decoder_inputs, embed_words, encoder_width, reader
from toolkit.models.build import build_processor, build_translator
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.models.loss import translation_losses
from toolkit.planning.costs.kernels import as_on_gpu
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.model_cards import load_model_yaml, model_names
from toolkit.recipe.resolve import resolve_named

Batch = dict[str, Tensor]
TEXTS = ["good day", "hi"]
LENGTHS = (11, 6)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    landmark_set = load_landmark_set("hands_body_50")
    numbers = np.random.default_rng(0)
    clips = [
        Clip(f"clip-{text}", text, numbers.normal(size=(length, 50, 3)).astype(np.float16))
        for text, length in zip(TEXTS, LENGTHS, strict=True)
    ]
    folder = tmp_path_factory.mktemp("backbones") / "corpus"
    return write_corpus(folder, {"train": clips}, landmark_set, 10.0, NORMALISATION)


@pytest.fixture(scope="module")
def make(corpus: Corpus) -> Iterator[Callable[..., PoseTranslator]]:
    """Shrunken translators by the name of their card; each is made once, so tests must leave them as they were."""
    made: dict[Any, PoseTranslator] = {}

    def make(name: str, *overrides: str) -> PoseTranslator:
        if (name, overrides) not in made:
            settings = (
                f"model.backbone={name}",
                "model.tiny=true",
                "model.prefix=say:",
                "model.dropout=0",
                "ds.bf16.enabled=false",
                *overrides,
            )
            resolved = resolve_named("t5_small", list(settings), 1, has_gpu=True, needs_data=False)
            torch.manual_seed(0)
            processor = build_processor(resolved.recipe, corpus)
            made[name, overrides] = build_translator(resolved, corpus, processor.tokenizer).eval()
        return made[name, overrides]

    yield make
    made.clear()


@pytest.fixture(scope="module")
def batch(corpus: Corpus, make: Callable[..., PoseTranslator]) -> Batch:
    """Both clips, padded by three frames more than the longer one needs; their texts as bytes."""
    longest = max(LENGTHS) + 3
    poses = torch.zeros(len(LENGTHS), longest, 50, 3)
    mask = torch.zeros(len(LENGTHS), longest, dtype=torch.bool)
    for row, clip in enumerate(corpus.splits["train"]):
        poses[row, : LENGTHS[row]] = torch.from_numpy(np.asarray(clip.features, dtype=np.float32))
        mask[row, : LENGTHS[row]] = True
    labels = torch.full((len(TEXTS), max(map(len, TEXTS)) + 1), -100)
    for row, text in enumerate(TEXTS):
        ids = [*(byte + 3 for byte in text.encode()), 1]
        labels[row, : len(ids)] = torch.tensor(ids)
    return {"poses": poses, "visible": mask.unsqueeze(-1).expand(-1, -1, 50), "frame_mask": mask, "labels": labels}


# One card of each architecture, and of each way to tie.
CARDS = [
    *("t5_small", "t5_v1_1_base", "byt5_small", "mt5_base", "umt5_base", "longt5_base"),
    *("bart_large", "mbart50", "m2m100", "pegasus_large", "marian", "led_base", "transformer"),
    *("t5gemma_2b_2b", "t5gemma2_270m"),
    *("qwen2_5_0_5b", "qwen3_0_6b", "llama3_2_1b", "mistral_7b", "gemma2_2b", "gemma_7b"),
]
ASKING = {"longt5_base", "led_base"}  # their attention over windows looks at its mask
UNGRAPHED = {"t5gemma_2b_2b", "t5gemma2_270m"}  # softcapped, or to encoding and text at once
every_card = pytest.mark.parametrize("name", CARDS)


def test_every_architecture_is_among_them() -> None:
    assert {load_model_yaml(name).architecture for name in CARDS} == {
        load_model_yaml(name).architecture for name in model_names()
    }


@every_card
def test_it_trains_and_every_trainable_tensor_is_reached(
    name: str, make: Callable[..., PoseTranslator], batch: Batch
) -> None:
    model = copy.deepcopy(make(name)).train()
    trainable = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=3e-3)
    losses = []
    for _ in range(3):
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        unreached = [key for key, value in trainable.items() if value.grad is None or not value.grad.isfinite().all()]
        assert not unreached
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    # Random weights know nothing yet, and are no worse than that.
    assert losses[0] < 10


@every_card
def test_a_micro_batch_on_a_gpu_needs_no_answer_from_it(
    name: str, make: Callable[..., PoseTranslator], batch: Batch
) -> None:
    """Tensors without memory have no values: a pass that asked for one, and so would wait for a GPU, fails."""
    model = copy.deepcopy(make(name)).to("meta").train()
    use_gpu_layers(model)
    inputs = batch | {"labelled": places_of_labels(batch["labels"]), "special_ids": torch.tensor([0, 1])}
    asks = pytest.raises(RuntimeError, match="item") if name in ASKING else nullcontext()
    with asks, as_on_gpu(autocast=False):
        nll, _ = translation_losses(model, **{key: value.to("meta") for key, value in inputs.items()})
        nll.backward()
        assert all(parameter.grad is not None for parameter in model.pose_encoder.parameters())


@every_card
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_for_gpus_compute_the_same(
    name: str, make: Callable[..., PoseTranslator], batch: Batch, checkpointing: bool
) -> None:
    own, quick = copy.deepcopy(make(name)).train(), copy.deepcopy(make(name)).train()
    for module in (*own.modules(), *quick.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    use_gpu_layers(quick)
    if checkpointing:
        quick.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    logits = [model(**batch).logits for model in (own, quick)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    for scores in logits:
        scores.square().mean().backward()
    for (key, mine), theirs in zip(quick.named_parameters(), own.parameters(), strict=True):
        if mine.requires_grad:
            assert mine.grad is not None and theirs.grad is not None
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=key)


@every_card
def test_labelled_tokens_are_scored_alone_as_among_all(
    name: str, make: Callable[..., PoseTranslator], batch: Batch
) -> None:
    model = copy.deepcopy(make(name))
    if hasattr(model.backbone, "final_logits_bias"):
        model.backbone.final_logits_bias.normal_()
    head = model.backbone.get_output_embeddings()
    labelled = batch["labels"] != -100
    with head.register_forward_pre_hook(lambda _, inputs: (inputs[0][labelled],)):
        expected = model(**batch).logits
    projected = []
    head.register_forward_pre_hook(lambda _, inputs: projected.append(inputs[0].shape[:-1].numel()))
    places = places_of_labels(batch["labels"])
    assert torch.equal(model(**batch, labelled=places).logits, expected)
    # A filler has no labels: nothing is scored, and every weight gets a gradient of zero.
    filler = batch | {"labels": torch.full_like(batch["labels"], -100)}
    logits = model(**filler, labelled=places[:0]).logits
    assert logits.shape == (0, expected.shape[-1])
    assert projected == [labelled.sum(), 0], "padding is not projected onto the vocabulary"
    logits.sum().backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trainable)


@every_card
def test_a_saved_one_gives_the_same_logits(
    name: str, make: Callable[..., PoseTranslator], batch: Batch, tmp_path: Path
) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


@every_card
def test_padding_changes_nothing(name: str, make: Callable[..., PoseTranslator], batch: Batch) -> None:
    model = make(name)
    with torch.no_grad():
        together = model(**batch).logits
        for row, length in enumerate(LENGTHS):
            labels = batch["labels"][row : row + 1]
            alone = {key: batch[key][row : row + 1, :length] for key in ("poses", "visible", "frame_mask")}
            logits = model(**alone, labels=labels).logits
            real = labels[0] != -100
            torch.testing.assert_close(together[row, real], logits[0, real], atol=2e-5, rtol=1e-4)


@every_card
@pytest.mark.parametrize("beams", [1, 3])
def test_our_beam_search_finds_what_huggingfaces_does(
    name: str, beams: int, make: Callable[..., PoseTranslator], batch: Batch
) -> None:
    model = make(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    settings = {"num_beams": beams, "max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    theirs = model.generate(**inputs, **settings)
    assert theirs.sequences[:, 0].tolist() == [model.config.decoder_start_token_id] * len(TEXTS)
    if beams > 1:
        ours = model.generate(**inputs, **settings, custom_generate=beam_search)
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-5, rtol=1e-5)


@every_card
def test_steps_as_graphs_find_the_same(
    name: str, make: Callable[..., PoseTranslator], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, capture = make(name), RecordedCalls()
    monkeypatch.setattr(step_graphs, "capture_on", lambda device: capture)
    graphs = step_graphs.graphs_of_search(model, wanted=True)
    assert (graphs is None) == (name in ASKING | UNGRAPHED)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    settings = {"num_beams": 3, "min_new_tokens": 8, "max_new_tokens": 9, "custom_generate": beam_search}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    plain, graphed = (model.generate(**inputs, **settings, graphs=given) for given in (None, graphs))
    assert torch.equal(graphed.sequences, plain.sequences)
    torch.testing.assert_close(graphed.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=1e-5)
    assert graphs is None or (len(capture.captured) == 1 and capture.replays == 7), "steps were not replayed"


@pytest.mark.parametrize("name", ["t5_small", "m2m100", "t5gemma2_270m", "qwen2_5_0_5b"])
def test_a_search_leaves_no_tensor_behind(
    name: str, make: Callable[..., PoseTranslator], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where Python has not looked for cycles yet: a GPU would hold them in the steps that follow."""
    model, capture = make(name), RecordedCalls()
    monkeypatch.setattr(step_graphs, "capture_on", lambda device: capture)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    settings = {"num_beams": 3, "min_new_tokens": 4, "max_new_tokens": 5, "custom_generate": beam_search}
    model.generate(**inputs, **settings)  # tables of positions are made once
    for wanted in (False, True):
        graphs = step_graphs.graphs_of_search(model, wanted=wanted)
        gc.collect()
        gc.disable()
        try:
            before = (*model.parameters(), *model.buffers(), *inputs.values())
            with load_script("benchmarks/planning_tensors.py").TensorLog(before) as log:
                found = model.generate(**inputs, **settings, graphs=graphs)
                assert log.alive()
                del found, graphs
                left = log.alive()
        finally:
            gc.enable()
        assert not left


@every_card
def test_generation_says_what_training_scores(name: str, make: Callable[..., PoseTranslator], batch: Batch) -> None:
    """Each token that greedy search writes is the one that teacher forcing finds most likely at its place."""
    model = make(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = model.generate(**inputs, num_beams=1, max_new_tokens=4, no_repeat_ngram_size=0)[:, 1:]
    with torch.no_grad():
        scores = model(**inputs, labels=labels).logits
    # What stands behind the end of a text is padding.
    written = (labels == model.config.eos_token_id).cumsum(dim=1) <= (labels == model.config.eos_token_id)
    assert written.any(dim=1).all()
    assert torch.equal(scores.argmax(dim=-1)[written], labels[written])


@pytest.mark.parametrize("name", ["m2m100", "pegasus_large", "t5_small"])
def test_a_run_in_bfloat16_leaves_nothing_in_float32_that_stands_in_its_way(
    name: str, make: Callable[..., PoseTranslator], batch: Batch
) -> None:
    model = make(name, "ds.bf16.enabled=true")
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@every_card
def test_a_prefix_is_embedded_as_the_backbone_embeds_words(name: str, make: Callable[..., PoseTranslator]) -> None:
    backbone = make(name).backbone
    ids = torch.tensor([[9, 8, 7, 6]])
    with torch.no_grad():
        expected = reader(backbone)(input_ids=ids).last_hidden_state
        got = reader(backbone)(inputs_embeds=embed_words(backbone, ids)).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@every_card
def test_labels_are_shifted_as_the_library_shifts_whole_texts(
    name: str, make: Callable[..., PoseTranslator], batch: Batch
) -> None:
    model = make(name)
    if hasattr(model.backbone, "prepare_decoder_input_ids_from_labels"):
        labels = batch["labels"]
        expected = model.backbone.prepare_decoder_input_ids_from_labels(labels.clone())
        real = labels != -100
        assert torch.equal(decoder_inputs(labels, model.config)[real], expected[real])
    assert encoder_width(model.backbone.config) == 64
