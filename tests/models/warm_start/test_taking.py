"""A run from a trained translator has its weights: all, some, by landmark, by token, whatever form they had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

from tests.models.warm_start.makers import HANDS, Made, corpus_of, inputs_of, loss_of, make, save, scores_of, train
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models.adaptation.export import export_model
from toolkit.models.loading.load import load_translator
from toolkit.models.warm_start.mapping import NEW_SCALE
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.recipe.sections.model import PARTS

KINDS = ("linear", "conv", "conformer", "stgcn")
# All landmarks of hands_body_50, in another order, with more of the body and a face.
WIDER = LandmarkSet.from_dict(load_landmark_set("isign_76").to_dict() | {"channels": ("x", "y", "z")})
LORA = ("model.lora.r=4",)
QUANTISED = {
    "nf4": (*LORA, "model.quantization={kind: nf4, compute_dtype: fp32}"),
    "int8": (*LORA, "model.quantization=int8"),
}


def encoder(kind: str) -> str:
    return f"model.pose_encoder={{kind: {kind}, hidden: 16, dropout: 0{', heads: 2' * (kind == 'conformer')}}}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("corpus") / "hands", HANDS)


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a model that a run has saved after a few steps, by its settings."""
    folders: dict[tuple[str, ...], Path] = {}

    def trained(*overrides: str, recipe: str = "t5_small", steps: int = 2) -> Path:
        key = (recipe, str(steps), *overrides)
        if key not in folders:
            made = make(corpus, *overrides, recipe=recipe, seed=1)
            train(made.model, inputs_of(HANDS), steps)
            folders[key] = save(tmp_path_factory.mktemp("trained") / "best", made)
        return folders[key]

    return trained


def taken(source: Path, corpus: Corpus, *overrides: str, **settings: object) -> Made:
    return make(corpus, f"model.init_from={source}", *overrides, seed=9, **settings)  # type: ignore[arg-type]


def table(made: Made) -> dict[str, str]:
    assert made.plan
    return {line.part: line.what for line in made.plan.table}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [*(("t5_small", kind) for kind in KINDS), ("mt5_base", "conv"), ("bart_large", "conv"), ("transformer", "conv")],
)
def test_on_the_same_corpus_the_scores_are_the_sources_to_the_last_digit(
    recipe: str, kind: str, corpus: Corpus, trained: Callable[..., Path]
) -> None:
    source = trained(encoder(kind), recipe=recipe)
    made = taken(source, corpus, encoder(kind), "training.seed=5", recipe=recipe)
    expected, _ = load_translator(source)
    assert torch.equal(scores_of(made.model, HANDS), scores_of(expected, HANDS))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], tensor), name
    wanted, found = expected.generation_config.to_dict(), made.model.generation_config.to_dict()
    assert {key: found.get(key) for key in wanted} == wanted
    assert set(table(made)) == set(PARTS) and all("as it is" in what for what in table(made).values())


@pytest.mark.parametrize(
    "parts", [["pose_encoder"], ["encoder"], ["decoder", "embeddings"], ["ctc_head"]], ids=lambda parts: parts[0]
)
def test_parts_that_are_not_taken_are_those_of_a_run_without_a_source(
    parts: list[str], corpus: Corpus, trained: Callable[..., Path]
) -> None:
    source = trained()
    made = taken(source, corpus, f"model.init_parts=[{', '.join(parts)}]").model
    fresh, expected = make(corpus, seed=9).model, load_translator(source)[0]
    tables = ("backbone.shared.", "backbone.lm_head.", "backbone.encoder.embed_tokens", "backbone.decoder.embed_tokens")
    starts = {
        "pose_encoder": ("pose_encoder.",),
        "encoder": ("backbone.encoder.",),
        "decoder": ("backbone.decoder.",),
        "embeddings": tables,
        "ctc_head": ("ctc_head.",),
    }
    for name, tensor in made.state_dict().items():
        part = next(
            part
            for part in ("embeddings", "pose_encoder", "encoder", "decoder", "ctc_head")
            if name.startswith(starts[part])
        )
        origin = expected if part in parts else fresh
        assert torch.equal(tensor, origin.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_landmarks_that_both_sets_have_are_read_as_before(
    kind: str, trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Other points, in another order; nothing is seen of the new ones."""
    source = trained(encoder(kind), steps=30)
    wider = WIDER
    made = taken(source, corpus_of(tmp_path / "wider", wider), encoder(kind))
    assert wider.points[:50] != HANDS.points
    inputs, expected = inputs_of(wider), loss_of(load_translator(source)[0], inputs_of(HANDS))
    known = torch.tensor([HANDS.position(*point) is not None for point in wider.points])
    assert int(known.sum()) == HANDS.num_points < len(known)
    assert abs(loss_of(made.model, {**inputs, "visible": inputs["visible"] & known}) - expected) < (
        0.1 * expected if kind == "stgcn" else 1e-4
    )
    assert "landmarks by name" in table(made)["pose_encoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_with_another_landmark_set_that_shares_its_points_the_first_loss_is_near_the_sources(
    kind: str, trained: Callable[..., Path], tmp_path: Path
) -> None:
    """New points of body and face, which are seen."""
    source = trained(encoder(kind), steps=30)
    wider = WIDER
    model = taken(source, corpus_of(tmp_path / "wider", wider), encoder(kind)).model
    expected = loss_of(load_translator(source)[0], inputs_of(HANDS))
    assert loss_of(make(corpus_of(tmp_path / "again", wider), encoder(kind)).model, inputs_of(wider)) > 1.5 * expected
    assert loss_of(model, inputs_of(wider)) == pytest.approx(expected, rel=0.1)


def test_new_columns_are_a_small_part_of_what_was_drawn(trained: Callable[..., Path], tmp_path: Path) -> None:
    source, wider = trained(), WIDER
    corpus = corpus_of(tmp_path / "wider", wider)
    names = [(point, channel) for point in wider.points for channel in (*wider.channels, "visible")]
    known = [(point, channel) for point in HANDS.points for channel in (*HANDS.channels, "visible")]
    drawn, found = (each.model.pose_encoder.front[0].weight for each in (make(corpus, seed=9), taken(source, corpus)))
    trained_weight = load_translator(source)[0].pose_encoder.front[0].weight
    for column, name in enumerate(names):
        if name in known:
            assert torch.equal(found[:, column], trained_weight[:, known.index(name)])
        else:
            assert torch.equal(found[:, column], NEW_SCALE * drawn[:, column])


def test_rows_are_taken_by_token(trained: Callable[..., Path], tmp_path: Path) -> None:
    corpora = [
        corpus_of(tmp_path / name, HANDS, texts)
        for name, texts in (("a", ["abc ab", "cab"]), ("b", ["bad cab", "zab"]))
    ]
    source = make(corpora[0], "model.tokenizer=train")
    folder = save(tmp_path / "source", source)
    made = taken(folder, corpora[1], "model.tokenizer=train")
    ids, others = (each.processor.tokenizer.get_vocab() for each in (made, source))
    assert ids != others and any(ids[token] != others[token] for token in ids.keys() & others.keys())
    for name in ("backbone.shared.weight", "ctc_head.weight", "ctc_head.bias"):
        rows, known = made.model.state_dict()[name], source.model.state_dict()[name]
        for token, place in ids.items():
            expected = known[others[token]] if token in others else known[: len(others)].mean(dim=0)
            assert torch.allclose(rows[place], expected), (name, token)
    blanks = [each.model.ctc_head.weight[-1] for each in (made, source)]
    assert torch.equal(*blanks)
    assert f"{len(ids.keys() & others.keys())} of {len(ids)} rows by token" in table(made)["embeddings"]


def test_the_tokenizer_may_be_the_sources(trained: Callable[..., Path], tmp_path: Path) -> None:
    corpora = [corpus_of(tmp_path / name, HANDS, texts) for name, texts in (("a", ["abc ab", "cab"]), ("b", ["zoo"]))]
    source = make(corpora[0], "model.tokenizer=train")
    made = taken(save(tmp_path / "source", source), corpora[1], f"model.tokenizer={tmp_path / 'source'}")
    assert made.processor.tokenizer.get_vocab() == source.processor.tokenizer.get_vocab()
    assert torch.equal(scores_of_text(made), scores_of_text(source))


@torch.no_grad()
def scores_of_text(made: Made) -> Tensor:
    ids = made.processor.tokenizer(text_target=["abc"] * 4, return_tensors="pt")["input_ids"]
    return made.model(**{**inputs_of(HANDS), "labels": ids}).logits


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_extra_tokens_that_the_source_has_are_kept(
    frozen: bool, corpus: Corpus, trained: Callable[..., Path]
) -> None:
    source = trained("model.extra_tokens=['<loc>', '<per>']", *LORA)
    made = taken(source, corpus, "model.extra_tokens=['<per>', '<new>']", *(LORA if frozen else ()))
    known, _ = load_translator(source)
    (rows,) = known.new_rows.values()
    first = made.processor.tokenizer.convert_tokens_to_ids("<per>")
    (own,) = made.model.new_rows.values() if frozen else (None,)
    row = own.weight[0] if own else made.model.backbone.shared.weight[first]
    assert torch.equal(row, rows.weight[1])
    new = own.weight[1] if own else made.model.backbone.shared.weight[first + 1]
    assert torch.allclose(new, known.backbone.shared.weight[:first].mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("form", ["lora", "nf4", "exported with its adapter"])
def test_adapters_of_the_source_are_merged(
    form: str, corpus: Corpus, trained: Callable[..., Path], tmp_path: Path
) -> None:
    source = trained(*(QUANTISED["nf4"] if form == "nf4" else (*LORA, "model.lora.dora=true")), steps=10)
    expected, processor = load_translator(source)
    scores = scores_of(expected, HANDS)
    if form.startswith("exported"):
        export_model(expected, processor, tmp_path / "exported", card="", dtype=None, replace=False)
        assert (tmp_path / "exported" / "adapter").is_dir()
        source = tmp_path / "exported"
    made = taken(source, corpus)
    assert (scores_of(made.model, HANDS) - scores).abs().max() < 1e-3
    assert made.plan and any("merged" in note for note in made.plan.notes)
    assert not any("lora" in name for name, _ in made.model.named_parameters())


@pytest.mark.parametrize("form", ["lora", *QUANTISED])
def test_a_frozen_backbone_from_a_source_is_saved_with_what_trained_on_it(
    form: str, corpus: Corpus, trained: Callable[..., Path], tmp_path: Path
) -> None:
    """The source may be gone when the model is loaded, exported, or moved elsewhere."""
    source = save(tmp_path / "source", make(corpus, seed=3))
    run = tmp_path / "run"
    run.mkdir()
    made = taken(source, corpus, *QUANTISED.get(form, LORA), base=run / "base")
    known, frozen = load_translator(source)[0], load_file(run / "base" / "weights_001.safetensors")
    assert {"shared.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"} <= frozen.keys()
    for name, tensor in frozen.items():  # before they are packed
        assert torch.equal(tensor, known.backbone.state_dict()[name]), name
    if form == "lora":
        assert torch.equal(scores_of(made.model, HANDS), scores_of(known, HANDS))
    train(made.model, inputs_of(HANDS), 3)
    save(run / "best", made)
    assert (run / "base" / "weights_001.safetensors").samefile(run / "best" / "base" / "weights_001.safetensors")
    assert len({path.stat().st_mode for path in (run / "best").rglob("*.*") if path.is_file()}) == 1
    for folder in (source, run / "base"):
        folder.rename(folder.with_name(f"{folder.name} gone"))
    (tmp_path / "elsewhere").mkdir()
    moved = (run / "best").rename(tmp_path / "elsewhere" / "model")
    expected = scores_of(made.model.eval(), HANDS)
    loaded, processor = load_translator(moved)
    assert torch.equal(scores_of(loaded, HANDS), expected)
    export_model(loaded, processor, tmp_path / "exported", card="", dtype=None, replace=False, merge_adapter=True)
    again = taken(tmp_path / "exported", corpus)
    assert torch.allclose(scores_of(again.model, HANDS), expected, atol=0.5 if form == "int8" else 1e-3)


def test_a_run_that_resumes_has_its_frozen_weights_from_its_own_folder(
    corpus: Corpus, trained: Callable[..., Path], tmp_path: Path
) -> None:
    from toolkit.models.warm_start.filling import WarmStart

    source = trained()
    first = taken(source, corpus, *LORA, base=tmp_path / "base")
    later = make(
        corpus, f"model.init_from={tmp_path / 'gone'}", *LORA, start=WarmStart(None, tmp_path / "base"), seed=2
    )
    assert first.model.base and later.model.base
    assert first.model.base.fingerprint == later.model.base.fingerprint
    frozen = {name for name, parameter in first.model.named_parameters() if not parameter.requires_grad}
    assert "backbone.shared.weight" in frozen
    for name in frozen:
        assert torch.equal(first.model.get_parameter(name), later.model.get_parameter(name)), name


WRONG = {
    "no such folder": (["model.init_from=nowhere/here"], "nowhere/here"),
    "another width": (["model.tiny=false", "model.from_scratch=true"], "64 .*512"),
    "another architecture": (["model.backbone=bart_large"], "t5 .*bart"),
    "a pose encoder of another kind": (["model.pose_encoder=linear"], "conv .*linear"),
    "a wider pose encoder": (["model.pose_encoder.hidden=32"], "16 .*32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_line_that_names_both(
    case: str, corpus: Corpus, trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a hub that cannot be reached is asked again and again
    overrides, words = WRONG[case]
    with pytest.raises(UserError, match=words) as caught:
        make(corpus, f"model.init_from={trained()}", *overrides)
    assert "model.init_from" in caught.value.message and "\n" not in caught.value.message
    assert case == "no such folder" or "model." in caught.value.hint


def test_a_backbone_is_no_source(corpus: Corpus, trained: Callable[..., Path], tmp_path: Path) -> None:
    load_translator(trained())[0].backbone.save_pretrained(tmp_path / "backbone")
    with pytest.raises(UserError, match="t5"):
        taken(tmp_path / "backbone", corpus)


def test_an_incomplete_source_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    source = save(tmp_path / "source", make(corpus))
    (source / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="source"):
        taken(source, corpus)
