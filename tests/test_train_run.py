"""What a run says and does around its steps: logs, trackers, plugins, dtypes, frozen parts, failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_corpus import history, make, train, trainer_for, write_model
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor, cli
from hico.tokenizer import byte_tokenizer
from hico.train import run
from hico.train.__main__ import main
from hico.train.trainer import HicoTrainer

ROOT = Path(__file__).parents[1]


def steps(final):
    return [entry for entry in history(final) if "loss" in entry]


# Logs ---------------------------------------------------------------------------------------------------------------


def test_a_small_run_logs_what_its_steps_are_made_of(folder):
    spec = {"json_path": str(folder / "rows.json"), "data_root": str(folder)}
    data = [{**spec, "name": "first", "sampling_strategy": "first:6"}, {**spec, "name": "last"}]
    settings = {"num_train_epochs": 1, "part_learning_rates": {"encoder": 1e-3}, "lr_scheduler_type": "constant"}
    recipe = make(folder, data=data, eval_data=data, **settings)
    del recipe.arguments["logging_steps"]
    final = run.run_stage(recipe)
    logged = steps(final)
    assert [entry["step"] for entry in logged] == list(range(1, 10))
    assert {(entry["learning_rate"], entry["learning_rate_encoder"]) for entry in logged} == {(1e-2, 1e-3)}
    assert all(entry["learning_rate_llm"] == entry["learning_rate_projector"] == 1e-2 for entry in logged)
    assert {"loss_of_first", "loss_of_last"} <= {key for entry in logged for key in entry}
    assert all(entry["learned_tokens_per_step"] > 0 and entry["peak_memory_gib"] > 0 for entry in logged)
    assert any(entry["visual_tokens_per_step"] > 0 for entry in logged)
    assert any(0 < entry["padding"] < 1 for entry in logged)
    evaluations = [entry for entry in history(final) if "eval_loss" in entry]
    assert len(evaluations) == 9
    assert {"eval_loss_of_first", "eval_loss_of_last"} <= evaluations[0].keys()


def test_the_best_model_is_loaded_with_one_line(folder, monkeypatch):
    losses, evaluate = [2.0, 1.0, 3.0], HicoTrainer.evaluate

    def with_loss(self, *args, **kwargs):
        return evaluate(self, *args, **kwargs) | {"eval_loss": losses.pop(0)}

    monkeypatch.setattr(HicoTrainer, "evaluate", with_loss)
    common = {"eval_data": str(folder / "mix.yaml"), "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    recipe = make(folder, **common, load_best_model_at_end=True, num_train_epochs=3)
    for key in ("logging_steps", "save_strategy"):
        del recipe.arguments[key]
    final = run.run_stage(recipe)
    steps = [entry["step"] for entry in history(final) if "eval_loss" in entry]
    assert len(steps) == 3
    best = steps[1]
    saved = load_file(folder / f"out/checkpoint-{best}/model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(final / "model.safetensors").items())


def test_trackers_get_the_whole_recipe(folder):
    recipe = make(folder, max_frames=8, drop_schedule="uniform@1:0.5")
    told = json.loads(run.training_arguments(recipe).to_json_string())["recipe"]
    assert (told["max_frames"], told["drop_schedule"], told["learning_rate"]) == (8, "uniform@1:0.5", 1e-2)
    assert told["data"] == str(folder / "mix.yaml")


def test_restarts_log_into_one_folder_of_their_stage(folder, monkeypatch):
    asked = []

    class Tracker(TrainerCallback):
        def __init__(self):
            asked.append(os.environ["TENSORBOARD_LOGGING_DIR"])

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    for name in ("one", "one", "two"):
        trainer_for(make(folder, output_dir=str(folder / name), report_to="tensorboard"))
    assert asked == [str(folder / name / "tensorboard") for name in ("one", "one", "two")]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


# Plugins ------------------------------------------------------------------------------------------------------------

PLUGIN = """
from hico.compressors.pooling import PoolingCompressor
from hico.registry import COMPRESSORS

class Mine(PoolingCompressor):
    pass

if "mine" not in COMPRESSORS:
    COMPRESSORS.register("mine", Mine)
"""


def hico(*words, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_module_of_ones_own_brings_a_compressor_and_no_checkpoint_names_it(folder):
    (folder / "my_parts.py").write_text(PLUGIN)
    recipe = make(folder, max_steps=1, model_config={"compressor": "mine"})
    settings = {key: value for key, value in vars(recipe).items() if key != "arguments"} | recipe.arguments
    (folder / "r.yaml").write_text(yaml.safe_dump({**settings, "plugins": ["my_parts"]}))
    done = hico("-m", "hico.train", "--config", "r.yaml", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any("my_parts" in path.read_text() for path in (folder / "out/final").glob("*config*.json"))
    asked = ("-m", "hico.cli", "chat", "0.mp4", "What?", "--model", "out/final", "--max-new-tokens", "2")
    without, with_it = (hico(*asked, *more, folder=folder) for more in ((), ("--plugin", "my_parts")))
    assert without.returncode == 1
    assert "unknown compressor 'mine'" in without.stderr
    assert with_it.returncode == 0, with_it.stderr[-3000:]


def test_every_command_takes_plugins(capsys):
    for words in (["inspect", "x"], ["convert", "x", "y"], ["merge-lora", "x", "y"]):
        assert cli.main([*words, "--plugin", "no_such_module"]) == 1
        assert "the plugin no_such_module cannot be imported" in capsys.readouterr().err
    assert main(["--config", "x", "--plugin", "no_such_module"]) == 1
    assert "the plugin no_such_module cannot be imported" in capsys.readouterr().err


# Dtypes and frozen parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "expected"), [({}, torch.bfloat16), ({"dtype": "float32"}, torch.float32)])
def test_the_result_has_the_dtype_of_the_start_or_that_asked_for(folder, changes, expected):
    model = HicoForConditionalGeneration.from_pretrained(folder / "init", dtype=torch.bfloat16)
    model.save_pretrained(folder / "half")
    HicoProcessor.from_pretrained(folder / "init").save_pretrained(folder / "half")
    trainer = trainer_for(make(folder, model=str(folder / "half"), max_steps=2, save_strategy="epoch", **changes))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    final = run.run_stage(trainer.recipe)
    for made, dtype in ((final, expected), (folder / "out/checkpoint-2", torch.float32)):
        assert {tensor.dtype for tensor in load_file(made / "model.safetensors").values()} == {dtype}
    config = HicoConfig.from_pretrained(final)
    assert (config.dtype, config.text_config.dtype) == (expected, expected)
    assert HicoForConditionalGeneration.from_pretrained(final, dtype="auto").dtype == expected


@pytest.mark.parametrize("trainable", [["projector"], ["encoder"], ["llm"], ["encoder", "projector"]])
@pytest.mark.parametrize("bf16", [False, True])
def test_frozen_parts_may_stay_in_bfloat16(folder, trainable, bf16):
    common = {"trainable": trainable, "max_steps": 3, "bf16": bf16}
    whole, half = train(make(folder, **common)), train(make(folder, **common, frozen_dtype="bfloat16"))
    learned = {name for name, parameter in half.model.named_parameters() if parameter.requires_grad}
    assert all((p.dtype == torch.float32) == (name in learned) for name, p in half.model.named_parameters())
    found, expected = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (half, whole))
    assert found == pytest.approx(expected, rel=0.02)


def test_adapters_learn_over_a_bfloat16_llm(folder):
    pytest.importorskip("peft")
    common = {"trainable": ["projector"], "lora": {"r": 2}, "frozen_dtype": "bfloat16", "dtype": "bfloat16"}
    final = run.run_stage(make(folder, **common, max_steps=2))
    assert HicoConfig.from_pretrained(final).dtype == torch.bfloat16
    assert cli.main(["merge-lora", str(final), str(folder / "merged")]) == 0
    assert {tensor.dtype for tensor in load_file(folder / "merged/model.safetensors").values()} == {torch.bfloat16}


def test_adapters_learn_over_a_quantized_llm(folder):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    common = {"trainable": ["projector"], "lora": {"r": 2}, "save_strategy": "steps", "save_steps": 2}
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    trainer = trainer_for(make(folder, **common, quantization=quantization))
    stored = {
        name.rsplit(".", 2)[0]: p.dtype for name, p in trainer.model.named_parameters() if p.dtype == torch.uint8
    }
    assert stored
    assert all("language_model" in name for name in stored)
    final = run.run_stage(make(folder, **common, quantization=quantization))
    whole = run.run_stage(make(folder, **common, output_dir=str(folder / "whole")))
    found, expected = ([entry["loss"] for entry in steps(made)] for made in (final, whole))
    assert found == pytest.approx(expected, rel=0.1)
    assert cli.main(["merge-lora", str(final), str(folder / "merged")]) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_drops_out_in_a_frozen_llm(folder, checkpointing):
    settings = {
        "max_steps": 1,
        "model_config": {"text_config": {"attention_dropout": 0.5}},
        "per_device_train_batch_size": 12,
        "gradient_checkpointing": checkpointing,
    }
    losses = {}
    for trainable in (["projector"], ["projector", "llm"]):
        for seed in (3, 4):
            trainer = trainer_for(make(folder, trainable=trainable, **settings))
            batch = next(iter(trainer.get_train_dataloader()))
            trainer._count(batch)
            trainer.create_optimizer()
            if checkpointing:
                trainer.model.gradient_checkpointing_enable()
            torch.manual_seed(seed)
            losses[trainable[-1], seed] = trainer.training_step(trainer.model, batch, 100).item()
            llm = trainer.model.model.language_model
            assert llm.layers[0].self_attn.training == ("llm" in trainable)
            assert llm.layers[0].training or not checkpointing
    assert losses["projector", 3] == losses["projector", 4]
    assert losses["llm", 3] != losses["llm", 4]


# Failures and machines ----------------------------------------------------------------------------------------------


def recipe_file(folder, **changes):
    recipe = make(folder, **changes)
    settings = {key: value for key, value in vars(recipe).items() if key != "arguments"} | recipe.arguments
    (folder / "r.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    return str(folder / "r.yaml")


def test_what_fails_in_a_step_has_a_traceback_and_what_fails_before_is_one_line(folder, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise ValueError("of my own making")

    path = recipe_file(folder)
    with monkeypatch.context() as patch:
        patch.setattr(HicoTrainer, "compute_loss", fail)
        with pytest.raises(RuntimeError, match="training failed after step 0") as error:
            main(["--config", path])
    assert str(error.value.__cause__) == "of my own making"
    with monkeypatch.context() as patch:
        patch.setattr(HicoTrainer, "get_train_dataloader", fail)
        assert main(["--config", path]) == 1
    assert capsys.readouterr().err.rstrip().endswith("hico.train: of my own making")


def test_a_dry_run_meets_a_missing_gpu_unless_it_plans_for_elsewhere(folder, monkeypatch, capsys):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    path = recipe_file(folder, bf16=True, use_cpu=False)
    assert main(["--config", path, "--dry_run"]) == 1
    assert "bf16" in capsys.readouterr().err
    assert main(["--config", path, "--dry_run", "--world_size", "8"]) == 0
    assert "8 device(s)" in capsys.readouterr().out


def test_a_dry_run_shows_the_resolution_and_whose_it_is(folder, capsys):
    path = recipe_file(folder)
    assert main(["--config", path, "--dry_run"]) == 0
    assert "24 x 24 pixels (the checkpoint's)" in capsys.readouterr().out
    assert main(["--config", path, "--dry_run", "--image_size", "48"]) == 0
    assert "48 x 48 pixels (the recipe's)" in capsys.readouterr().out


def test_of_several_processes_one_reports_a_dry_run(folder, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--config", recipe_file(folder), "--dry_run"]) == 0
    assert capsys.readouterr().out == ""


def test_tiles_whose_tokens_make_no_square_are_met_before_the_first_step(folder, capsys):
    write_model(folder / "tiled")
    config = HicoConfig.from_pretrained(folder / "tiled")
    HicoProcessor.from_config(config, byte_tokenizer(), image_tiling="anyres_nopad").save_pretrained(folder / "tiled")
    path = recipe_file(folder, model=str(folder / "tiled"), model_config={"compressor": {"tokens_per_image": 2}})
    for flags in ((), ("--dry_run",)):
        assert main(["--config", path, *flags]) == 1
        assert "2 tokens per tile are no square" in capsys.readouterr().err


def test_a_launch_without_a_gpu_says_what_to_do(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "python").chmod(0o755)
    script = ["bash", str(ROOT / "train/launch/torchrun.sh"), "r.yaml"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(script, env={"PATH": path}, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "torch sees no GPU; set NUM_DEVICES" in done.stderr


@pytest.mark.slow
def test_deepspeed_runs_without_a_launcher(folder):
    pytest.importorskip("deepspeed")
    path = recipe_file(folder, max_steps=2, deepspeed=str(ROOT / "train/deepspeed/zero1.json"))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "-m", "hico.train", "--config", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(steps(folder / "out/final")) == 2
