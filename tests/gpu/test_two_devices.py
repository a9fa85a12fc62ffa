"""Two ranks on two devices: real ones where there are, pretended ones everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.time_limits import limit
from toolkit.corpus.demo import DemoSizes, make_demo

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "two_devices.sh"
FORKED = ROOT / "tests" / "gpu" / "forked_ranks.py"
TIMEOUT = 1800.0
LORA = "model.lora={r: 4}"
CASES = {
    "zero0": ["--ds", "zero0"],
    "zero1": ["--ds", "zero1"],
    "zero2": ["--ds", "zero2"],
    "zero3": ["--ds", "zero3", "ds.zero_optimization.stage3_param_persistence_threshold=0"],
    "lora": ["--ds", "zero2", LORA],
    "nf4": ["--ds", "zero2", LORA, "model.quantization=nf4"],
    "nf4_zero3": ["--ds", "zero3", LORA, "model.quantization=nf4"],
    "int8": ["--ds", "zero2", LORA, "model.quantization=int8"],
    "offload": ["--ds", "zero2_offload"],
    "bf16": ["--ds", "zero3", "ds.bf16.enabled=true"],
    "one_each": ["--ds", "zero3"],
}
# srun has bound a GPU to each rank: it sees that one alone, and its number is 0.
ENVIRONMENT = {"one_each": {"PRETEND_GPUS": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}}
BY_DAY = ["zero3", "nf4"]

# Of each command of a case its ranks' exit codes and its output.
Results = dict[str, tuple[list[int], str]]
RunCases = Callable[[list[str]], Results]


def environment(**more: str) -> dict[str, str]:
    """Nothing of a surrounding run reaches the ranks."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith(("RANK", "WORLD_SIZE"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | more


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory: pytest.TempPathFactory) -> RunCases:
    """Trains cases on two ranks with pretended GPUs: each is stopped after a step, resumed, and its model is scored."""
    folder = tmp_path_factory.mktemp("pretended")
    clips = make_demo(folder / "clips", DemoSizes(train=24, dev=4, test=6, test_unseen_languages=3), seed=1)
    settings = [
        *(f"data.table={clips / 'table.csv'}", f"data.poses={clips / 'poses'}", "data.source=table"),
        *(f"data.cache={folder / 'corpora'}", "model.from_scratch=true", "model.tiny=true", "ds.bf16.enabled=false"),
        *("training.global_batch_size=8", "training.micro_batch_size=2", "training.workers=0"),
        "training.compile=false",  # graphs are of the CPU that the devices really are
        *("training.max_steps=2", "evaluation.num_beams=2", "evaluation.max_new_tokens=8"),
    ]

    def commands_of(name: str) -> dict[str, list[str]]:
        run_dir = folder / name
        train = ["launch/train.py", "--recipe", "t5_small", *settings, *CASES[name], f"run.dir={run_dir}"]
        evaluate = ["launch/evaluate.py", "--model", str(run_dir)]
        return {
            f"{name} stopped": [*train, "training.time_limit=0.0001"],
            f"{name} resumed": train,
            f"{name} evaluated": evaluate,
            # Models of a base that is frozen are evaluated whole.
            **({f"{name} evaluated cut": [*evaluate, "--zero3"]} if name == "zero3" else {}),
        }

    def run_cases(names: list[str]) -> Results:
        plan = [
            {
                "name": command,
                "words": words,
                "out": str(folder / f"{command.replace(' ', '_')}.txt"),
                "environment": ENVIRONMENT.get(name, {}),
            }
            for name in names
            for command, words in commands_of(name).items()
        ]
        (folder / "plan.json").write_text(json.dumps(plan))
        done = subprocess.run(
            [sys.executable, str(FORKED), str(folder / "plan.json")],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=limit(TIMEOUT),
        )
        assert done.returncode == 0, done.stderr[-4000:]
        codes = json.loads(done.stdout.splitlines()[-1])
        return {command["name"]: (codes[command["name"]], Path(command["out"]).read_text()) for command in plan}

    return run_cases


def check(results: Results) -> None:
    wrong = {}
    for name, (codes, out) in results.items():
        # The other rank waits for the launcher to end it.
        right = codes[0] == 75 if name.endswith("stopped") else codes == [0, 0]
        if not right or "WrongDevice" in out:
            wrong[name] = f"exit codes {codes}: {out[-2000:]}"
        elif name.endswith("resumed") and "resuming from" not in out:
            wrong[name] = "it did not resume"
    assert not wrong, "\n\n".join(f"{name}: {text}" for name, text in wrong.items())


def test_the_stand_in_notices_what_is_in_the_wrong_place() -> None:
    done = subprocess.run(
        [sys.executable, "tests/gpu/pretend_gpus.py", "tests/gpu/wrong_places.py"],
        cwd=ROOT,
        env=environment(LOCAL_RANK="1"),
        capture_output=True,
        text=True,
        timeout=limit(TIMEOUT),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    noticed = json.loads(done.stdout.splitlines()[-1])
    assert noticed.pop("right") == "cuda:1 cuda:1 2"
    assert noticed and all(noticed.values()), noticed


def test_every_rank_keeps_to_its_own_device(run_cases: RunCases) -> None:
    check(run_cases(BY_DAY))


@pytest.mark.nightly
def test_every_rank_keeps_to_its_own_device_however_the_model_is_divided(run_cases: RunCases) -> None:
    check(run_cases([name for name in CASES if name not in BY_DAY]))


@pytest.mark.nightly
@pytest.mark.parametrize("devices", ["cpu", "pretend"])
def test_the_script_for_two_gpus_runs(devices: str) -> None:
    done = subprocess.run(
        [str(SCRIPT)], env=environment(DEVICES=devices), capture_output=True, text=True, timeout=limit(TIMEOUT)
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "all well" in done.stdout


@pytest.mark.gpu2
def test_two_gpus() -> None:
    done = subprocess.run([str(SCRIPT)], env=environment(), capture_output=True, text=True, timeout=limit(TIMEOUT))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
