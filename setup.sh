#!/usr/bin/env bash
# Make the virtual environment that every `make` target uses. Quick when nothing has changed since the last time.
#
#   ./setup.sh
#
# VENV         where the environment lies                    (default .venv)
# PYTHON       the Python that it is made with, 3.11 or 3.12 (default python3)
# TORCH_INDEX  another package index, for torch alone: PyTorch's own instructions name one for CPU and for each CUDA version
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-}
# Motion for the demo corpus, tests and benchmarks (MIT). Without its dependencies: only its data files are read.
MOTION=spoken-to-signed==0.4.0

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }

# Run one step of the installation: a line before it, its time after it, its output only if it fails.
step() {
  local what=$1 started=$SECONDS output; shift
  printf 'setup: %s ... ' "$what"
  if output=$("$@" 2>&1); then
    printf '%d s\n' $((SECONDS - started))
  else
    printf 'failed\n%s\n' "$output" >&2
    fail "$what failed; the lines above are its output"
  fi
}

command -v "$PYTHON" >/dev/null || fail "no $PYTHON here: install Python 3.11 or 3.12, or name one: PYTHON=/path/to/python make setup"
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12) ;;
  *) fail "$PYTHON is Python $version; the toolkit needs 3.11 or 3.12: name one with PYTHON=/path/to/python" ;;
esac

# The environment is up to date when everything that shaped it is as it was: these files, the Python, the index and the place.
wanted=$( { cat requirements.txt setup.py setup.sh; printf '%s\n' "$version" "$TORCH_INDEX" "$PWD" "$VENV"; } | sha256sum | awk '{print $1}')
stamp=$VENV/.setup_stamp
pip=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)

if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  say "$VENV is up to date"
else
  if [ ! -x "$VENV/bin/pip" ]; then
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$PYTHON cannot make virtual environments: on Debian and Ubuntu, apt-get install python3-venv"
    step "making $VENV with Python $version" "$PYTHON" -m venv "$VENV"
  fi
  rm -f "$stamp"
  torch=$(grep -m 1 '^torch==' requirements.txt)
  step "installing $torch${TORCH_INDEX:+ from $TORCH_INDEX}" "${pip[@]}" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
  # DeepSpeed's C++ ops are built later, only those that are used, by `launch/doctor.py build-ops`.
  step "installing requirements.txt" env DS_BUILD_OPS=0 "${pip[@]}" install --quiet -r requirements.txt
  step "installing $MOTION (the demo's motion)" "${pip[@]}" install --quiet --no-deps "$MOTION"
  step "installing the toolkit, editable" "${pip[@]}" install --quiet --no-deps --no-build-isolation -e .
  printf '%s\n' "$wanted" > "$stamp"
fi

# zero3_nvme alone needs it; where it cannot be had, everything else works.
if ! [ -e /usr/include/libaio.h ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  (export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && apt-get install -y -qq --no-install-recommends libaio-dev) >/dev/null 2>&1 ||
    say "libaio-dev could not be installed: offload to NVMe (zero3_nvme) will not work, all else does"
fi

mkdir -p corpora runs

# What DeepSpeed will run on. A GPU that torch cannot see is worth a line now rather than a slow run later.
"$VENV/bin/python" - <<'PYTHON_CODE'
import shutil
import torch

if torch.cuda.is_available():
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    print(f"setup: torch {torch.__version__}, {torch.cuda.device_count()} GPU(s): {', '.join(sorted(names))}")
elif shutil.which("nvidia-smi"):
    print(f"setup: torch {torch.__version__} sees no GPU although nvidia-smi is here: choose a CUDA build with TORCH_INDEX, or update the driver")
else:
    print(f"setup: torch {torch.__version__}, no GPU here: everything runs on the CPU")
PYTHON_CODE

# DeepSpeed compiles its ops at first use.
missing=()
command -v g++ >/dev/null || command -v c++ >/dev/null || missing+=("a C++ compiler (g++)")
[ -f "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing+=("Python's headers (python3-dev)")
if [ ${#missing[@]} -gt 0 ]; then
  list=$(printf ', %s' "${missing[@]}")
  say "missing for DeepSpeed's ops: ${list:2}; on Debian and Ubuntu: apt-get install g++ python3-dev"
fi
