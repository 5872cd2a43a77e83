"""Signals at any moment, and which checkpoints stay."""

import os
import signal

import pytest
import torch
from train_corpus import make, weights

from hico.train import run
from hico.train.checkpoint import checkpoints, is_complete

BEST = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_fraction": 0.2,
    "load_best_model_at_end": True,
    "save_total_limit": 1,
}


def signal_in(monkeypatch, method, *, step):
    """Send SIGTERM whenever a method of the trainer is called after ``step``."""
    real = getattr(run.HicoTrainer, method)

    def called(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(run.HicoTrainer, method, called)


def stopped(recipe):
    """Run a stage that is stopped."""
    with pytest.raises(SystemExit) as end:
        run.run_stage(recipe)
    assert end.value.code == run.STOPPED
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("method", ["evaluate", "save_result"])
def test_a_signal_after_the_last_step_leaves_the_result(folder, monkeypatch, method):
    common = {"eval_fraction": 0.2, "max_steps": 2}
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole"), **common))
    recipe = make(folder, **common, save_strategy="no")
    with monkeypatch.context() as patch:
        signal_in(patch, method, step=2)
        stopped(recipe)
    assert is_complete(folder / "out/final")
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(run.run_stage(recipe))[name]), name


def test_the_checkpoint_that_a_signal_asked_for_stays_beside_the_best_one(folder, monkeypatch):
    recipe = make(folder, **BEST, learning_rate=100.0)
    with monkeypatch.context() as patch:
        signal_in(patch, "training_step", step=3)
        stopped(recipe)
    assert [path.name for path in checkpoints(folder / "out")] == ["checkpoint-1", "checkpoint-4"]
