"""Published weights arrive whole, in every form; gaps are errors, never random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig, PreTrainedModel, T5Config
from transformers import PreTrainedConfig as Configuration

from tests.small_configs import BART, T5
from toolkit.errors import UserError
from toolkit.models.loading.backbone_weights import Placement, published_backbone, random_backbone

CPU = torch.device("cpu")
CONFIGS: dict[str, Configuration] = {
    "t5": T5Config(**T5 | {"vocab_size": 40}, num_beams=3),
    "bart": BartConfig(**BART | {"vocab_size": 40}),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[request.param])
    for buffer in model.buffers():
        buffer.normal_()  # BART's bias over tokens, which is saved with the weights
    model.generation_config.max_length = 33
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit the weights in a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_folder_gives_its_weights_buffers_and_generation_settings(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    ours = published_backbone(str(folder), config, Placement(torch.float32, CPU))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert ours.generation_config.max_length == 33
    assert tied(ours)
    vectors, tokens = torch.randn(2, 5, 32), torch.arange(3)[None].expand(2, -1)
    answers = [
        model.eval()(inputs_embeds=vectors, decoder_input_ids=tokens).logits.detach() for model in (ours, theirs)
    ]
    assert torch.equal(*answers)


def test_the_run_says_the_type_of_parameters_and_none_of_buffers(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    ours = published_backbone(str(folder), config, Placement(torch.bfloat16, CPU))
    random = random_backbone(config, Placement(torch.bfloat16, CPU), seed=1)
    for model in (ours, random):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in model.buffers())
        assert tied(model)
        assert model.get_output_embeddings().weight.requires_grad
    precise = random_backbone(config, Placement(torch.float32, CPU), seed=1)
    for name, parameter in precise.named_parameters():
        assert torch.equal(parameter.bfloat16(), random.get_parameter(name)), name


def test_added_tokens_get_rows(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = 43
    ours = published_backbone(str(folder), config, Placement(torch.float32, CPU))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).get_input_embeddings().weight
    table = ours.get_input_embeddings().weight
    assert torch.equal(table[:40], theirs) and not table[40:].any()
    assert tied(ours)


@pytest.mark.parametrize("problem", ["missing", "shape"])
def test_gaps_in_a_folder_are_reported_in_one_line(folder: Path, problem: str) -> None:
    name = next(name for name in load_file(folder / "model.safetensors") if "decoder" in name and "norm" not in name)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if problem == "shape":
            tensors[name] = tensor[:-1].clone()

    change(folder, edit)
    with pytest.raises(UserError, match=f"{problem}: {name}") as refusal:
        published_backbone(str(folder), AutoConfig.from_pretrained(folder), Placement(torch.float32, CPU))
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_configuration_that_the_folder_does_not_fit(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    values = config.to_dict() | {"d_ff": 48, "encoder_ffn_dim": 48}
    other = AutoConfig.for_model(values.pop("model_type"), **values)
    with pytest.raises(UserError, match="shape: "):
        published_backbone(str(folder), other, Placement(torch.float32, CPU))


def test_weights_that_differ_though_the_configuration_ties_them(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    shared = AutoModelForSeq2SeqLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    change(folder, lambda tensors: tensors.update({"lm_head.weight": shared + 1}))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with pytest.raises(UserError, match=r"tied: lm_head\.weight"):
        published_backbone(str(folder), config, Placement(torch.float32, CPU))
