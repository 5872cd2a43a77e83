import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from hico import HicoConfig, HicoForConditionalGeneration
from hico.train.recipes import load_recipes, make_recipe, parse_overrides

RECIPES = Path(__file__).parents[1] / "train"
MINIMAL = {"name": "s", "model": "m", "output_dir": "o", "data": "d.yaml"}


def recipe(**changes):
    return make_recipe({**MINIMAL, **changes})


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


ALL = ["encoder", "compressor", "projector", "llm"]
SLOW_ENCODER = {"encoder": 2e-6}
PUBLISHED = {
    "stage1": (["compressor", "projector"], 1e-3, {}, "middle", 4, 4, 224, 512, 8192),
    "stage2": (ALL, 1e-5, SLOW_ENCODER, "dynamic_fps1", 4, 8, 224, 256, 32768),
    "stage3": (ALL, 1e-5, SLOW_ENCODER, "dynamic_fps1", 64, 512, 224, 256, 32768),
    "stage4": (ALL[:3], 1e-5, SLOW_ENCODER, "dynamic_fps1", 64, 512, 448, 256, 32768),
}


@pytest.mark.parametrize("stage", PUBLISHED)
def test_the_recipes_hold_the_published_values(stage, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/data")
    (found,) = load_recipes(RECIPES / "videochat_flash" / f"{stage}.yaml")
    assert (
        found.trainable,
        found.arguments["learning_rate"],
        found.part_learning_rates,
        found.frame_sampling,
        found.min_frames,
        found.max_frames,
        found.image_size,
        found.global_batch_size,
        found.max_length,
    ) == PUBLISHED[stage]
    common = {"num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0}
    assert {**common, "bf16": True, "gradient_checkpointing": True}.items() <= found.arguments.items()
    assert Path(found.arguments["deepspeed"]).name == "zero1.json"
    assert Path(found.arguments["deepspeed"]).is_file()
    assert found.sampling_strategy == ("random:25%" if stage == "stage4" else "all")


OWN = {"model": "m", "output_dir": "o", "data": "d.yaml"}


@pytest.mark.parametrize("stage", ["align", "pretrain", "instruct"])
def test_resolution_is_the_checkpoints_unless_asked(stage):
    assert make_recipe({"extends": stage, **OWN}).image_size is None
    assert make_recipe({"extends": stage, **OWN, "image_size": 112}).image_size == 112
    assert make_recipe({"extends": "highres", **OWN}).image_size == 448


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainable": ["projector"]}, {"trainable": ["projector"], "part_learning_rates": {}}),
        ({"lora": {"r": 4}}, {"trainable": ALL[:3], "part_learning_rates": SLOW_ENCODER}),
        ({"lora": {"r": 4}, "trainable": ["projector"]}, {"trainable": ["projector"], "part_learning_rates": {}}),
        ({"max_frames": 32}, {"min_frames": 32, "max_frames": 32}),
        ({"min_frames": 600}, {"min_frames": 600, "max_frames": 600}),
        ({"max_tokens_per_batch": 8192}, {"max_length": 8192, "global_batch_size": None}),
        ({"gradient_accumulation_steps": 3}, {"global_batch_size": None}),
    ],
)
def test_what_a_stage_sets_and_a_recipe_contradicts_gives_way(changes, expected, tmp_path):
    found = make_recipe({"extends": "instruct", **OWN, **changes})
    assert {key: getattr(found, key) for key in expected} == expected
    write(tmp_path, "mine.yaml", "extends: instruct\nnum_train_epochs: 2\n")
    (found,) = load_recipes(write(tmp_path, "r.yaml", "extends: mine.yaml\n"), {**OWN, **changes})
    assert {key: getattr(found, key) for key in expected} == expected
    assert found.arguments["num_train_epochs"] == 2


def test_a_small_global_batch_needs_no_second_line():
    found = make_recipe({"extends": "align", **OWN, "global_batch_size": 12})
    assert (found.rows_per_device, found.gradient_accumulation(1)) == (4, 3)


def test_adapters_need_no_second_line():
    assert recipe(lora={"r": 4}).trainable == ALL[:3]


def test_a_recipe_extends_another_file_that_lies_beside_it(tmp_path):
    write(tmp_path, "sub/base.yaml", "extends: align\ndata: data.yaml\nlearning_rate: 5e-4\n")
    write(tmp_path, "sub/data.yaml", "datasets: []")
    path = write(tmp_path, "sub/r.yaml", "extends: base.yaml\nmodel: m\noutput_dir: o\nmax_frames: 8\n")
    (found,) = load_recipes(path)
    assert found.data == str(tmp_path / "sub/data.yaml")
    assert (found.arguments["learning_rate"], found.max_frames, found.max_length) == (5e-4, 8, 8192)
    with pytest.raises(FileNotFoundError, match=r"no recipe or mixture file gone\.yaml"):
        recipe(extends="gone.yaml")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"eval_strategy": "epoch", "logging_steps": 0.01}),
        ({"num_train_epochs": 1}, {"eval_strategy": "steps", "eval_steps": 0.1}),
        ({"max_steps": 7}, {"eval_strategy": "steps", "eval_steps": 0.1}),
        ({"eval_steps": 5, "logging_steps": 5}, {"eval_strategy": "steps", "eval_steps": 5, "logging_steps": 5}),
        ({"load_best_model_at_end": True}, {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        ({"load_best_model_at_end": True, "max_steps": 7}, {"save_strategy": "steps", "save_steps": 0.1}),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 200},
            {"eval_strategy": "steps", "eval_steps": 200},
        ),
        ({"load_best_model_at_end": True, "save_strategy": "best"}, {"eval_strategy": "epoch"}),
    ],
)
def test_defaults_show_something_in_a_small_run_and_find_the_best_of_it(changes, expected):
    settings = recipe(eval_fraction=0.1, **changes).trainer_settings()
    assert expected.items() <= settings.items()
    assert "eval_strategy" not in recipe().trainer_settings()


def test_flags_override_the_file_and_the_file_the_preset(tmp_path):
    path = write(
        tmp_path, "r.yaml", "extends: align\nmodel: m\noutput_dir: o\ndata: d\nlearning_rate: 5e-4\nmax_frames: 8\n"
    )
    (found,) = load_recipes(
        path, parse_overrides(["--learning_rate", "2e-5", "--packing=false", "--report_to", "none"])
    )
    assert found.arguments["learning_rate"] == 2e-5
    assert (found.max_frames, found.max_length) == (8, 8192)
    assert found.arguments["report_to"] == "none"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning_rate", "1e-5"], {"learning_rate": 1e-5}),
        (["--packing"], {"packing": True}),
        (["--packing", "--seed=7"], {"packing": True, "seed": 7}),
        (["--part-learning-rates", "{encoder: 2e-6}"], {"part_learning_rates": {"encoder": 2e-6}}),
        (["--save_strategy", "no"], {"save_strategy": "no"}),
        (["--image_size=null"], {"image_size": None}),
        (["--warmup_steps", "-1"], {"warmup_steps": -1}),
    ],
)
def test_flags_are_read_as_yaml(words, expected):
    assert parse_overrides(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [(["learning_rate"], "expected a flag"), (["--trainable", "[llm"], "the value of --trainable is not YAML")],
)
def test_a_word_that_is_no_flag_or_value_is_an_error(words, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(words)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("max_frame", "max_frames"),
        ("trainables", "trainable"),
        ("packin", "packing"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=f"unknown recipe key '{key}'; did you mean '{nearest}'"):
        recipe(**{key: 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_frames": 8, "max_frames": 4}, "min_frames 8 and max_frames 4 contradict"),
        ({"min_frames": 0}, "contradict"),
        ({"trainable": ["encodr"]}, "must be a list of 'encoder' or 'compressor'"),
        ({"trainable": ["projector"], "part_learning_rates": {"encoder": 1e-6}}, "freezes"),
        ({"part_learning_rates": {"head": 1e-6}}, "part_learning_rates is {'head': 1e-06}"),
        ({"on_bad_sample": "ignore"}, "on_bad_sample is 'ignore'; it must be 'raise' or 'skip'"),
        ({"label_scheme": "all"}, "label_scheme is 'all'; it must be 'assistant'"),
        ({"time_message": "medium"}, "time_message"),
        ({"max_frames": "many"}, "max_frames is 'many'; it must be a whole number"),
        ({"packing": 1}, "packing is 1; it must be true or false"),
        ({"trainable": [3]}, r"trainable is \[3\]; it must be a list of"),
        ({"part_learning_rates": {"encoder": "fast"}}, "it must be a mapping of a number"),
        ({"stages": ["a.yaml"]}, "unknown recipe key 'stages'"),
        ({"extends": ["align"]}, r"unknown extends key \['align'\]"),
        ({"max_frames": True}, "max_frames is True"),
        ({"packing": True}, "set max_tokens_per_batch"),
        ({"max_tokens_per_batch": 100}, "below max_length"),
        ({"max_tokens_per_batch": 65536, "global_batch_size": 8}, "global_batch_size: null"),
        ({"eval_fraction": 0.1, "eval_data": "e.yaml"}, "eval_fraction"),
        ({"lora": {"r": 4}, "trainable": ["llm"]}, "take 'llm' out"),
        ({"quantization": {"load_in_4bit": True}}, "set lora"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; it must be 'float32' or 'bfloat16' or"),
        ({"plugins": ["no_such_module"]}, "the plugin no_such_module cannot be imported"),
        ({"extends": "aline"}, "did you mean 'align'"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises((ValueError, ImportError), match=message):
        recipe(**changes)


def test_missing_keys_are_listed():
    with pytest.raises(ValueError, match="lacks model, data"):
        make_recipe({"name": "s", "output_dir": "o"})


@pytest.mark.parametrize(("devices", "steps"), [(1, 8), (2, 4), (8, 1)])
def test_the_global_batch_sets_the_accumulation(devices, steps):
    found = recipe(global_batch_size=32, per_device_train_batch_size=4)
    assert found.gradient_accumulation(devices) == steps


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}])
def test_a_global_batch_that_does_not_divide_is_an_error(changes):
    found = recipe(global_batch_size=32, per_device_train_batch_size=4, **changes)
    with pytest.raises(ValueError, match="global_batch_size 32 is not"):
        found.gradient_accumulation(3)


def test_a_chain_hands_on_results_and_common_keys(tmp_path):
    write(tmp_path, "a.yaml", "extends: align\ndata: d\nlearning_rate: 5e-4\n")
    path = write(
        tmp_path,
        "chain.yaml",
        "model: init\noutput_dir: runs\nbf16: false\nlearning_rate: 9e-4\n"
        "stages:\n  - a.yaml\n  - {extends: pretrain, data: d}\n",
    )
    first, second = load_recipes(path, {"max_steps": 3, "output_dir": "elsewhere"})
    assert (first.name, first.model, first.output_dir) == ("a", "init", "elsewhere/a")
    assert (second.name, second.model, second.output_dir) == ("pretrain", "elsewhere/a/final", "elsewhere/pretrain")
    assert first.arguments["learning_rate"] == 5e-4
    assert second.arguments["learning_rate"] == 9e-4
    assert all(r.arguments["bf16"] is False and r.arguments["max_steps"] == 3 for r in (first, second))


def test_the_published_chain_is_read(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/data")
    stages = load_recipes(RECIPES / "videochat_flash" / "all.yaml")
    assert [stage.name for stage in stages] == ["stage1", "stage2", "stage3", "stage4"]
    assert [stage.image_size for stage in stages] == [224, 224, 224, 448]
    assert [stage.trainable for stage in stages] == [PUBLISHED[stage.name][0] for stage in stages]
    assert stages[3].model == "runs/videochat_flash/stage3/final"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [a.yaml]\n", "needs an output_dir"),
        ("output_dir: o\nmodel: m\nstages: [{extends: align, data: d}, {extends: align, data: d}]\n", "two stages"),
        ("output_dir: o\nmodel: m\nstages: [{name: 3, data: d}]\n", "name is 3; it must be text"),
        ("model: a\nmodel: b\n", "'model' stands twice.*line 2"),
        ("when: 2024-99-99\n", "is not YAML: month must be"),
        ("[" * 5000, "is not YAML"),
        ("- 1\n", "must hold recipe keys"),
        ("a: [\n", "is not YAML"),
        ("data: ${HICO_NO_SUCH_VARIABLE}\n", "HICO_NO_SUCH_VARIABLE"),
    ],
)
def test_bad_recipe_files_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_recipes(write(tmp_path, "r.yaml", text))


def test_a_missing_recipe_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe or mixture file .*none\.yaml"):
        load_recipes(tmp_path / "none.yaml")


def test_files_are_looked_for_beside_the_recipe(tmp_path):
    write(tmp_path, "sub/data.yaml", "datasets: []")
    path = write(tmp_path, "sub/r.yaml", "model: m\noutput_dir: o\ndata: data.yaml\n")
    (found,) = load_recipes(path)
    assert found.data == str(tmp_path / "sub" / "data.yaml")


@pytest.mark.parametrize("path", sorted((RECIPES / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_are_sound_and_say_how_they_are_used(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    asked = subprocess.run(["bash", path], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert asked.returncode != 0
    assert "usage:" in asked.stderr


def test_the_fsdp_file_wraps_classes_that_there_are():
    settings = yaml.safe_load((RECIPES / "accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2
    wrapped = settings["fsdp_transformer_layer_cls_to_wrap"].split(",")
    with torch.device("meta"):
        model = HicoForConditionalGeneration(HicoConfig.preset("tiny"))
    assert set(wrapped) <= {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_files_leave_sizes_and_precision_to_the_recipe(stage):
    settings = json.loads((RECIPES / f"deepspeed/zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    left = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert all(settings[key] == "auto" for key in left)
    assert settings["bf16"]["enabled"] == "auto"
