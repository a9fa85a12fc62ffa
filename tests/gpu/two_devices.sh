#!/usr/bin/env bash
# Train, stop, resume and evaluate on two GPUs, by every way of dividing a model: what no single GPU can show.
#
#   tests/gpu/two_devices.sh                       two GPUs; three minutes
#   CASES="zero3 nf4" tests/gpu/two_devices.sh     some of its cases
#   DEVICES=pretend tests/gpu/two_devices.sh       no GPU at all: pretend_gpus.py says what that shows
#   DEVICES=cpu tests/gpu/two_devices.sh           a machine without a GPU: two ranks on CPU cores, to try the script itself
#
# Needs no network: models are tiny and from scratch, clips come from the demo's letters. Everything lies in a folder
# that is removed when all is well, and named when it is not.
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
cd "$here"
devices=${DEVICES:-gpu}
cases=${CASES:-zero0 zero1 zero2 zero3 lora nf4}
python=${PYTHON:-python}
[ -x .venv/bin/python ] && python=${PYTHON:-.venv/bin/python}
jobs=${JOBS:-2}                        # cases at a time: most of a start is Python's imports, on one core
ranks=(-m deepspeed.launcher.runner --num_gpus 2)
case $devices in
  gpu) ;;
  pretend) ranks_on=(tests/gpu/pretend_gpus.py) jobs=${JOBS:-1} ;;
  cpu) jobs=${JOBS:-1} ;;
  *) echo "DEVICES=$devices: gpu, pretend or cpu" >&2; exit 2 ;;
esac
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

folder=$(mktemp -d)
"$python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path
from toolkit.corpus.demo import DemoSizes, make_demo
make_demo(Path(sys.argv[1]) / "clips", DemoSizes(train=24, dev=4, test=6, test_unseen_languages=3), seed=1)
PYTHON

settings=(
  "data.table=$folder/clips/table.csv" "data.poses=$folder/clips/poses" data.source=table "data.cache=$folder/corpora"
  model.from_scratch=true model.tiny=true ds.bf16.enabled=false ds.torch_autocast.enabled=false
  model.dropout=0 model.pose_encoder.dropout=0
  training.max_steps=3 training.global_batch_size=8 training.micro_batch_size=2 training.workers=0
  evaluation.num_beams=2 evaluation.max_new_tokens=8
)

# start NAME EXPECTED_CODE SCRIPT ARGUMENT...: on two ranks, with a port of its own; its output goes to NAME.txt
start() {
  local name=$1 expected=$2 code=0 port
  shift 2
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  "$python" "${ranks[@]}" --master_port "$port" ${ranks_on[@]+"${ranks_on[@]}"} "$@" >"$folder/$name.txt" 2>&1 || code=$?
  if [ "$code" != "$expected" ]; then
    echo "FAILED $name: exit code $code, not $expected: $folder/$name.txt"
    tail -n 15 "$folder/$name.txt"
    return 1
  fi
  if grep -rE 'Guessing device ID|using the device under current context' "$folder/$name.txt" "$folder"/runs/*/log*.txt; then
    echo "FAILED $name: a collective had to guess its device"
    return 1
  fi
  echo "ok $name"
}

one_case() {
  local name=$1 json=zero2 own=()
  case $name in
    zero3) json=zero3 own=(ds.zero_optimization.stage3_param_persistence_threshold=0) ;;
    zero?) json=$name ;;
    lora) own=('model.lora={r: 4}') ;;
    nf4) own=('model.lora={r: 4}' model.quantization=nf4) ;;
    *) echo "CASES: there is no $name" >&2; return 2 ;;
  esac
  local command=(launch/train.py --recipe t5_small --ds "$json" "${settings[@]}" ${own[@]+"${own[@]}"} "run.dir=$folder/runs/$name")
  if [ "$name" != zero3 ]; then
    start "$name" 0 "${command[@]}"
    return
  fi
  # The launcher passes on the code of a rank that ends by itself.
  start zero3_stopped 75 "${command[@]}" training.time_limit=0.0001 &&
    start zero3 0 "${command[@]}" &&
    grep -q "resuming from" "$folder/zero3.txt" &&
    start zero3_evaluate 0 launch/evaluate.py --model "$folder/runs/zero3" &&
    start zero3_evaluate_cut 0 launch/evaluate.py --zero3 --model "$folder/runs/zero3" --out "$folder/cut"
}

# The corpus is prepared by the first case alone; the others find it.
read -r first others <<<"$cases"
one_case "$first" || touch "$folder/failed"
for name in $others; do
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
  { one_case "$name" || touch "$folder/failed"; } &
done
wait

# Every way of dividing the same model learns the same.
"$python" - "$folder/runs" <<'PYTHON' || touch "$folder/failed"
import json, sys
from pathlib import Path
losses = {}
for run in sorted(Path(sys.argv[1]).glob("zero?")):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses[run.name] = [line["loss"] for line in lines if line["kind"] == "train"]
print(losses)
first = next(iter(losses.values()), [])
for name, values in losses.items():
    if len(values) != len(first) or any(abs(one - other) > 1e-3 for one, other in zip(first, values)):
        sys.exit(f"FAILED {name} learns otherwise than {next(iter(losses))}")
PYTHON

if [ -e "$folder/failed" ]; then
  echo "everything is in $folder"
  exit 1
fi
rm -rf "$folder"
echo "all well"
