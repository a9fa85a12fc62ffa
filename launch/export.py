#!/usr/bin/env python
"""Make a folder to share of a run's best model: weights, processor and a model card with its scores.

python launch/export.py runs/demo --to exported/demo                      loads by AutoModel after `import toolkit.auto`
python launch/export.py runs/demo --to exported/demo --dtype bf16         half the size
python launch/export.py runs/demo --to exported/demo --push-to-hub me/demo   and to the hub (log in first)
python launch/export.py runs/t5_3b_lora --to exported/lora              with adapter/, which PEFT loads, too
python launch/export.py runs/t5_3b_lora --to exported/lora --merge-lora      the adapter added to the weights
python launch/export.py runs/mt5 --to exported/mt5 --restore-vocabulary      with the tokens that the run had trimmed

The model to be written is compared with the run's, and the folder is loaded and compared before it takes its name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from toolkit.errors import UserError, exit_code_of, first_line, parsed


def main() -> None:
    arguments = parsed(parse)
    sys.exit(exit_code_of(lambda: run(arguments), debug=arguments.debug))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the model goes")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: as they were trained)"
    )
    parser.add_argument("--merge-lora", action="store_true", help="merge adapters into the weights they adapt")
    parser.add_argument(
        "--restore-vocabulary",
        action="store_true",
        help="bring tokens back that model.vocabulary=corpus trimmed, with their rows of the weights that the run "
        "started from",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload it, too; a repository that is new is private")
    parser.add_argument("--replace", action="store_true", help="replace the model that --to holds already")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Write the folder, then upload it where that was asked for."""
    run_dir, folder = arguments.run, arguments.to
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory (it has no recipe.yaml)", "give runs/NAME")
    if folder.resolve().is_relative_to(run_dir.resolve()):
        raise UserError(f"{folder} is inside the run directory", "choose a folder outside it for --to")

    # transformers imports DeepSpeed to save, which warns on machines without a GPU unless it is set to the CPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from toolkit.cluster.logs import show_errors_only

    show_errors_only()  # peft imports bitsandbytes, which warns of a missing kernel on processors that know bf16
    from toolkit.models.adaptation.export import check_dtype, check_target, export_model
    from toolkit.models.loading.load import load_translator
    from toolkit.models.loading.weights import count_weights
    from toolkit.models.vocabulary.restore import whole_vocabulary
    from toolkit.recipe.load import load_recipe
    from toolkit.recipe.resolve import RECIPE_FILE
    from toolkit.reporting.model_card import model_card

    check_target(folder, replace=arguments.replace)
    model, processor = load_translator(run_dir)
    if arguments.merge_lora and not getattr(model, "peft_config", None):
        raise UserError(f"--merge-lora: {run_dir} was not trained with adapters", "leave out --merge-lora")
    check_dtype(model, arguments.dtype)
    whole = None
    if arguments.restore_vocabulary:
        whole = whole_vocabulary(load_recipe(str(run_dir / RECIPE_FILE)), model, processor)
    card = model_card(
        run_dir,
        arguments.push_to_hub or folder.name,
        model,
        processor,
        merged=arguments.merge_lora,
        parameters=count_weights(model.parameters()) + (whole.added_weights(model) if whole else 0),
        restored=whole is not None,
    )
    quantization = (model.base.model["quantization"] if model.base else None) or {}
    difference = export_model(
        model,
        processor,
        folder,
        card=card,
        dtype=arguments.dtype,
        replace=arguments.replace,
        merge_adapter=arguments.merge_lora,
        whole=whole,
    )
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    summary: dict[str, Any] = {
        "folder": str(folder),
        "bytes": size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "largest_difference": difference,
        "adapter": model.config.adapter,
        "unpacked": quantization.get("kind"),
        "restored_tokens": len(whole.processor.tokenizer) - len(processor.tokenizer) if whole else 0,
    }
    if not arguments.json:
        facts = [f"{folder}: {size / 1e6:,.1f} MB, {summary['dtype']}, read back and compared"]
        if quantization:
            facts.append(f"{quantization['kind']} layers are written as the numbers that they stand for")
        if model.config.adapter:
            facts.append(f"the adapter is in {folder / model.config.adapter}")
        elif arguments.merge_lora:
            facts.append("the adapter is merged")
        if whole:
            facts.append(f"{summary['restored_tokens']:,} tokens are back that the run had trimmed")
        if difference:
            facts.append(f"a token's probability differs by at most {difference:.2g}")
        print("; ".join(facts), flush=True)
    if arguments.push_to_hub:
        summary["url"] = push(folder, arguments.push_to_hub)
        if not arguments.json:
            print(f"uploaded to {summary['url']}")
    if arguments.json:
        print(json.dumps(summary))


def push(folder: Path, repository: str) -> str:
    """Upload the folder and return where it is.

    Raises:
        UserError: the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Exported by the toolkit")
    except Exception as error:  # the hub's client has a class for each of name, token, network and server
        raise UserError(
            f"{folder} is written, and cannot be uploaded to {repository} ({first_line(error)})",
            "log in with `hf auth login`, and run the same command with --replace",
        ) from error
    return str(created)


if __name__ == "__main__":
    main()
