"""The doctor's findings and command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import limit
from toolkit.cluster.checks import examine
from toolkit.cluster.environment import VARIABLES, describe_environment

DOCTOR = Path(__file__).resolve().parents[2] / "launch" / "doctor.py"


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, str(DOCTOR), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=limit(300),
    )


@pytest.mark.process
def test_the_environment_names_versions_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = describe_environment()
    text = json.dumps(environment)
    assert "hf_secret_of_the_user" not in text
    assert environment["packages"]["deepspeed"].startswith("0.")
    assert environment["variables"]["OMP_NUM_THREADS"] == "1"
    assert not any(word in name for name in VARIABLES for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))


def test_every_finding_that_is_wrong_names_its_remedy():
    findings = examine()
    assert {finding.name for finding in findings} >= {"device", "compiler", "op shm_comm", "memory", "disk"}
    assert all(finding.remedy for finding in findings if finding.state == "missing")


def test_gpus_that_are_alike_are_counted(monkeypatch):
    card = {"name": "H200", "memory_gib": 139.8}
    monkeypatch.setattr("toolkit.cluster.checks.gpus", lambda: [*[card] * 7, {"name": "T4", "memory_gib": 15.0}])
    (device,) = (finding for finding in examine() if finding.name == "device")
    assert device.detail == "GPU: 7 x H200 (139.8 GiB), 1 x T4 (15 GiB)"


def test_a_stale_lock_is_in_the_list_of_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    found = [finding for finding in examine() if finding.name == "build lock"]
    assert len(found) == 1 and found[0].state == "missing" and "--force" in found[0].remedy


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("9.0a", "export TORCH_CUDA_ARCH_LIST='9.0'"),
        ("Hopper", "unset TORCH_CUDA_ARCH_LIST"),
        ("8.0 9.0", None),
        ("8.0;9.0+PTX", None),
        ("", None),
    ],
)
def test_capabilities_that_the_builder_cannot_read_are_reported(given, remedy):
    found = [finding for finding in examine(given) if finding.name == "TORCH_CUDA_ARCH_LIST"]
    assert [(finding.state, finding.remedy) for finding in found] == ([("note", remedy)] if remedy else [])


@pytest.mark.process
def test_the_command_reports_the_capabilities_as_they_were_given():
    done = run_doctor("--json", TORCH_CUDA_ARCH_LIST="9.0a")
    findings = json.loads(done.stdout.splitlines()[-1])["findings"]
    assert any("'9.0a'" in finding["detail"] for finding in findings)


@pytest.mark.process
def test_json_is_one_object_on_the_last_line():
    done = run_doctor("--json")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"environment", "findings"}


@pytest.mark.process
def test_an_unknown_op_is_an_error_with_a_hint_and_exit_2():
    done = run_doctor("build-ops", "cpu_adm")
    assert done.returncode == 2
    message, hint = done.stderr.splitlines()
    assert "cpu_adm" in message and "cpu_adam" in hint


@pytest.mark.process
def test_a_stale_lock_stops_a_build_with_its_remedy(tmp_path):
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    done = run_doctor("build-ops", "shm_comm", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "--force" in done.stderr.splitlines()[-1]


@pytest.mark.process
def test_a_build_without_a_compiler_is_an_error_with_a_hint_and_exit_2(tmp_path):
    done = run_doctor("build-ops", "shm_comm", TORCH_EXTENSIONS_DIR=str(tmp_path), PATH=str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    message, hint = done.stderr.splitlines()
    assert "shm_comm" in message and "launch/doctor.py" in hint
