"""Shares of an array job and builders on a Ray cluster build the same corpus, byte for byte, as one process."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import limit
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import Prepared, prepare
from toolkit.errors import TooManyRejects, UserError
from toolkit.recipe.schema import Data

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "prepare.py"


@pytest.fixture(autouse=True)
def many_shards(monkeypatch) -> None:
    """24 clips make 10 shards."""
    monkeypatch.setattr("toolkit.corpus.shards.LEAST_CLIPS", 3)


def _data(clips: Path, **settings) -> Data:
    return Data(**({"table": str(clips / "table.csv"), "poses": str(clips / "poses"), "workers": 1} | settings))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def whole(clips, tmp_path) -> dict[str, bytes]:
    return _bytes(prepare(_data(clips), tmp_path / "whole").path)


def test_shares_in_any_order_make_the_corpus_when_the_last_is_there(clips, tmp_path, whole) -> None:
    out = tmp_path / "out"
    found = [prepare(_data(clips), out, share=(number, 3)) for number in (3, 1)]
    assert [share.missing_shards for share in found] == [7, 3] and not out.exists()
    again = prepare(_data(clips), out, share=(3, 3))
    assert (again.missing_shards, again.clips_per_second) == (3, None), "nothing is built twice"
    assert prepare(_data(clips), out, share=(2, 3)).missing_shards == 0
    assert _bytes(out) == whole


def test_one_command_without_a_share_builds_what_is_missing(clips, tmp_path, whole) -> None:
    out = tmp_path / "out"
    prepare(_data(clips), out, share=(2, 4))
    assert _bytes(prepare(_data(clips), out).path) == whole


def test_a_share_that_comes_late_finds_the_corpus(clips, tmp_path) -> None:
    """More shares than shards: some have nothing to build, and may start after the others are done."""
    out = tmp_path / "out"
    for number in range(1, 11):
        prepare(_data(clips), out, share=(number, 12))
    assert out.exists()
    assert prepare(_data(clips), out, share=(11, 12)) == Prepared(out, None)
    with pytest.raises(UserError, match="/out "):
        prepare(_data(clips, fps=5), out, share=(11, 12))
    assert prepare(_data(clips, fps=5), out, share=(11, 12), replace=True).missing_shards == 10


def _share(data: Data, out: Path, number: int, results) -> None:
    results.put(prepare(data, out, share=(number, 4)).missing_shards)


@pytest.mark.process
def test_shares_at_the_same_time(clips, tmp_path, whole) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    out = tmp_path / "out"
    jobs = [context.Process(target=_share, args=(_data(clips), out, number, results)) for number in (1, 2, 3, 4)]
    for job in jobs:
        job.start()
    missing = [results.get(timeout=limit(60)) for _ in jobs]
    for job in jobs:
        job.join()
    assert 0 in missing and _bytes(out) == whole


def test_shares_of_other_inputs_do_not_mix(clips, tmp_path) -> None:
    prepare(_data(clips), tmp_path / "out", share=(1, 2))
    with pytest.raises(UserError, match=r"out\.partial"):
        prepare(_data(clips, fps=5), tmp_path / "out", share=(2, 2))


def test_the_last_share_counts_the_rejects_of_all(own_clips, tmp_path) -> None:
    (own_clips / "poses" / "train-00001.pose").write_bytes(b"not a pose")
    (own_clips / "poses" / "train-00002.pose").unlink()
    prepare(_data(own_clips), tmp_path / "out", share=(1, 2))
    with pytest.raises(TooManyRejects, match=r"\b2\b.*\b24 clips"):
        prepare(_data(own_clips), tmp_path / "out", share=(2, 2))
    prepare(_data(own_clips, max_rejects=0.1), tmp_path / "out", share=(1, 2))
    out = prepare(_data(own_clips, max_rejects=0.1), tmp_path / "out", share=(2, 2)).path
    assert Corpus.open(out).summary()["rejects"] == 2


def _command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=limit(120))


@pytest.mark.process
def test_a_ray_cluster_of_two_workers(clips, tmp_path, whole, ray_cluster) -> None:
    shutil.make_archive(str(tmp_path / "poses"), "zip", clips, "poses")
    out = tmp_path / "ray"
    done = _in_small_shards(tmp_path, clips, tmp_path / "poses.zip", out, ray_cluster)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["clips"] == 24
    assert _bytes(out) == whole


def _in_small_shards(tmp_path: Path, clips: Path, poses: Path, out: Path, address: str):
    """The command as a user gives it, but for shards that are small enough for every builder to get some."""
    words = ["prepare.py", "--table", clips / "table.csv", "--poses", poses, "--out", out, "--ray", address, "--json"]
    program = (
        f"import sys; sys.argv = {[str(word) for word in words]!r}; sys.path.insert(0, {str(SCRIPT.parents[1])!r})\n"
        "import toolkit.corpus.shards as shards; shards.LEAST_CLIPS = 3\n"
        f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=limit(120)
    )


# In a process of its own, because Ray takes over the signal handlers of the one that starts it.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def ray_cluster():
    """Address of a cluster of two machines with a processor each, all on this one."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin and process.stdout
    address = next(line.split()[1] for line in process.stdout if line.startswith("address"))
    yield address
    process.stdin.close()
    process.wait(60)


def test_a_cluster_that_does_not_answer_is_an_error(clips, tmp_path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    with pytest.raises(UserError, match=r"--ray 127\.0\.0\.1:1"):
        prepare(_data(clips), tmp_path / "out", ray="127.0.0.1:1")


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shard", "1/2"], "--out"),
        (["--out", "out", "--shard", "0/2"], "--shard 0/2"),
        (["--out", "out", "--shard", "3"], "--shard 3"),
        (["--out", "out", "--shard", "1/2", "--ray", "auto"], "--ray"),
    ],
)
def test_wrong_options_are_named_with_a_hint(tmp_path, arguments, named: str) -> None:
    done = _command(*arguments, cwd=tmp_path)
    message, hint = done.stderr.strip().splitlines()
    assert done.returncode == 2 and named in message and hint.startswith("hint: ")
