"""A run with quantised layers, loaded, exported and started from where a GPU holds its packed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models.warm_start.makers import HANDS, corpus_of, inputs_of, make, save
from toolkit.models.adaptation.export import export_model
from toolkit.models.adaptation.merge import make_standalone
from toolkit.models.loading.load import load_translator

LORA = "model.lora={r: 4}"


def devices_of(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_is_on_one_device_and_its_export_on_none(kind: str, tmp_path: Path) -> None:
    made = make(corpus_of(tmp_path / "corpus", HANDS), LORA, f"model.quantization={kind}")
    made.model.to("cuda")
    folder = save(tmp_path / "best", made)
    model, processor = load_translator(folder)
    assert devices_of(model) == {"cuda"}
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(HANDS).items()}
    with torch.no_grad():
        expected = model(**inputs).logits.float().cpu()
    export_model(model, processor, tmp_path / "exported", card="", dtype=None, replace=False)
    with torch.no_grad():
        found = load_translator(tmp_path / "exported")[0](**inputs_of(HANDS)).logits.float()
    assert torch.allclose(found, expected, atol=0.5 if kind == "int8" else 0.05)
    again, _ = load_translator(folder)
    adapter = make_standalone(again)
    assert adapter and {tensor.device.type for tensor in adapter.weights.values()} == {"cpu"}
    assert devices_of(again) == {"cpu"}
