"""However a model is asked for, it is found whole or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.time_limits import limit
from toolkit.errors import UserError
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.models.loading.load import find_model, load_translator

ROOT = Path(__file__).resolve().parents[3]
# Whichever is imported first, and whether or not transformers' own classes were used before.
ORDERS = {
    "toolkit.auto first": "import toolkit.auto\nfrom transformers import AutoModel, AutoProcessor",
    "transformers first": "from transformers import AutoModel, AutoProcessor\nimport toolkit.auto",
    "transformers half": "import transformers\nimport toolkit.auto\nfrom transformers import AutoProcessor, AutoModel",
    "a model first": "import toolkit.auto, peft\nfrom transformers import T5ForConditionalGeneration, AutoModel\n"
    "from transformers import AutoProcessor",
}


@pytest.fixture
def folder(tmp_path: Path, translator: Callable[..., PoseTranslator], processor: PoseProcessor) -> Path:
    translator().save_pretrained(tmp_path / "run" / "best")
    processor.save_pretrained(tmp_path / "run" / "best")
    return tmp_path / "run" / "best"


@pytest.mark.process
def test_import_toolkit_auto_registers_the_translator_in_any_order_of_imports(folder: Path) -> None:
    lines = ["import os, sys", f"sys.path.insert(0, {str(ROOT)!r})", "import traceback", "import torch"]
    # One process an order, forked from one that has imported torch alone: what else each imports is its own.
    for order in ORDERS.values():
        lines += [
            "if not (child := os.fork()):",
            "    try:",
            *(f"        {line}" for line in order.splitlines()),
            f"        AutoModel.from_pretrained({str(folder)!r})",
            f"        AutoProcessor.from_pretrained({str(folder)!r})",
            "    except BaseException: traceback.print_exc(); os._exit(1)",
            "    os._exit(0)",
            "assert os.waitpid(child, 0)[1] == 0",
        ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=limit(240))
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_import_toolkit_imports_no_transformers() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import toolkit; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=limit(60))


def test_a_run_directory_or_its_best_folder(folder: Path) -> None:
    assert find_model(folder) == find_model(folder.parent) == str(folder)
    model, processor = load_translator(folder.parent)
    assert not model.training and processor.tokenizer is not None


def test_a_mistyped_folder_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert find_model("someone/model") == "someone/model"
    for name in ("runs/demp", "nothing", "some one/model"):
        with pytest.raises(UserError, match=name):
            find_model(name)
