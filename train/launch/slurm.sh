#!/usr/bin/env bash
# Train on several machines:  sbatch --nodes 4 train/launch/slurm.sh RECIPE [--key value ...]
# One task per GPU. Five minutes before the time limit every task gets SIGTERM: it finishes its step, writes a
# checkpoint and ends with status 143; the job goes back into the queue and continues from there.
#SBATCH --job-name=hico
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
recipe=${1:?usage: sbatch slurm.sh RECIPE [--key value ...]}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
# The signal goes to the tasks; a task's own shell is replaced by Python, which handles it.
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m hico.train --config "$@"' _ "$recipe" "${@:2}"
status=$?
if [[ $status -eq 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
