"""The CUDA build of torch of this environment: where its headers and libraries are."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import UserError

CUDA = "13"  # whose signatures runtime/*.cpp have
HINT = f"install a CUDA {CUDA} build of torch, with pip, into an environment of its own, and give its Python"


@dataclass(frozen=True)
class Environment:
    """What the pretended runtime takes of an environment.

    Attributes:
        torch: version of torch, with that of CUDA.
        headers: folders for the compiler, in their order.
        packages: the folder that holds the libraries of CUDA, one folder for each package.
        compiler: path of g++.
    """

    torch: str
    headers: tuple[Path, ...]
    packages: Path
    compiler: str

    def library(self, name: str) -> Path:
        """The real library of that name, as libcublas.so.13.

        Raises:
            UserError: it is not there.
        """
        for found in sorted(self.packages.glob(f"*/lib/{name}")):
            return found
        raise UserError(f"{name} is not in {self.packages}", HINT)

    def symbols(self, name: str) -> list[str]:
        """The functions that the real library exports."""
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", self.library(name)], capture_output=True, text=True, check=True
        )
        functions = re.findall(r"^\w+ [TW] ([A-Za-z]\w*)", listed.stdout, re.MULTILINE)
        return sorted(set(functions))


def find_environment() -> Environment:
    """That of this Python; torch is not imported.

    Raises:
        UserError: it has no CUDA build of torch, or the machine no compiler.
    """
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("nm") is None:
        raise UserError("no g++ on PATH, which builds the pretended CUDA runtime", "install g++ and binutils")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("this Python has no torch", HINT)
    torch = Path(spec.origin).parent
    version = (torch / "version.py").read_text(encoding="utf-8")
    cuda = re.search(r"^cuda\b.*= '([\d.]+)'", version, re.MULTILINE)
    if cuda is None or cuda[1].split(".")[0] != CUDA:
        kind = f"for CUDA {cuda[1]}" if cuda else "without CUDA"
        raise UserError(f"torch of this Python is a build {kind}, and the pretended runtime is of CUDA {CUDA}", HINT)
    packages = torch.parent / "nvidia"
    # CUDA's own package leaves out a few headers, which Triton brings.
    headers = (
        _folder_of("cuda_runtime_api.h", packages),
        _folder_of("nccl.h", packages),
        torch.parent / "triton" / "backends" / "nvidia" / "include",
    )
    number = re.search(r"^__version__ = '(.+)'", version, re.MULTILINE)
    return Environment(f"{number[1] if number else ''} cuda {cuda[1]}", headers, packages, compiler)


def _folder_of(header: str, packages: Path) -> Path:
    for found in sorted(packages.glob(f"*/include/{header}")):
        return found.parent
    raise UserError(f"{header} is not in {packages}", HINT)
