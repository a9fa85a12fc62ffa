"""`launch/plan.py`: its table, its JSON and its bad input."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import run_main
from toolkit.planning.hardware import GIB
from toolkit.recipe.deepspeed.json_file import ds_config_names

SCRIPT = Path(__file__).parents[2] / "launch" / "plan.py"


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_main("launch/plan.py", *arguments)


# The command, and on its last line of stderr the most memory that it held, in kB.
MEASURED = """
import atexit, re, runpy, sys
peak = lambda: re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
atexit.register(lambda: print(peak(), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_json_is_planned_for_t5_3b_with_lora() -> None:
    arguments = ["--recipe", "t5_3b_lora", "--gpus", "8", "--gpu-memory", "24GiB", "--json"]
    recomputed = "training.gradient_checkpointing=true"  # as docs/planning.md counts by hand
    command = [sys.executable, "-c", MEASURED, str(SCRIPT), *arguments, recomputed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().isdecimal(), f"a library wrote to the terminal: {done.stderr}"
    assert int(done.stderr) * 1024 < 2 * GIB, "no weights are made"
    found = json.loads(done.stdout)
    rows = {row["deepspeed"]: row for row in found["jsons"]}
    assert rows.keys() == set(ds_config_names())
    for row in rows.values():
        assert {"fits", "per_rank_gib", "host_gib", "max_micro_batch", "relative_speed"} <= row.keys()
    zero2, zero3 = rows["zero2"]["per_rank_gib"], rows["zero3"]["per_rank_gib"]
    # 2,851.6 M frozen weights in bf16: 5.31 GiB, and an eighth of them at stage 3.
    assert zero2["frozen weights"] == pytest.approx(5.31, abs=0.01)
    assert zero3["frozen weights"] == pytest.approx(5.31 / 8, abs=0.01)
    # As docs/planning.md counts them by hand: 18.2 M trained numbers, and keys and values of 27 clips and 5 beams.
    trained = 18.2e6 / GIB
    assert zero2["trained weights"] == pytest.approx(2 * trained, abs=1e-3)
    assert zero2["master copy"] + zero2["moments"] == pytest.approx(12 * trained / 8, abs=2e-3)
    decoder, encoding = (27 * positions * 24 * 2 * 4096 * 2 / GIB for positions in (5 * 128, 150))
    assert zero2["generation"] == pytest.approx(decoder * 25 / 24 + 2 * encoding, rel=0.02)
    assert rows["zero2_fp16"]["conflicts"]
    assert rows["zero2_fp16"]["per_rank_gib"] is None
    assert found["recommended"] in rows
    assert rows[found["recommended"]]["max_micro_batch"] >= 1
    assert f"--ds {found['recommended']}" in found["command"]
    assert max(row["relative_speed"] or 0 for row in rows.values()) == 1.0


def test_the_table_says_what_a_rank_holds_and_what_to_run() -> None:
    sixteen = "training.micro_batch_size=16"
    done = plan("--recipe", "t5_small", "--gpus", "2", "--gpu-memory", "12GiB", "--ds", "zero2", sixteen)
    assert done.returncode == 0, done.stderr
    assert "128 clips = 2 ranks x 4 micro-batches of 16" in done.stdout
    assert "activations" in done.stdout
    assert (
        "deepspeed --num_gpus 2 launch/train.py --recipe t5_small --ds zero2 training.micro_batch_size=" in done.stdout
    )


def test_the_command_leaves_the_micro_batch_to_a_recipe_that_does() -> None:
    done = plan("--recipe", "t5_small", "--gpus", "2", "--gpu-memory", "12GiB", "--ds", "zero2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["command"] == "deepspeed --num_gpus 2 launch/train.py --recipe t5_small --ds zero2"
    (row,) = found["jsons"]
    assert row["fits"] and row["micro_batch_size"] == row["max_micro_batch"] > 16


@pytest.mark.parametrize("options", [("--ranks", "2"), ("--steps", "9"), ("--tune", "--gpus", "2", "--nvme", "1TB")])
def test_an_option_that_would_not_be_read_is_refused(options: tuple[str, ...]) -> None:
    done = plan("--recipe", "t5_small", *options)
    assert done.returncode == 2 and not done.stdout
    assert all(option in done.stderr for option in options if option.startswith("--"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--recipe", "t5_small", "--gpus", "0"),
        ("--recipe", "t5_small", "--gpus", "3", "--nodes", "2"),
        ("--recipe", "t5_small", "--gpu-memory", "24 parsecs"),
        ("--recipe", "t5_small", "--gpu-memory", "9999TiB"),
        ("--recipe", "t5_small", "--nvme", ""),
        ("--recipe", "t5_small", "--host-memory", "half"),
        ("--recipe", "no_such_recipe"),
        ("--recipe", "t5_small", "--ds", "no_such_json"),
        ("--recipe", "t5_small", "training.epoch=3"),
        ("--recipe", "t5_small", "model.backbone=./no/such/model"),
    ],
)
def test_bad_input_is_two_lines(arguments: tuple[str, ...]) -> None:
    done = plan(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_card_for_not_one_clip_gets_advice() -> None:
    done = plan("--recipe", "t5_base", "--gpu-memory", "1500MiB", "--ds", "zero2", "--json")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert found["recommended"] is None
    assert {"settings", "gain_gib", "fits"} <= found["advice"][0].keys()
    least = found["jsons"][0]["per_rank_gib"]["total"]
    assert all(item["gain_gib"] < least for item in found["advice"]), "of a micro-batch of one clip"
    assert any(item["fits"] for item in found["advice"])
    assert "not one clip fits" in done.stderr


def test_what_a_node_lacks_is_said_and_advice_is_of_that() -> None:
    arguments = ("--recipe", "t5_small", "--ds", "zero3_nvme", "model.from_scratch=true", "--host-memory")
    done = plan(*arguments, "8GiB", "--json")
    assert done.returncode == 2
    (row,) = json.loads(done.stdout)["jsons"]
    assert row["headroom_gib"] > 0 and not row["fits"]
    assert list(row["lacking_gib"]) == ["NVMe"] and row["lacking_gib"]["NVMe"] == pytest.approx(row["nvme_gib"])
    assert "GiB of NVMe" in done.stderr
    short = plan(*arguments, f"{row['host_gib'] - 0.2}GiB", "--nvme", "1TB")
    assert short.returncode == 2
    assert "does not fit: zero3_nvme: lacks 0.20 GiB of host memory" in short.stdout
    assert "of a node's memory:" in short.stdout and "model.lora.r=16): then it fits" in short.stdout
    assert "model.lora.r=16" in short.stderr
    assert plan(*arguments, "8GiB", "--nvme", "1TB").returncode == 0


def test_what_saves_nothing_is_no_advice() -> None:
    done = plan("--recipe", "t5_small", "--gpu-memory", "600MiB", "--ds", "zero3_offload")
    assert done.returncode == 2
    assert "0.00 GiB" not in done.stdout
    assert "larger" in done.stderr


def test_the_command_can_be_typed_as_it_stands() -> None:
    words = "model.prefix=read the signs: "
    done = plan("--recipe", "t5_small", "--gpu-memory", "8GiB", "--ds", "auto", "--json", words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["jsons"]) == len(ds_config_names()), "auto recommends one of all"
    assert shlex.split(found["command"])[-1] == words
    assert found["target_tokens"] == {"of_a_text": 128, "of_a_step": 128 * 128}


def test_a_corpus_that_is_not_prepared_is_replaced_by_the_maxima(tmp_path: Path) -> None:
    corpus = tmp_path / "nothing"
    done = plan("--recipe", "t5_small", "--ds", "zero1", "--json", f"data.corpus={corpus}")
    assert done.returncode == 0, done.stderr
    workload = json.loads(done.stdout)["workload"]
    assert str(corpus) in workload
    assert "300 frames" in workload
