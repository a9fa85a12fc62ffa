"""What README, Makefile and shell scripts promise is there; test_documented_commands.py tries the commands."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.house.documented import DOCUMENTS, ROOT, Command, commands_of
from toolkit import errors

SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_documents_name_is_there(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands_of(document):
        words = Command(document.name, command).words
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, command
    for name in re.findall(
        r"\b(?:launch|benchmarks|docs|tests)/[\w/]+\.(?:py|sh)\b", document.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_readme_shows_the_commands_that_matter():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make demo", "make test", "--ds zero3_offload", "deepspeed --hostfile", "--num_gpus 8"):
        assert command in text
    assert "TORCH_INDEX" in text and "pytorch.org" in text


def test_the_readme_lists_every_exit_code():
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(row) for row in rows} == codes


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("name", ["train_single_gpu.sh", "train_multi_gpu.sh"])
def test_short_forms_say_how_they_are_used(name):
    done = subprocess.run(["bash", str(ROOT / "launch" / name)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: launch/{name} RECIPE")


@pytest.mark.parametrize("ranks", [[], ["0"], ["two"], ["--ds"]])
def test_a_wrong_number_of_ranks_is_one_line(ranks):
    command = ["bash", str(ROOT / "launch" / "train_multi_gpu.sh"), "demo", *ranks]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: the number of ranks is")


def test_short_forms_hand_everything_to_the_launcher(tmp_path):
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "train_single_gpu.sh"), "my recipe.yaml", "--ds", "zero2", "a.b=c d"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    train = str(ROOT / "launch" / "train.py")
    expected = ["--num_gpus", "1", train, "--recipe", "my recipe.yaml", "--ds", "zero2", "a.b=c d"]
    assert done.stdout.splitlines() == expected


def test_make_without_a_target_lists_the_targets():
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True)
    for target in ("setup", "demo", "test", "test-nightly", "lint", "clean"):
        assert f"make {target}" in done.stdout


def test_what_ci_runs_is_make_test():
    text = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make .*\btest\b", text, re.MULTILINE)


def test_setup_refuses_a_python_that_is_too_old_or_absent(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    for python, words in ((str(old), "is Python 3.9"), ("no-such-python", "no no-such-python here")):
        done = subprocess.run(
            ["bash", str(ROOT / "setup.sh")],
            env={"PATH": "/usr/bin:/bin", "PYTHON": python, "VENV": str(tmp_path / "venv")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and words in done.stderr
        assert not (tmp_path / "venv").exists()


def test_the_picture_can_be_drawn_again(tmp_path):
    script = ROOT / "docs" / "pictures" / "draw_pipeline.py"
    picture = tmp_path / "pipeline.png"
    subprocess.run([sys.executable, str(script), str(picture)], check=True, env=os.environ | {"MPLBACKEND": "agg"})
    assert picture.read_bytes()[16:24] == script.with_name("pipeline.png").read_bytes()[16:24]  # width and height


def test_every_room_has_its_place_in_the_dependency_rule():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    placed = set(re.findall(r"\w+", " ".join(layers)))
    rooms = {path.parent.name for path in (ROOT / "toolkit").glob("*/__init__.py")}
    assert rooms <= placed


@pytest.mark.parametrize("script", sorted(ROOT.glob("launch/*.py")), ids=lambda path: path.stem)
def test_a_python_without_the_packages_is_one_line_with_a_hint(script, tmp_path):
    bare = [sys.executable, "-S", str(script), "--help"]
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    error, hint = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout
    assert error.startswith("error: ") and "deepspeed" in error and "activate" in hint


HELP = [[path, "--help"] for path in sorted(ROOT.glob("launch/*.py"))] + [[ROOT / "launch" / "recipes.py", "ls"]]


@pytest.mark.parametrize("words", HELP, ids=lambda words: f"{words[0].stem} {words[1]}")
def test_help_and_the_list_of_recipes_import_no_heavy_library(words, tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = ('torch', 'transformers', 'deepspeed', 'datasets', 'bitsandbytes')\n"
        "print([name for name in heavy if name in sys.modules], file=open('heavy', 'w'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "heavy").read_text(encoding="utf-8").strip() == "[]"
