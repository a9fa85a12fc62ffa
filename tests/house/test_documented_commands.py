"""Every command line that the repository shows is one that works; what trains does so on any number of ranks."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.house.documented import ROOT, Command, commands_of, documented
from tests.scripts import load_script
from toolkit.errors import UserError
from toolkit.recipe.corpora import missing_data
from toolkit.recipe.load import load_recipe

RANKS = (1, 2, 4, 6, 8, 32)
COMMANDS = documented()
TRAINING = [command for command in COMMANDS if re.search(r"launch/train(\.py|_\w+\.sh) ", command.text)]
CHECKS = [command for command in COMMANDS if re.search(r"launch/recipes\.py (check|show) ", command.text)]
OTHERS = [
    command
    for command in COMMANDS
    if command not in (*TRAINING, *CHECKS) and re.search(r"(launch|benchmarks)/\w+\.py( |$)", command.text)
]
# What stands for the reader's own in a command line -> something that is there.
STANDS_FOR = {
    "my_recipe": "t5_small",
    "my_mix.yaml": "t5_small",  # tests/recipe/test_corpora.py reads it
    "RECIPE": "t5_small",
    "N": "2",
    "my/zero.json": "zero2",
    "model.backbone=NAME": "model.backbone=t5_base",
}
# Shown because it is refused.
REFUSED = {
    "python launch/recipes.py check t5_small --ds zero3 model.quantization=int8 model.lora.r=16": "exclude each other"
}

Words = list[str]


class Accepted(Exception):
    """The parser took the line."""


@pytest.fixture(scope="module")
def script() -> Callable[[str], ModuleType]:
    """Loads a script as a module, once."""
    loaded: dict[str, ModuleType] = {}

    def load(path: str) -> ModuleType:
        if path not in loaded:
            loaded[path] = load_script(path)
        return loaded[path]

    return load


STAND_INS = {"deepspeed": 'printf "%s\\n" deepspeed "$@"', "srun": 'printf "%s\\n" "$@"', "scontrol": "echo node"}
JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node", "SLURM_SUBMIT_DIR": str(ROOT)}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Words], Words]:
    """Follows a command through shell scripts and launchers to the Python script that it runs, and its arguments."""
    folder = tmp_path_factory.mktemp("launchers")
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    def said_by(words: Words) -> Words:
        environment = os.environ | JOB | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def launched(words: Words) -> Words:
        program = Path(words[0]).name
        if program == "sbatch":
            script = next((number for number, word in enumerate(words) if word.startswith("launch/")), None)
            return launched(words[script:] if script else shlex.split(words[words.index("--wrap") + 1]))
        if program == "deepspeed":
            from deepspeed.launcher.runner import parse_args

            parsed = parse_args(words[1:])
            return launched([parsed.user_script, *parsed.user_args])
        if program.endswith(".sh"):
            return launched(said_by(words))
        if program.startswith(("python", "--", "-u")):  # srun's options, too
            return launched(words[1:])
        return [str((ROOT / words[0]).relative_to(ROOT)), *words[1:]]

    return launched


def filled_in(words: Words) -> Words:
    """With something that is there for what stands for the reader's own."""
    filled = [STANDS_FOR.get(word, word) for word in words if word != "..."]
    for number, word in enumerate(filled):
        if word == "NAME":
            filled[number] = "zero2" if filled[number - 1] == "--ds" else "t5_small"
        if filled[number - 1 : number + 1] == ["--ds", "auto"]:  # known on the hardware alone
            filled[number] = "zero2"
    return filled


@pytest.fixture
def trains(
    script: Callable[[str], ModuleType], launched: Callable[[Words], Words], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Words], None]:
    """Resolves a command that trains on every number of ranks, on GPUs and on CPUs."""

    def trains(words: Words) -> None:
        path, *arguments = launched(filled_in(words))
        assert path == "launch/train.py"
        train = script(path)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        parsed = train.parse()
        if any(missing_data(load_recipe(parsed.recipe, parsed.overrides, ds=parsed.ds))):
            parsed.overrides.append("data.corpus=corpora/mine")
        group = re.search(r"autotp_size=(\d+)", " ".join(words))
        for ranks in RANKS:
            for has_gpu in (True, False):
                if group and ranks % int(group[1]):
                    with pytest.raises(UserError, match=f"{group[0]} does not divide {ranks} rank"):
                        train.resolve(parsed, ranks, has_gpu=has_gpu)
                elif parsed.overfit is not None and parsed.overfit < ranks:
                    with pytest.raises(UserError, match=f"--overfit {parsed.overfit}: .* {ranks} ranks") as error:
                        train.resolve(parsed, ranks, has_gpu=has_gpu)
                    assert f"--overfit {ranks} " in error.value.hint
                else:
                    assert train.resolve(parsed, ranks, has_gpu=has_gpu).world_size == ranks

    return trains


@pytest.fixture
def accepts(
    script: Callable[[str], ModuleType], launched: Callable[[Words], Words], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Words], None]:
    """Hands a command to the parser of its script, and goes no further."""

    def accepted(*_: Any, **__: Any) -> None:
        raise Accepted

    def accepts(words: Words) -> None:
        path, *arguments = launched(filled_in(words))
        if path.startswith("benchmarks/"):  # what they import takes seconds
            source = (ROOT / path).read_text(encoding="utf-8")
            assert all(f'add_argument("{word}"' in source for word in arguments if word.startswith("--"))
            return
        command = script(path)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        for name in ("exit_code_of", "run_rank"):  # what the main of a command hands its work to
            if hasattr(command, name):
                monkeypatch.setattr(command, name, accepted)
        with pytest.raises(Accepted):
            command.main()

    return accepts


def by_text(command: Command) -> str:
    return command.text


@pytest.mark.parametrize("command", TRAINING, ids=by_text)
def test_what_trains_resolves_on_any_number_of_ranks(command: Command, trains: Callable[[Words], None]) -> None:
    trains(command.words)


@pytest.mark.parametrize("command", CHECKS, ids=by_text)
def test_what_is_checked_resolves_on_any_number_of_ranks(
    command: Command, script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = filled_in(command.words)
    recipes = script("launch/recipes.py")
    monkeypatch.setattr(sys, "argv", words[words.index("launch/recipes.py") :])
    parsed = recipes._parse()
    for ranks in RANKS:
        parsed.world_size = ranks
        if command.text in REFUSED:
            with pytest.raises(UserError, match=REFUSED[command.text]):
                recipes._resolve(parsed)
        else:
            assert recipes._resolve(parsed).world_size == ranks


@pytest.mark.parametrize("command", OTHERS, ids=by_text)
def test_what_else_is_shown_is_accepted(command: Command, accepts: Callable[[Words], None]) -> None:
    words = command.words
    # `launch/prepare.py ... --shard 3/16`: the dots are a table and its poses.
    table = ["--table", "T.csv", "--poses", "POSES"] if "..." in words and "launch/prepare.py" in words else []
    accepts([*words, *table])


@pytest.mark.parametrize("ranks", RANKS)
def test_make_demo_works_on_any_number_of_ranks(
    ranks: int, trains: Callable[[Words], None], accepts: Callable[[Words], None]
) -> None:
    *before, training = demo_commands(f"RANKS={ranks}")
    assert training[1:3] == ["--num_gpus", str(ranks)]
    trains(training)
    for words in before:
        accepts(words)


def test_make_demo_takes_the_devices_that_torch_sees() -> None:
    import torch

    *_, training = demo_commands(f"VENV={sys.prefix}")
    assert training[1:3] == ["--num_gpus", str(torch.cuda.device_count() or min(2, os.cpu_count() or 1))]


def demo_commands(*variables: str) -> list[Words]:
    """What `make demo` runs in Python, its set-up left out."""
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "RANKS", "VENV")}
    done = subprocess.run(
        ["make", "-n", "demo", *variables], cwd=ROOT, env=kept, capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in done.stdout.splitlines() if "launch/" in line]


@pytest.mark.parametrize("place", ["README.md", "docs/training.md", "launch/train.py"])
def test_the_first_training_command_says_where_the_clips_are(place: str) -> None:
    first = next(text for text in commands_of(ROOT / place) if re.search(r"launch/train\.py ", text))
    assert "data.corpus=" in first or "data.table=" in first


def test_the_first_use_leaves_the_json_to_the_plan() -> None:
    first = next(text for text in commands_of(ROOT / "README.md") if "launch/train.py " in text)
    assert "--ds auto" in first


def test_the_commands_are_found() -> None:
    """So that the tests above do not pass for want of commands."""
    assert len(TRAINING) > 60 and len(CHECKS) > 8 and len(OTHERS) > 45
    texts = {command.text for command in COMMANDS}
    assert {
        "deepspeed --num_gpus 8 launch/train.py --recipe t5_small --ds zero3_offload",
        "sbatch --nodes=4 launch/train_slurm.sh t5_small",
        "launch/train_single_gpu.sh t5_small --overfit 8",
        "MASTER_PORT=29501 launch/train_multi_gpu.sh RECIPE N",
        "python launch/train.py --recipe t5_small --overfit 8 data.table=... data.poses=...",
        "deepspeed --num_gpus 8 launch/train.py --recipe transformer",
        "cat clip.pose | python launch/translate.py --model runs/demo -",
    } <= texts
