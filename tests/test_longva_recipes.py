"""The image stages of LongVA: their values, and that images learn in them as UniRes says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_corpus import LLM, history

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.tokenizer import byte_tokenizer
from hico.train.recipes import load_recipes
from hico.train.run import run_stage

RECIPES = Path(__file__).parents[1] / "train" / "longva"
ALL = ["encoder", "compressor", "projector", "llm"]
PUBLISHED = {
    "pretrain": (["compressor", "projector"], 1e-3, {}, 256),
    "finetune": (ALL, 1e-5, {"encoder": 2e-6}, 128),
}


@pytest.mark.parametrize("stage", PUBLISHED)
def test_the_image_stages_are_llavas(stage, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/data")
    (found,) = load_recipes(RECIPES / f"{stage}.yaml")
    rates = found.arguments["learning_rate"], found.part_learning_rates
    assert (found.trainable, *rates, found.global_batch_size) == PUBLISHED[stage]
    assert (found.label_scheme, found.time_message) == ("longva", None)
    assert Path(found.data).is_file()
    assert Path(found.arguments["deepspeed"]).is_file()


TILES = 2 + 4 + 6 + 8
"""Of 24 pixels and 4 x 4 patches, in images of 24 x 40 to 96 x 40 pixels."""


@pytest.fixture
def longva(tmp_path):
    """A tiny model in the manner of LongVA, and rows with images of several tiles."""
    tower = {"name": "clip", "image_size": 24, "patch_size": 6, "hidden_size": 16, "depth": 2, "num_heads": 2}
    llm = {**HicoConfig.preset("tiny").text_config.to_dict(), **LLM, "layer_types": None}
    like = {"compressor": {"name": "pooling", "stride": 2}, "projector_first": True, "image_layout": "tiles"}
    config = HicoConfig.preset("tiny", text_config=llm, encoder=tower, clip_len=1, **like)
    HicoForConditionalGeneration(config).save_pretrained(tmp_path / "init")
    HicoProcessor.from_config(config, byte_tokenizer()).save_pretrained(tmp_path / "init")
    rows = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 24 * (1 + number), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"number {number}"}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "layout", "tokens"),
    [("pretrain", "tiles", 4 * TILES), ("finetune", "tiles", 4 * TILES), ("pretrain", "anyres", 16 * (4 + TILES))],
)
def test_a_tiny_model_learns_images_of_many_tiles(longva, stage, layout, tokens, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(longva))
    changes = {"model": str(longva / "init"), "output_dir": str(longva / "out"), "global_batch_size": 2}
    changes |= {"data": [{"json_path": str(longva / "rows.json"), "data_root": str(longva)}]}
    changes |= {"use_cpu": True, "bf16": False, "deepspeed": None, "dataloader_num_workers": 0, "report_to": "none"}
    changes |= {"dataloader_persistent_workers": False, "decode_timeout": None, "max_steps": 2, "disable_tqdm": True}
    changes |= {"model_config": {"image_layout": layout}}
    (recipe,) = load_recipes(RECIPES / f"{stage}.yaml", changes)
    final = run_stage(recipe)
    logged = [entry for entry in history(final) if "loss" in entry]
    assert sum(entry["visual_tokens_per_step"] for entry in logged) == tokens
    before, after = (
        dict(HicoForConditionalGeneration.from_pretrained(folder).named_parameters())
        for folder in (longva / "init", final)
    )
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    learns = {"projector"} if stage == "pretrain" else {"encoder", "projector", "language_model"}
    assert changed - {"weight"} == learns
