#!/usr/bin/env bash
# Train on N GPUs of this machine, or in N ranks on its CPU: the short form of `deepspeed --num_gpus N launch/train.py --recipe RECIPE`.
set -euo pipefail

if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
  cat >&2 <<'USAGE'
usage: launch/train_multi_gpu.sh RECIPE N [ARGUMENT ...]

  RECIPE    a name that `python launch/recipes.py ls` lists, or a YAML file
  N         ranks: one per GPU, or one or more CPU cores each where there is no GPU
  ARGUMENT  anything that launch/train.py takes: --ds zero3, --json, training.epochs=40 ...

MASTER_PORT=29501 launch/train_multi_gpu.sh RECIPE N   lets a second run start beside one on this machine (default: 29500).
USAGE
  exit 2
fi

recipe=$1 ranks=${2:-}
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]]; then
  echo "error: the number of ranks is '${ranks}', not 1 or more: launch/train_multi_gpu.sh RECIPE N [ARGUMENT ...]" >&2
  exit 2
fi
shift 2

# The launcher of the activated environment, else of the clone's own .venv. Its folder is added to PATH: op builds look for ninja there.
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! command -v deepspeed >/dev/null; then
  if [ ! -x "$clone/.venv/bin/deepspeed" ]; then
    echo "error: no deepspeed command here: run \`make setup\`, or activate the environment that has it" >&2
    exit 2
  fi
  PATH=$clone/.venv/bin:$PATH
fi

# Ctrl-C reaches launch.py and the ranks, which save; deepspeed itself would print a traceback after their last line.
trap '' INT
exec deepspeed --num_gpus "$ranks" ${MASTER_PORT:+--master_port "$MASTER_PORT"} "$clone/launch/train.py" --recipe "$recipe" "$@"
