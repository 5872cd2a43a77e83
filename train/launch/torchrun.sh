#!/usr/bin/env bash
# Train on the GPUs of one machine:  train/launch/torchrun.sh RECIPE [--key value ...]
# NUM_DEVICES sets how many processes (all GPUs); restart with the same line to go on after an interruption.
set -euo pipefail
recipe=${1:?usage: torchrun.sh RECIPE [--key value ...]}
shift
devices=${NUM_DEVICES:-$(python -c 'import torch; print(torch.cuda.device_count())')}
[[ $devices -gt 0 ]] || { echo "torch sees no GPU; set NUM_DEVICES, and use_cpu: true to train on CPUs" >&2; exit 1; }
# Time to finish a step and write a checkpoint when the job is told to stop (torch >= 2.10; before, 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec torchrun --standalone --nproc_per_node "$devices" -m hico.train --config "$recipe" "$@"
