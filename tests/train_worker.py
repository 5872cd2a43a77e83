"""One process of a training run whose gradients are looked at: ``train_worker.py RECIPE.json RESULT.pt``."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hico.train import run
from hico.train.__main__ import leave
from hico.train.recipes import make_recipe


class Record(TrainerCallback):
    """Keep the gradients of the first step, averaged over devices."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {name: whole(p.grad).clone() for name, p in named(model) if p.grad is not None}


def named(model):
    added = re.compile(r"^module\.|_checkpoint_wrapped_module\.")
    return [(added.sub("", name), parameter) for name, parameter in model.named_parameters()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def let_processes_be_devices():
    """Let accelerate shard over CPU processes, as it does over devices of any other kind."""
    real = PartialState.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def record_deepspeed(record):
    """Look at the gradients between backward and step, which DeepSpeed makes in one go."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.utils import safe_get_full_grad

    real = DeepSpeedEngine.step

    def step(self, *args, **kwargs):
        if not record.gradients and self.is_gradient_accumulation_boundary():
            found = {name: safe_get_full_grad(parameter) for name, parameter in named(self.module)}
            record.gradients = {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
        return real(self, *args, **kwargs)

    DeepSpeedEngine.step = step


class StopAt(TrainerCallback):
    """Send SIGTERM to this process alone when a step has been made."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def main(recipe_file, result):
    recipe = make_recipe(json.loads(Path(recipe_file).read_text()))
    record, made, real = Record(), [], run.make_trainer
    if "ACCELERATE_USE_FSDP" in os.environ:
        let_processes_be_devices()

    def make_trainer(*args):
        trainer = real(*args)
        made.append(trainer)
        if trainer.args.deepspeed:
            record_deepspeed(record)
        else:
            trainer.add_callback(record)
        if "STOP_AT" in os.environ and trainer.args.process_index == 1:
            trainer.add_callback(StopAt(int(os.environ["STOP_AT"])))
        return trainer

    run.make_trainer = make_trainer
    final = run.run_stage(recipe)
    if made[0].args.process_index == 0:
        losses = [entry["loss"] for entry in made[0].state.log_history if "loss" in entry]
        sharded = made[0].is_fsdp_enabled
        found = {"losses": losses, "gradients": record.gradients, "final": str(final), "sharded": sharded}
        found["logs"] = made[0].state.log_history
        torch.save(found, result)
    return 0


if __name__ == "__main__":
    leave(lambda: main(*sys.argv[1:]))
