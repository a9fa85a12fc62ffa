"""Builds the libraries of the pretended runtime, once for each version of their sources and of torch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.pretended_cuda.environment import Environment
from toolkit.errors import UserError

SOURCES = Path(__file__).with_name("runtime")
OPTIONS = ("-O1", "-g", "-std=c++17", "-fPIC", "-shared")
RUNTIME = "libcudart.so.13"
DRIVER = "libcuda.so.1"
NCCL = "libnccl.so.2"
# In the order in which the linker loads them.
NAMES = (RUNTIME, "libcublas.so.13", "libcublasLt.so.13", "libcudnn.so.9", NCCL, DRIVER)
# What of each library is written by hand; the driver's functions are the runtime's too: both look at the same streams.
WRITTEN = {
    RUNTIME: ("memory.cpp", "streams.cpp", "graphs.cpp", "device.cpp", "driver.cpp"),
    "libcublas.so.13": ("cublas.cpp",),
    "libcublasLt.so.13": ("cublaslt.cpp",),
    "libcudnn.so.9": ("cudnn.cpp",),
    NCCL: ("nccl.cpp",),
}
# What all other functions of these give: what they do must be right, and nothing is not.
REFUSED = {RUNTIME: 801, NCCL: 5}  # cudaErrorNotSupported, ncclInvalidUsage
# Which other functions of these launch a kernel.
LAUNCHES = {
    "libcublas.so.13": (r"gemm|Gemm|gemv|dot|Dot|axpy|trsm|getr", "BLAS"),
    "libcublasLt.so.13": (r"^cublasLtMatmul$", "BLAS"),
    "libcudnn.so.9": (
        r"^cudnn(Convolution(Forward|BackwardData|BackwardFilter|BiasActivationForward)|BatchNormalization\w*)$",
        "DNN",
    ),
}
EXPORTED = "cu*; __cuda*; nccl*; pretended_*"
CONVOLUTION_WORKSPACE = r"^cudnnGetConvolution\w*WorkspaceSize$"


def built_libraries(environment: Environment) -> Path:
    """The folder of the libraries, which are built first where they are not there yet.

    Raises:
        UserError: they cannot be built.
    """
    folder = Path(sys.prefix) / "pretended_cuda" / _key(environment)
    if folder.is_dir():
        return folder
    print("pretended CUDA: building the libraries, in a minute", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written: {error.strerror}", "change its permissions") from None
    try:
        _build(environment, new)
        try:
            new.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _key(environment: Environment) -> str:
    found = hashlib.sha256(environment.torch.encode())
    for path in (Path(__file__), *sorted(SOURCES.iterdir())):
        found.update(path.read_bytes())
    for name in NAMES[:-1]:  # pip's packages have no driver
        real = environment.library(name)
        found.update(f"{real} {real.stat().st_size}".encode())
    return found.hexdigest()[:16]


def _build(environment: Environment, folder: Path) -> None:
    for name, sources in WRITTEN.items():
        _compile(environment, folder, name, [*(SOURCES / path for path in sources), _others(environment, folder, name)])
    empty = folder / "empty.cpp"
    empty.write_text("")
    _compile(environment, folder, DRIVER, [empty], "-Wl,--no-as-needed")
    # Triton's launchers are linked with the driver, DeepSpeed's ops with both.
    (folder / "libcuda.so").symlink_to(DRIVER)
    (folder / "libcudart.so").symlink_to(RUNTIME)


def _compile(environment: Environment, folder: Path, name: str, sources: list[Path], *options: str) -> None:
    """Compile a library whose symbols have the version that torch was linked with, the library's name."""
    versions = folder / f"{name}.map"
    versions.write_text(f"{name} {{ global: {EXPORTED}; local: *; }};\n")
    command = [environment.compiler, *OPTIONS, *options, f"-DPRETENDED_CUDNN_VERSION={_cudnn_version(environment)}"]
    command += [f"-I{path}" for path in (SOURCES, *environment.headers)]
    command += [f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}", *map(str, sources)]
    command += ["-o", str(folder / name), *([f"-L{folder}", f"-l:{RUNTIME}"] if name != RUNTIME else [])]
    done = subprocess.run([*command, "-ldl", "-lpthread", "-lrt"], capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise UserError(f"g++ cannot build {name} of the pretended CUDA runtime: {first}", "give another CUDA build")


def _others(environment: Environment, folder: Path, name: str) -> Path:
    """The functions that are not written by hand: each launches, makes a handle, does nothing, or is refused."""
    written = "".join((SOURCES / path).read_text(encoding="utf-8") for path in WRITTEN[name])
    pattern, count = LAUNCHES.get(name, ("(?!)", ""))
    lines = ['#include "handles.h"', 'extern "C" {']
    for symbol in environment.symbols(name):
        if re.search(rf"\b{symbol}\b", written):
            continue
        if name in REFUSED:
            body = f"int {symbol}() {{ return {REFUSED[name]}; }}"
        elif re.search(pattern, symbol):
            body = f'int {symbol}(Handle* handle) {{ return pretended_launch(handle->stream, {count}, "{symbol}"); }}'
        elif re.search(CONVOLUTION_WORKSPACE, symbol):
            body = f"int {symbol}(void*, void*, void*, void*, void*, int, size_t* bytes) {{ *bytes = 0; return 0; }}"
        elif "create" in symbol.lower() or symbol.endswith("Init"):
            body = f"int {symbol}(Handle** made) {{ return make_handle(made); }}"
        elif "get" in symbol.lower() and "string" in symbol.lower():
            body = f'const char* {symbol}() {{ return "pretended"; }}'
        else:
            body = f"int {symbol}() {{ return 0; }}"
        lines.append(body)
    path = folder / f"{name}.others.cpp"
    path.write_text("\n".join([*lines, "}", ""]))
    return path


def _cudnn_version(environment: Environment) -> int:
    """As cudnnGetVersion says it: 91900 of 9.19.0."""
    header = environment.library("libcudnn.so.9").parents[1] / "include" / "cudnn_version.h"
    text = header.read_text(encoding="utf-8")
    major, minor, patch = (
        int(re.findall(rf"#define CUDNN_{part} (\d+)", text)[0]) for part in ("MAJOR", "MINOR", "PATCHLEVEL")
    )
    return 10000 * major + 100 * minor + patch


def variables(folder: Path) -> dict[str, str]:
    """What a process of the pretended runtime finds in its environment."""
    start = str(Path(__file__).with_name("start"))
    found = {
        "LD_PRELOAD": " ".join(str(folder / name) for name in NAMES),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PRETENDED_CUDA": start,
    }
    # For programs as they start, and for DeepSpeed's ops as they are built.
    for name in ("LD_LIBRARY_PATH", "LIBRARY_PATH"):
        found[name] = _before(str(folder), name)
    found["PYTHONPATH"] = _before(start, "PYTHONPATH")
    return found


def _before(first: str, name: str) -> str:
    """A list of folders in the environment, with another at its front."""
    return os.pathsep.join(filter(None, (first, os.environ.get(name, ""))))
