"""A stage is held against what it was made from: real changes are seen, and nothing else."""

import os
import re
import shutil

import pytest
from train_corpus import history, losses, make, write_corpus

from hico.train import run
from hico.train.checkpoint import read_manifest
from hico.train.provenance import check_finished, check_resumable


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a corpus and a finished stage."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder)
    run.run_stage(make(folder, max_steps=1))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": False, "weight_decay": 0.0, "adam_beta2": 0.999, "gradient_accumulation_steps": 1},
        {"trainable": ["llm", "projector", "compressor", "encoder"]},
        {"project": "mine", "tf32": False, "skip_memory_metrics": False, "logging_steps": 7, "ddp_timeout": 60},
    ],
)
def test_a_finished_stage_may_be_said_and_watched_otherwise(finished, changes):
    check_finished(finished / "out/final", make(finished, max_steps=1, **changes))


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"trainable": ["llm"]}, {"image_size": 48}, {"max_steps": 2}, {"lr_scheduler_type": "cosine"}],
)
def test_a_finished_stage_that_was_made_otherwise_is_told(finished, changes):
    with pytest.raises(ValueError, match=f"is finished, but {next(iter(changes))} was"):
        check_finished(finished / "out/final", make(finished, **{"max_steps": 1, **changes}))


def test_a_run_goes_on_wherever_its_folders_lie(tmp_path, monkeypatch):
    folder, moved = tmp_path / "here", tmp_path / "there"
    folder.mkdir()
    write_corpus(folder)
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole"), **settings))
    run.run_stage(make(folder, **settings))
    for name in ("final", "checkpoint-3"):
        shutil.rmtree(folder / "out" / name)
    shutil.move(folder, moved)
    monkeypatch.chdir(moved)
    resumed = run.run_stage(make(moved.relative_to(os.getcwd()), **settings))
    assert losses(history(resumed)) == losses(history(moved / whole.relative_to(folder)))


@pytest.mark.parametrize("changes", [{"trainable": ["llm"]}, {"optim": "sgd"}, {"objective": "tracks"}])
def test_another_optimizer_is_refused_on_resuming(finished, changes):
    last = finished / "out/final"
    asked = {**read_manifest(last), "settings": {**read_manifest(last)["settings"], **changes}}
    key, value = next(iter(changes.items()))
    with pytest.raises(
        ValueError, match=f"holds the optimizer of other settings: {key} was .* and is {re.escape(repr(value))}"
    ):
        check_resumable(last, asked)
