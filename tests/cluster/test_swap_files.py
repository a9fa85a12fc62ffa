"""Files offloaded to NVMe: a folder for each node and run, removed at the end or by the next run after a kill."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cluster.swap_files import claim_swap_folders, remove_swap_folders, swap_to_this_node
from toolkit.errors import UserError
from toolkit.recipe.paths import swap_folder


def folder_of(run: Path, disk: Path) -> Path:
    return swap_folder(run, str(disk)) / platform.node()


def killed_run(folder: Path) -> None:
    """Leave what a run that was killed leaves behind."""
    program = "import sys; from pathlib import Path; from toolkit.cluster.swap_files import *; "
    program += "claim_swap_folders([Path(sys.argv[1])])"
    subprocess.run([sys.executable, "-c", program, folder], cwd=Path(__file__).parents[2], check=True)
    (folder / "zero_stage_3").mkdir()
    (folder / "zero_stage_3" / "0.tensor.swp").write_bytes(b"\0" * 100)


def test_this_node_has_a_folder_of_its_own(tmp_path: Path) -> None:
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)},
        "offload_param": {"device": "cpu"},
    }
    config = {"zero_optimization": zero}
    assert swap_to_this_node(config) == [tmp_path / platform.node()]
    assert config["zero_optimization"]["offload_optimizer"] == {
        "device": "nvme",
        "nvme_path": str(tmp_path / platform.node()),
    }
    assert swap_to_this_node({"zero_optimization": {"stage": 2}}) == []


@pytest.mark.process
def test_a_run_leaves_nothing_and_removes_what_killed_ones_left(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    dead, mine = folder_of(tmp_path / "dead", disk), folder_of(tmp_path / "mine", disk)
    disk.mkdir()
    (disk / "of the user").touch()
    killed_run(dead)
    killed_run(mine)
    claim_swap_folders([mine])
    assert [path.name for path in mine.iterdir()] == ["owner.json"]
    assert not dead.parent.exists()
    remove_swap_folders([mine])
    assert [path.name for path in disk.iterdir()] == ["of the user"]


def test_what_a_living_run_swaps_is_left_alone(tmp_path: Path) -> None:
    living, mine = folder_of(tmp_path / "living", tmp_path), folder_of(tmp_path / "mine", tmp_path)
    claim_swap_folders([living])
    claim_swap_folders([mine])
    assert json.loads((living / "owner.json").read_text())["pid"]
    with pytest.raises(UserError, match=str(living)):
        claim_swap_folders([living])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/nvme_swap/node") as error:
        claim_swap_folders([tmp_path / "file" / "nvme_swap" / "node"])
    assert "nvme_path=" in error.value.hint
