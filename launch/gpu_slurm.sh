#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a verb on the GPUs of several nodes under Slurm. From the clone, which
# all nodes must see, with .venv made (docs/pods.md):
#
#   sbatch --nodes=4 launch/gpu_slurm.sh train --gin_file=...
#
# One process a GPU: JAX gives each task of Slurm the one GPU of its rank on the
# node, so that one task a node would leave the others idle. No --gpus-per-task:
# a task that sees its own GPU alone has none of that rank. Preempted, or with
# its time nearly over, the job saves and queues itself again; it does so after
# exit code 75 alone. Options of sbatch go over those below.
#SBATCH --job-name=l2s_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@180
set -euo pipefail
# Slurm runs a copy of this file, from elsewhere.
cd "${SLURM_SUBMIT_DIR:?Submit this script with sbatch.}"
if [[ ! -f launch/common.sh ]]; then
  echo "launch: $PWD is not the clone; submit from there" >&2
  exit 2
fi
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/env.sh
source launch/env.sh gpu

(($# > 0)) || usage launch/gpu_slurm.sh

# srun ends with the highest code of its tasks, so that an error must be higher
# than 75: those below get 128 more.
# shellcheck disable=SC2016
task='trap : TERM
code=0
"$@" || code=$?
if ((code > 0 && code < 75)); then
  code=$((code + 128))
fi
exit "$code"'

# scancel gives SIGTERM to the tasks; srun itself would take it for an order to
# kill them soon.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# --wait: from the first task's end to the last one's. Since Slurm 22.05 srun
# does not take --cpus-per-task from sbatch.
srun --kill-on-bad-exit=0 --wait=300 \
  --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c "$task" task \
  "${L2S_PYTHON:-.venv/bin/python}" -u -m l2s_jax "$@" &
step=$!
# A signal ends `wait`, and not the step.
while kill -0 "$step" 2> /dev/null; do
  wait "$step" || true
done
code=0
wait "$step" || code=$?
# A job that was cancelled is completing by now.
if ((code == AGAIN)) \
  && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]
then
  echo "launch: exit code $AGAIN, queueing again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
