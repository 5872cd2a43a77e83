"""Signals at any moment, which checkpoints stay, and logs that a restart does not change."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from train_corpus import history, losses, make, weights

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


def test_the_best_checkpoint_is_found_where_the_run_was_moved(folder, tmp_path):
    recipe = make(folder, **BEST, learning_rate=100.0)
    best = weights(run.run_stage(recipe))
    shutil.rmtree(folder / "out/final")
    shutil.move(folder / "out", folder / "moved")
    moved = run.run_stage(make(folder, **BEST, learning_rate=5.0, output_dir=str(folder / "moved")))
    for name, weight in weights(moved).items():
        assert torch.equal(weight, best[name]), name


@pytest.mark.parametrize(
    "changes",
    [{"save_strategy": "epoch"}, {**BEST, "save_strategy": "best", "eval_steps": 3, "save_total_limit": None}],
)
def test_logged_losses_are_means_over_the_same_steps_after_a_restart(folder, changes):
    settings = {"logging_steps": 4, "num_train_epochs": 3, **changes}
    whole = run.run_stage(make(folder, **settings))
    shutil.copytree(folder / "out", folder / "resumed")
    shutil.rmtree(folder / "resumed/final")
    first, *later = checkpoints(folder / "resumed")
    for path in later:
        shutil.rmtree(path)
    resumed = run.run_stage(make(folder, **settings, output_dir=str(folder / "resumed")))
    assert first != Path(resumed)
    assert losses(history(resumed)) == losses(history(whole))
