"""The package: its ranges admit the tested versions, it names what it imports, and a wheel holds what it needs."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.hidden_gpus import python_path

ROOT = Path(__file__).resolve().parents[2]
# Import names of packages that are called otherwise, or that another one brings.
PACKAGE_OF = {"pose_format": "pose-format", "yaml": "pyyaml", "cv2": "mediapipe"}
# Named by setup.sh alone, which installs its data files without its dependencies.
NOT_REQUIRED = {"spoken_to_signed"}


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """What setup.py hands to setuptools."""
    import setuptools

    handed = {}
    original, folder = setuptools.setup, Path.cwd()
    setuptools.setup = lambda **arguments: handed.update(arguments)
    try:
        os.chdir(ROOT)
        code = compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec")
        exec(code, {"__file__": str(ROOT / "setup.py"), "__name__": "setup"})
    finally:
        setuptools.setup = original
        os.chdir(folder)
    return handed


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Exact version by package, from requirements.txt."""
    requirements = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        text = line.split("#")[0].strip()
        if text:
            requirements.append(Requirement(text))
    for requirement in requirements:
        assert [s.operator for s in requirement.specifier] == ["=="], f"{requirement} is not exact"
    return {requirement.name.lower(): next(iter(requirement.specifier)).version for requirement in requirements}


def test_every_range_admits_the_tested_version(setup_arguments, pins):
    ranges = [*setup_arguments["install_requires"], *setup_arguments["extras_require"]["dev"]]
    for requirement in map(Requirement, ranges):
        assert requirement.name.lower() in pins, f"requirements.txt has no {requirement.name}"
        assert requirement.specifier.contains(pins[requirement.name.lower()], prereleases=True), requirement
    assert {Requirement(text).name.lower() for text in ranges} == set(pins), "setup.py and requirements.txt name others"


def test_the_tests_run_on_the_versions_that_are_written_down(pins):
    found = {name: importlib.metadata.version(name).split("+")[0] for name in pins}
    assert found == pins


def test_everything_that_is_imported_is_required(setup_arguments):
    extras = [text for name, texts in setup_arguments["extras_require"].items() if name != "dev" for text in texts]
    required = {Requirement(text).name.lower() for text in [*setup_arguments["install_requires"], *extras]}
    missing = {}
    for path in [*ROOT.glob("toolkit/**/*.py"), *ROOT.glob("launch/*.py")]:
        for name in _top_level_imports(path) - set(sys.stdlib_module_names) - {"toolkit"} - NOT_REQUIRED:
            if PACKAGE_OF.get(name, name) not in required:
                missing.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert not missing, f"imported but not in setup.py: {missing}"


def _top_level_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_the_editable_install_is_this_clone():
    """Run from elsewhere, so that the current folder does not find the package."""
    code = "import toolkit; print(toolkit.__path__[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "toolkit"


def test_a_wheel_carries_recipes_and_jsons_inside_the_package_and_nothing_beside_it(tmp_path):
    # A copy, so that the build leaves nothing in the clone.
    source = tmp_path / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "-w", str(tmp_path / "wheels"), str(source)], check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {entry for entry in top if not entry.endswith(".dist-info")} == {"toolkit"}
    for folder, inside in (("recipes", "toolkit/_recipes"), ("ds_configs", "toolkit/_ds_configs")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".yaml", ".json"}:
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
    for path in (ROOT / "toolkit").rglob("*"):
        if path.suffix in {".yaml", ".txt", ".typed", ".html", ".css", ".js"}:
            assert path.relative_to(ROOT).as_posix() in names, f"{path} is not shipped"

    target = tmp_path / "target"
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True)
    code = (
        "import toolkit, pathlib\n"
        "from toolkit.recipe.load import load_recipe, recipe_names\n"
        "from toolkit.recipe.deepspeed.json_file import ds_config_names, load_deepspeed\n"
        "from toolkit.poses.landmarks import load_landmark_set\n"
        "print(pathlib.Path(toolkit.__file__).parent)\n"
        "print(*recipe_names()); print(*ds_config_names())\n"
        "load_recipe('t5_small'); load_deepspeed('zero3_offload'); load_landmark_set('hands_body_50')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, recipes, jsons = done.stdout.splitlines()
    assert Path(where) == target / "toolkit"
    assert set(recipes.split()) == {path.stem for path in (ROOT / "recipes").glob("[!_]*.yaml")}
    assert set(jsons.split()) == {path.stem for path in (ROOT / "ds_configs").glob("*.json")}
