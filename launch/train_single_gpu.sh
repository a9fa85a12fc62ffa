#!/usr/bin/env bash
# Train on one GPU, or on the CPU where there is none: the short form of `deepspeed --num_gpus 1 launch/train.py --recipe RECIPE`.
set -euo pipefail

if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
  cat >&2 <<'USAGE'
usage: launch/train_single_gpu.sh RECIPE [ARGUMENT ...]

  RECIPE    a name that `python launch/recipes.py ls` lists, or a YAML file
  ARGUMENT  anything that launch/train.py takes: --ds zero2, --overfit 8, training.epochs=40 ...
USAGE
  exit 2
fi

exec bash "$(dirname "${BASH_SOURCE[0]}")/train_multi_gpu.sh" "$1" 1 "${@:2}"
