"""A translator is a HuggingFace model: it saves, loads strictly, translates, and pays no heed to padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, PreTrainedConfig, T5ForConditionalGeneration

from toolkit.errors import UserError
from toolkit.models import PoseProcessor, PoseTranslator

Make = Callable[..., PoseTranslator]
LABELS = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100], [9, 9, 1, -100]])


@pytest.mark.parametrize("backbone", ["t5", "bart"])
def test_a_saved_folder_gives_the_same_model_by_the_auto_classes(
    tmp_path: Path, translator: Make, processor: PoseProcessor, pose_files: list[Path], backbone: str
) -> None:
    model = translator(backbone, prefix=(5, 6))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    inputs, again = processor(pose_files), loaded_processor(pose_files)
    for key in inputs:
        assert torch.equal(inputs[key], again[key])
    with torch.no_grad():
        expected, got = model(**inputs, labels=LABELS), loaded(**again, labels=LABELS)
    assert torch.equal(expected.logits, got.logits)
    assert torch.equal(expected.ctc_logits, got.ctc_logits)
    assert loaded_processor.batch_decode(loaded.generate(**again, max_new_tokens=6)) == processor.batch_decode(
        model.generate(**inputs, max_new_tokens=6)
    )


@pytest.mark.parametrize(("change", "word"), [("drop", "missing"), ("add", "unexpected")])
def test_a_folder_with_other_tensors_is_refused(tmp_path: Path, translator: Make, change: str, word: str) -> None:
    translator().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "drop":
        del weights["pose_encoder.back.0.weight"]
    else:
        weights["another.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=word) as refusal:
        PoseTranslator.from_pretrained(tmp_path)
    assert "\n" not in str(refusal.value)


def test_wrapping_a_loaded_backbone_keeps_its_weights(
    tmp_path: Path, translator: Make, backbones: dict[str, PreTrainedConfig]
) -> None:
    torch.manual_seed(1)
    T5ForConditionalGeneration(backbones["t5"]).save_pretrained(tmp_path)
    backbone = T5ForConditionalGeneration.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = PoseTranslator(translator().config, backbone)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_padding_of_a_batch_changes_no_clip(translator: Make, processor: PoseProcessor, pose_files: list[Path]) -> None:
    model = translator()
    together = processor(pose_files)
    with torch.no_grad():
        logits = model(**together, labels=LABELS).logits
        for row, path in enumerate(pose_files):
            alone = model(**processor([path]), labels=LABELS[row : row + 1]).logits
            torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_the_prefix_stands_before_the_poses(translator: Make, processor: PoseProcessor, pose_files: list[Path]) -> None:
    inputs = processor(pose_files)
    plain, prefixed = translator(), translator(prefix=(5, 6, 7))
    with torch.no_grad():
        hidden, mask = prefixed.encode(**inputs)
        bare, bare_mask = plain.encode(**inputs)
        output = prefixed(**inputs, labels=LABELS)
    assert hidden.shape[1] == bare.shape[1] + 3
    assert mask.sum() == bare_mask.sum() + 9
    assert output.ctc_logits.shape[1] == bare.shape[1]
    assert not torch.allclose(hidden[:, 3:], bare)


def test_the_encoder_runs_once_however_long_the_text(
    translator: Make, processor: PoseProcessor, pose_files: list[Path]
) -> None:
    model, calls = translator(), []
    model.backbone.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    model.generate(**processor(pose_files), num_beams=3, max_new_tokens=8)
    assert len(calls) == 1


def test_joint_search_follows_a_ctc_head_that_is_sure(
    monkeypatch: pytest.MonkeyPatch, translator: Make, processor: PoseProcessor, pose_files: list[Path]
) -> None:
    # A decoder with random weights may find any token unlikely.
    monkeypatch.setattr("toolkit.models.ctc_search.CANDIDATES", 1000)
    model = translator(search=0.9)
    spelled = [10, 11, 11]

    def sure(hidden: torch.Tensor, mask: torch.Tensor, prefix_ids: None) -> tuple[torch.Tensor, torch.Tensor]:
        blank = model.config.backbone["vocab_size"]
        scores = torch.zeros(*mask.shape, blank + 1)
        scores[..., blank] = 20.0
        for letter, token in enumerate(spelled):
            scores[:, 2 * letter, blank], scores[:, 2 * letter, token] = 0.0, 20.0
        return scores, mask

    model._ctc = sure  # type: ignore[method-assign]
    found = model.generate(**processor(pose_files), num_beams=4, max_new_tokens=10, length_penalty=0.0)
    for row in found.tolist():
        assert row[1:5] == [*spelled, 1]


def test_the_folder_remembers_how_to_search(tmp_path: Path, translator: Make) -> None:
    model = translator(search=0.3)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["num_beams"] == 3
    loaded = PoseTranslator.from_pretrained(tmp_path)
    assert loaded.generation_config.num_beams == 3
    assert loaded.config.ctc_search_weight == 0.3
