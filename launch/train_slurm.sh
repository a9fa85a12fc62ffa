#!/usr/bin/env bash
# Train under SLURM, one task a GPU: srun starts the ranks, as `deepspeed --hostfile` does elsewhere.
#
#   sbatch launch/train_slurm.sh t5_3b_lora                                    as the lines below say
#   sbatch --nodes=4 launch/train_slurm.sh t5_3b_lora --ds zero3 training.epochs=40
#
# Change the lines below once for your cluster, or give the same options to sbatch, which win.
#SBATCH --job-name=sign-language-translation
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8            # ranks of a node: as many as --gpus-per-node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8              # a rank, and its loader processes (training.workers)
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120              # two minutes before the end the ranks are asked to save; more for large models
#SBATCH --requeue                      # the job may start again: after a failed node, and by the last lines below
#SBATCH --open-mode=append             # one log over all its starts
#SBATCH --output=slurm-%j.txt
set -euo pipefail

if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
  cat >&2 <<'USAGE'
usage: sbatch [OPTION OF SBATCH ...] launch/train_slurm.sh RECIPE [ARGUMENT ...]

  RECIPE    a name that `python launch/recipes.py ls` lists, or a YAML file
  ARGUMENT  anything that launch/train.py takes: --ds zero3, training.epochs=40 ...
USAGE
  exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: this is a job of SLURM: start it by sbatch launch/train_slurm.sh $1, or use launch/train_multi_gpu.sh" >&2
  exit 2
fi

recipe=$1
shift
# SLURM runs a copy of this script; the clone is the folder in which sbatch was called, or CLONE.
clone=${CLONE:-$SLURM_SUBMIT_DIR}
if [ ! -f "$clone/launch/train.py" ]; then
  echo "error: no launch/train.py in $clone: call sbatch in the clone, or set CLONE=FOLDER" >&2
  exit 2
fi
python=python
[ -x "$clone/.venv/bin/python" ] && python=$clone/.venv/bin/python

# The address of rank 0: the first node, and a port that two jobs on one node do not share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# --signal=USR1@120 reaches the tasks of srun, not this script. All ranks then finish their step, save and exit with
# 75; without --kill-on-bad-exit=0 the first exit would kill ranks that still write.
code=0
srun --kill-on-bad-exit=0 "$python" -u "$clone/launch/train.py" --recipe "$recipe" "$@" || code=$?

# The job resumes the run when SLURM starts it again. 75: interrupted with everything saved. 5: out of memory, and the
# next start takes smaller micro-batches, until there are none.
if [ "$code" = 75 ] || [ "$code" = 5 ]; then
  [ "$code" = 75 ] && why="interrupted with everything saved" || why="out of memory, smaller micro-batches are next"
  echo "$why; the job goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
