"""A stage is held against what it was made from: real changes are seen, and nothing else."""

import json
import os
import re
import shutil

import pytest
from train_corpus import history, losses, make, write_corpus

from hico.train import run
from hico.train.checkpoint import checkpoints, read_manifest
from hico.train.provenance import changes_since, changes_since_end


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
    assert not changes_since_end(finished / "out/final", make(finished, max_steps=1, **changes))


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"trainable": ["llm"]}, {"image_size": 48}, {"max_steps": 2}, {"lr_scheduler_type": "cosine"}],
)
def test_a_finished_stage_that_was_made_otherwise_is_told(finished, changes):
    recipe = make(finished, **{"max_steps": 1, **changes})
    assert changes_since_end(finished / "out/final", recipe).keys() == changes.keys()
    with pytest.raises(ValueError, match=f"is finished, but {next(iter(changes))} was"):
        run.run_stage(recipe)


def test_what_an_earlier_version_made_is_no_stage_to_go_on_from(tmp_path):
    (tmp_path / "manifest.json").write_text('{"id": "x", "settings": {}}')
    with pytest.raises(ValueError, match="made by an earlier version of hico; remove it"):
        changes_since(tmp_path, {})


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


@pytest.mark.parametrize(
    "changes", [{"trainable": ["llm"]}, {"optim": "sgd"}, {"objective": "tracks"}, {"adam_beta2": 0.5}]
)
def test_another_optimizer_is_refused_on_resuming(finished, changes):
    last = finished / "out/final"
    asked = {**read_manifest(last), "recipe": {**read_manifest(last)["recipe"], **changes}}
    key, value = next(iter(changes.items()))
    with pytest.raises(
        ValueError, match=f"holds the optimizer of other settings: {key} was .* and is {re.escape(repr(value))}"
    ):
        changes_since(last, asked)


def test_changed_rows_in_an_unchanged_mixture_are_noticed(folder, caplog):
    recipe = make(folder, max_steps=2)
    final = run.run_stage(recipe)
    assert run.run_stage(recipe) == final
    rows = (folder / "rows.json").read_text()
    (folder / "rows.json").write_text(rows.replace("number 5", "number 6"))
    with pytest.raises(
        ValueError, match=r"is finished, but its rows have changed since; remove .* or give --overwrite"
    ):
        run.run_stage(recipe)
    before = read_manifest(final)["id"]
    assert read_manifest(run.run_stage(recipe, overwrite=True))["id"] != before
    (folder / "rows.json").unlink()
    assert run.run_stage(recipe) == final


def test_frames_of_a_dataset_that_are_read_otherwise_are_noticed(folder):
    def recipe(**entry):
        data = [{"json_path": str(folder / "rows.json"), "data_root": str(folder), **entry}]
        return make(folder, data=data, max_steps=2, save_strategy="steps", save_steps=1)

    final = run.run_stage(recipe(folder_fps=1))
    assert run.run_stage(recipe(folder_fps=1)) == final
    with pytest.raises(ValueError, match="is finished, but its rows have changed since"):
        run.run_stage(recipe(folder_fps=2))
    shutil.rmtree(final)
    with pytest.raises(ValueError, match=r"was trained on other data: datasets was .*'folder_fps': 1"):
        run.run_stage(recipe(folder_fps=2))


def test_a_finished_stage_is_left_alone_though_rows_of_its_files_were_malformed(folder):
    rows = json.loads((folder / "rows.json").read_text())
    (folder / "some.json").write_text(json.dumps([*rows, {"conversations": 3}]))
    data = [{"json_path": str(folder / "some.json"), "data_root": str(folder)}]
    recipe = make(folder, data=data, on_bad_sample="skip", max_steps=1)
    assert run.run_stage(recipe) == run.run_stage(recipe)


# More steps, other rates ---------------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}


def test_a_finished_stage_goes_on_with_more_epochs(folder, caplog):
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole"), num_train_epochs=2, **SAVING))
    run.run_stage(make(folder, num_train_epochs=1, **SAVING))
    longer = run.run_stage(make(folder, num_train_epochs=2, **SAVING))
    assert any("goes on from" in said and "num_train_epochs was 1 and is 2" in said for said in caplog.messages)
    assert losses(history(longer)) == losses(history(whole))
    with pytest.raises(ValueError, match="is finished, but num_train_epochs was 2 and is 1"):
        run.run_stage(make(folder, num_train_epochs=1, **SAVING))


def test_a_finished_stage_without_checkpoints_cannot_go_on(folder):
    run.run_stage(make(folder, max_steps=1))
    with pytest.raises(ValueError, match="is finished, but max_steps was 1 and is 2; remove"):
        run.run_stage(make(folder, max_steps=2))


def test_an_interrupted_run_takes_another_rate_and_says_so(folder, monkeypatch, caplog):
    common = {**SAVING, "logging_steps": 1, "part_learning_rates": {"encoder": 1e-3}}
    run.run_stage(make(folder, max_steps=2, **common))
    shutil.rmtree(folder / "out/final")
    other = {**common, "learning_rate": 5e-3, "part_learning_rates": {"encoder": 2e-3}}
    final = run.run_stage(make(folder, max_steps=4, **other))
    rates = [(e["learning_rate"], e["learning_rate_encoder"]) for e in history(final) if "learning_rate" in e]
    assert rates == [(1e-2, 1e-3)] * 2 + [(5e-3, 2e-3)] * 2
    assert any("learning_rate was 0.01 and is 0.005" in said for said in caplog.messages)


def test_overwriting_trains_anew_what_has_changed_and_only_that(folder):
    final = run.run_stage(make(folder, max_steps=2, **SAVING))
    first = read_manifest(final)["id"]
    assert read_manifest(run.run_stage(make(folder, max_steps=2, **SAVING), overwrite=True))["id"] == first
    run.run_stage(make(folder, max_steps=1, learning_rate=1e-3, **SAVING), overwrite=True)
    assert read_manifest(final)["step"] == 1
    assert [path.name for path in checkpoints(folder / "out")] == ["checkpoint-1"]
    shutil.rmtree(final)
    with pytest.raises(ValueError, match=r"trained on other data: seed .* give --overwrite"):
        run.run_stage(make(folder, max_steps=1, seed=9, **SAVING))
    run.run_stage(make(folder, max_steps=1, seed=9, **SAVING), overwrite=True)
    assert read_manifest(final)["seed"] == 9
