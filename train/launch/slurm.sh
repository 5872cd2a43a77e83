#!/usr/bin/env bash
# Train on several machines:  sbatch --nodes 4 train/launch/slurm.sh RECIPE [--key value ...]
# One task per GPU. Five minutes before the time limit every task gets SIGTERM: it finishes its step, writes a
# checkpoint and ends with status 143; the job goes back into the queue and continues from there. If a task fails
# instead, the others are ended at once. The working directory must be one that all machines see.
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
# Since Slurm 22.05 srun no longer takes this from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export STOPPED=$PWD/.hico-stopped-$SLURM_JOB_ID
rm -f "$STOPPED"
# A stop is told by a file, so that no task counts as failed before all have ended.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    trap : TERM  # Python handles it; this shell waits for Python
    python -m hico.train --config "$@"
    status=$?
    [[ $status -eq 143 ]] && touch "$STOPPED" && exit 0
    exit "$status"' _ "$recipe" "${@:2}"
status=$?
if [[ -e $STOPPED ]]; then
    rm -f "$STOPPED"
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
fi
exit "$status"
