"""Stages go on where they were left, and after one another."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from train_corpus import history, losses, make, train, trainer_for, weights, write_model

from hico import HicoForConditionalGeneration, cli
from hico.data.dataset import TrainingRows
from hico.train import run
from hico.train.__main__ import main
from hico.train.checkpoint import checkpoints, is_complete, read_manifest
from hico.train.plan import prepare
from hico.train.report import dry_run


class Killed(Exception):
    pass


def killed_after(step, monkeypatch):
    """Let a run die in the step after ``step``, as abruptly as a test can."""

    def kill():
        raise Killed

    call_after(step, kill, monkeypatch)


def signalled_after(step, monkeypatch):
    """Send SIGTERM in the step after ``step``."""
    call_after(step, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)


def call_after(step, function, monkeypatch):
    real = run.HicoTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            function()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(run.HicoTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 3},
        {"dataloader_num_workers": 2, "decode_timeout": 20.0},
        {"group_by_length": True, "max_tokens_per_batch": 4096, "packing": True, "num_train_epochs": 2},
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(folder, monkeypatch, changes):
    common = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **changes}
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole"), **common))
    recipe = make(folder, **common)
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(Killed):
            run.run_stage(recipe)
    resumed = run.run_stage(recipe)
    expected, found = losses(history(whole)), losses(history(resumed))
    assert len(expected) > 3
    assert found == expected
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_what_was_consumed_is_not_read_again(folder, monkeypatch):
    recipe = make(folder, save_strategy="steps", save_steps=2, num_train_epochs=2)
    read = []
    real = TrainingRows.__getitem__
    monkeypatch.setattr(TrainingRows, "__getitem__", lambda self, key: (read.append(key), real(self, key))[1])
    with monkeypatch.context() as patch:
        killed_after(8, patch)
        with pytest.raises(Killed):
            run.run_stage(recipe)
    consumed = read[: 8 * 2]
    read.clear()
    run.run_stage(recipe)
    assert not set(read) & set(consumed)
    assert sorted([*consumed, *read]) == [(epoch, row) for epoch in range(2) for row in range(12)]


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(folder, monkeypatch):
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole")))
    recipe = make(folder)
    with monkeypatch.context() as patch:
        signalled_after(2, patch)
        with pytest.raises(SystemExit) as stopped:
            run.run_stage(recipe)
    assert stopped.value.code == run.STOPPED
    assert [path.name for path in checkpoints(Path(recipe.output_dir))] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert losses(history(run.run_stage(recipe))) == losses(history(whole))


BEST = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "greater_is_better": True}


@pytest.mark.parametrize("stop", [4, 7])
@pytest.mark.parametrize(
    "changes",
    [
        {"logging_strategy": "epoch"},
        {"logging_strategy": "epoch", "save_strategy": "steps", "save_steps": 5},
        {"logging_strategy": "epoch", "save_strategy": "epoch"},
        {"logging_steps": 3, "save_strategy": "epoch", "eval_strategy": "epoch"},
        {"logging_steps": 3, "eval_strategy": "epoch", **BEST},
        {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 1, **BEST},
        {"logging_steps": 3, "max_steps": 8, "eval_strategy": "epoch"},
    ],
)
def test_an_epoch_ends_with_one_log_and_evaluation_wherever_it_is_stopped(folder, monkeypatch, changes, stop):
    common = {"num_train_epochs": 2, "eval_fraction": 0.2, **changes}
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole"), **common))
    recipe = make(folder, **common)
    with monkeypatch.context() as patch:
        signalled_after(stop, patch)
        with pytest.raises(SystemExit):
            run.run_stage(recipe)
    assert checkpoints(Path(recipe.output_dir))[-1].name == f"checkpoint-{stop + 1}"
    expected, found = (
        [(entry["step"], "loss" in entry, entry.get("eval_loss")) for entry in history(final)][:-1]
        for final in (whole, run.run_stage(recipe))
    )
    assert found == expected


def test_killed_while_saving_it_goes_on_from_the_one_before(folder, monkeypatch):
    recipe = make(folder, save_strategy="steps", save_steps=2)
    real = run.HicoTrainer._save_rng_state

    def save_rng_state(self, output_dir):
        if self.state.global_step == 4:
            raise Killed
        real(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(run.HicoTrainer, "_save_rng_state", save_rng_state)
        with pytest.raises(Killed):
            run.run_stage(recipe)
    assert [path.name for path in checkpoints(Path(recipe.output_dir))] == ["checkpoint-2"]
    assert len(losses(history(run.run_stage(recipe)))) == 6
    assert not (Path(recipe.output_dir) / ".saving" / "checkpoint-4").exists()


def test_a_checkpoint_says_what_it_was_trained_on(folder):
    recipe = make(folder, save_strategy="steps", save_steps=3, max_steps=3)
    final = run.run_stage(recipe)
    for made in (final, *checkpoints(Path(recipe.output_dir))):
        manifest = read_manifest(made)
        assert manifest["stage"] == "stage"
        assert manifest["step"] == 3
        assert manifest["seed"] == 3
        assert manifest["datasets"][0]["rows_taken"] == 12
        assert len(manifest["datasets"][0]["sha256"][0]) == 64


def test_other_data_are_refused_on_resuming(folder, monkeypatch):
    recipe = make(folder, save_strategy="steps", save_steps=2)
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(Killed):
            run.run_stage(recipe)
    with pytest.raises(ValueError, match="was trained on other data: seed was 3 and is 4"):
        run.run_stage(make(folder, save_strategy="steps", save_steps=2, seed=4))


@pytest.mark.parametrize("stop", ["kill", "signal"])
def test_a_run_stopped_after_its_last_step_trains_no_further(folder, monkeypatch, stop):
    common = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "dataloader_num_workers": 1}
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole"), **common))
    recipe = make(folder, **common)
    with monkeypatch.context() as patch:
        if stop == "kill":
            patch.setattr(run.HicoTrainer, "save_final", lambda self: (_ for _ in ()).throw(Killed))
        else:
            signalled_after(3, patch)
        with pytest.raises((Killed, SystemExit)):
            run.run_stage(recipe)
    assert [path.name for path in checkpoints(Path(recipe.output_dir))][-1] == "checkpoint-4"
    resumed = run.run_stage(recipe)
    assert read_manifest(resumed)["step"] == 4
    assert losses(history(resumed)) == losses(history(whole))
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_counts_of_bad_rows_are_part_of_a_checkpoint(folder, monkeypatch):
    (folder / "3.mp4").unlink()
    (folder / "3.mp4").write_bytes(b"no video")
    common = {"on_bad_sample": "skip", "max_bad_fraction": 0.5, "save_strategy": "steps", "save_steps": 1}
    common |= {"num_train_epochs": 2, "eval_data": str(folder / "mix.yaml"), "per_device_eval_batch_size": 5}
    whole = trainer_for(make(folder, output_dir=str(folder / "whole"), **common))
    whole.train_from(None)
    assert whole.bad_rows.num_rows == 4 * 12
    with monkeypatch.context() as patch:
        killed_after(9, patch)
        with pytest.raises(Killed):
            run.run_stage(make(folder, **common))
    resumed = trainer_for(make(folder, **common))
    resumed.train_from(folder / "out/checkpoint-8")
    assert resumed.bad_rows.num_rows == whole.bad_rows.num_rows
    lists = [(folder / name / "bad_rows-0.jsonl").read_text().splitlines() for name in ("out", "whole")]
    assert lists[0] == lists[1]
    assert len(lists[0]) == 4


@pytest.mark.parametrize(
    "changes",
    [{"per_device_train_batch_size": 3}, {"gradient_accumulation_steps": 2}, {"eval_fraction": 0.25}],
)
def test_another_order_of_rows_is_refused_on_resuming(folder, monkeypatch, changes):
    common = {"save_strategy": "steps", "save_steps": 1}
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            run.run_stage(make(folder, **common))
    with pytest.raises(ValueError, match=r"trained on other data: order was .*batch sizes, devices"):
        run.run_stage(make(folder, **common, **changes))


def test_the_same_steps_in_other_batches_are_no_other_order(folder, monkeypatch, caplog):
    common = {"save_strategy": "steps", "save_steps": 1, "global_batch_size": 4}
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole"), **common))
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            run.run_stage(make(folder, **common))
    other = make(folder, **common, per_device_train_batch_size=1, learning_rate=2e-2)
    resumed = run.run_stage(other)
    assert any("goes on from" in m and "learning_rate was 0.01 and is 0.02" in m for m in caplog.messages)
    assert losses(history(resumed)).keys() == losses(history(whole)).keys()


# Chains ----------------------------------------------------------------------------------------------------------

CHAIN = """
model: {folder}/init
output_dir: {folder}/chain
stages:
  - {{name: first, trainable: [projector], data: mix.yaml, image_size: 24, max_steps: 2}}
  - {{name: second, data: mix.yaml, image_size: 48, max_steps: 2}}
max_frames: 4
max_length: 2048
per_device_train_batch_size: 2
disable_tqdm: true
decode_timeout: null
use_cpu: true
"""


def test_a_chain_trains_stage_after_stage_and_skips_finished_ones(folder, capsys):
    path = folder / "chain.yaml"
    path.write_text(CHAIN.format(folder=folder))
    assert main(["--config", str(path)]) == 0
    first, second = folder / "chain/first/final", folder / "chain/second/final"
    assert is_complete(first)
    assert is_complete(second)
    model = HicoForConditionalGeneration.from_pretrained(second)
    assert model.config.vision.image_size == 48
    assert HicoForConditionalGeneration.from_pretrained(first).config.vision.image_size == 24
    times = [(stage / "model.safetensors").stat().st_mtime_ns for stage in (first, second)]
    shutil.rmtree(second)
    assert main(["--config", str(path)]) == 0
    assert (first / "model.safetensors").stat().st_mtime_ns == times[0]
    torch.testing.assert_close(dict(model.named_parameters()), weights(second), rtol=0, atol=0)


def test_a_finished_stage_that_was_made_otherwise_is_an_error(folder, capsys):
    path = folder / "chain.yaml"
    path.write_text(CHAIN.format(folder=folder))
    assert main(["--config", str(path)]) == 0
    assert main(["--config", str(path), "--logging_steps", "7", "--dataloader_num_workers", "1"]) == 0
    capsys.readouterr()
    assert main(["--config", str(path), "--learning_rate", "3e-5"]) == 1
    assert "stage first is finished, but learning_rate was 5e-05 and is 3e-05; remove" in capsys.readouterr().err
    (folder / "mix.yaml").rename(folder / "as it was.yaml")
    (folder / "mix.yaml").write_text("# the same\n" + (folder / "as it was.yaml").read_text())
    assert main(["--config", str(path)]) == 0
    changed = (folder / "mix.yaml").read_text().replace("data_root: .", "data_root: ., sampling_strategy: first:9")
    (folder / "mix2.yaml").write_text(changed)
    path.write_text(CHAIN.format(folder=folder).replace("mix.yaml, image_size: 48", "mix2.yaml, image_size: 48"))
    assert main(["--config", str(path)]) == 1
    assert "stage second is finished, but its rows have changed since" in capsys.readouterr().err
    path.write_text(CHAIN.format(folder=folder))
    shutil.rmtree(folder / "chain/first/final")
    assert main(["--config", str(path)]) == 1
    assert "first/final was trained again since" in capsys.readouterr().err


def test_what_later_stages_lack_stops_a_chain_before_its_first_step(folder, capsys):
    path = folder / "chain.yaml"
    rows = json.loads((folder / "rows.json").read_text())
    (folder / "more.json").write_text(json.dumps([{**rows[0], "video": "gone.mp4"}]))
    later = "data: [{json_path: " + str(folder / "more.json") + ", data_root: " + str(folder) + "}], image_size: 48"
    path.write_text(CHAIN.format(folder=folder).replace("data: mix.yaml, image_size: 48", later))
    assert main(["--config", str(path)]) == 1
    assert re.search(r"1 file\(s\) of the mixture are missing: .*gone\.mp4", capsys.readouterr().err)
    assert not (folder / "chain/first").exists()


def test_a_stage_is_planned_with_what_the_stages_before_change(folder):
    one = make(folder, image_size=48, model_config={"compressor": "pooling"})
    two = make(folder, model_config={"compressor": {"stride": 3}})
    merging = {"name": "token_merge", "tokens_per_frame": 1, "tokens_per_image": 4}
    three = make(folder, image_size=24, model_config={"compressor": merging})
    configs = [None]
    for recipe in (one, two, three):
        configs.append(prepare(recipe, start=configs[-1]).config)
    assert [config.vision.image_size for config in configs[1:]] == [48, 48, 24]
    assert [config.compressor for config in configs[1:]] == [
        {"name": "pooling"},
        {"name": "pooling", "stride": 3},
        merging,
    ]


def test_a_stage_is_planned_with_the_drop_schedule_of_the_stages_before(folder):
    dropping = make(folder, drop_schedule="uniform@1:0.5", model_config={"drop_options": {"queries": "last_prompt"}})
    off, packing = make(folder, drop_schedule="none"), make(folder, packing=True, max_tokens_per_batch=4096)
    config = prepare(dropping).config
    assert (config.drop_schedule, config.drop_options) == ("uniform@1:0.5", {"queries": "last_prompt"})
    with pytest.raises(ValueError, match="packing cannot be combined"):
        prepare(packing, start=config)
    config = prepare(packing, start=prepare(off, start=config).config).config
    assert (config.drop_schedule, config.drop_options) == (None, None)


def test_a_chain_may_pack_once_a_stage_has_switched_the_drop_schedule_off(folder):
    write_model(folder / "dropping", drop_schedule="uniform@1:0.5")
    off = make(folder, model=str(folder / "dropping"), drop_schedule="none", max_steps=1)
    packing = {"model": str(folder / "out/final"), "packing": True, "max_tokens_per_batch": 4096, "max_steps": 1}
    assert is_complete(run.run_chain([off, make(folder, output_dir=str(folder / "second"), **packing)]))


def test_a_dry_run_says_what_would_be_done(folder, capsys):
    path = folder / "chain.yaml"
    path.write_text(CHAIN.format(folder=folder))
    assert main(["--config", str(path), "--dry_run"]) == 0
    text = capsys.readouterr().out
    model = HicoForConditionalGeneration.from_pretrained(folder / "init")
    projector = sum(parameter.numel() for parameter in model.model.projector.parameters())
    assert f"projector  {projector:>13,} {projector:>14,}" in text
    assert "stage first" in text
    assert "stage second" in text
    assert text.count("steps: 2") == 2
    assert "rows                                 12           12  all" in text
    assert "tokens per step" in text
    assert "GiB" in text
    assert not (folder / "chain").exists()


@pytest.mark.parametrize("epochs", [0.75, 1.5])
def test_a_dry_run_counts_the_steps_that_are_made(folder, epochs):
    recipe = make(folder, num_train_epochs=epochs)
    steps = max(losses(history(run.run_stage(recipe))))
    assert f"steps: {steps}\n" in dry_run(recipe, run.prepare(recipe), world_size=1)


# Adapters --------------------------------------------------------------------------------------------------------


def test_adapters_learn_are_resumed_and_merged(folder, monkeypatch):
    pytest.importorskip("peft")
    common = {"trainable": ["projector"], "lora": {"r": 2}, "save_strategy": "steps", "save_steps": 2}
    whole = run.run_stage(make(folder, output_dir=str(folder / "whole"), **common))
    recipe = make(folder, **common)
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(Killed):
            run.run_stage(recipe)
    resumed = run.run_stage(recipe)
    assert losses(history(resumed)) == losses(history(whole))
    assert cli.main(["merge-lora", str(resumed), str(folder / "merged")]) == 0
    before, merged = weights(folder / "init"), weights(folder / "merged")
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert all(".projector." in name or "_proj." in name for name in changed)
    assert any(".projector." in name for name in changed)
    assert any("language_model" in name for name in changed)
    next_stage = train(make(folder, model=str(resumed), output_dir=str(folder / "next"), max_steps=1))
    same_stage = train(make(folder, model=str(folder / "merged"), output_dir=str(folder / "same"), max_steps=1))
    assert losses(next_stage.state.log_history) == losses(same_stage.state.log_history)


def test_merging_needs_adapters_and_a_new_folder(folder, capsys):
    assert cli.main(["merge-lora", str(folder / "init"), str(folder / "merged")]) == 1
    assert "holds no adapter_config.json" in capsys.readouterr().err
    assert cli.main(["merge-lora", str(folder / "init"), str(folder / "init")]) == 1
    assert "init exists" in capsys.readouterr().err


def test_adapters_on_a_result_of_adapters_keep_both(folder):
    pytest.importorskip("peft")
    common = {"trainable": ["projector"], "lora": {"r": 2}, "max_steps": 2}
    first = run.run_stage(make(folder, output_dir=str(folder / "first"), **common))
    second = run.run_stage(make(folder, model=str(first), output_dir=str(folder / "second"), **common))
    assert cli.main(["merge-lora", str(first), str(folder / "merged")]) == 0
    same = run.run_stage(make(folder, model=str(folder / "merged"), output_dir=str(folder / "same"), **common))
    for name, final in (("chained", second), ("one by one", same)):
        assert cli.main(["merge-lora", str(final), str(folder / name)]) == 0
    one, other = weights(folder / "chained"), weights(folder / "one by one")
    for name, weight in other.items():
        assert torch.equal(one[name], weight), name
    assert not all(torch.equal(weight, weights(folder / "merged")[name]) for name, weight in one.items())
    shutil.rmtree(first.parent)
    with pytest.raises(FileNotFoundError, match=r"holds adapters for .*first/final, which does not exist"):
        run.load_model(second)


def test_a_recipe_changes_a_model_with_adapters(folder):
    pytest.importorskip("peft")
    common = {"trainable": ["projector"], "lora": {"r": 2}, "max_steps": 1}
    first = run.run_stage(make(folder, output_dir=str(folder / "first"), **common))
    changes = {
        "image_size": 48,
        "model_config": {"compressor": {"tokens_per_frame": 2}},
        "attn_implementation": "eager",
    }
    trainer = trainer_for(make(folder, model=str(first), output_dir=str(folder / "second"), max_steps=1, **changes))
    assert trainer.model.model.encoder.image_size == 48
    assert trainer.model.config.compressor["tokens_per_frame"] == 2
    assert trainer.model.config.text_config._attn_implementation == "eager"
    final = run.run_stage(trainer.recipe)
    assert HicoForConditionalGeneration.from_pretrained(final).config.vision.image_size == 48
