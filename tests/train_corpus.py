"""A handful of real files to train on, and recipes for them."""

import json
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.tokenizer import byte_tokenizer
from hico.train import run
from hico.train.config import Recipe
from hico.train.recipes import make_recipe
from hico.train.stage_trainer import StageTrainer

ENCODER = {"name": "umt", "image_size": 24, "patch_size": 12, "hidden_size": 16, "depth": 2, "num_heads": 2}
LLM = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def write_corpus(folder: Path, *, num_rows: int = 12) -> Path:
    """Write videos, images, rows and an untrained model; return the mixture file."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(num_rows):
        answer = {"from": "gpt", "value": f"number {number}"}
        if number % 3 == 0:
            write_video(folder / f"{number}.mp4", num_frames=12 + 4 * number, rng=rng)
            row = {"video": f"{number}.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, answer]}
        elif number % 3 == 1:
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            row = {"image": f"{number}.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, answer]}
        else:
            row = {"conversations": [{"from": "human", "value": "Hello " * (1 + number % 5)}, answer]}
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    (folder / "mix.yaml").write_text("datasets:\n  - {json_path: rows.json, data_root: .}\n")
    write_model(folder / "init")
    return folder / "mix.yaml"


def write_pairs(folder: Path) -> Path:
    """Write the rows of the corpus with two answers each instead of one; return the mixture file."""
    rows = json.loads((folder / "rows.json").read_text())
    for number, row in enumerate(rows):
        row["prompt"] = row.pop("conversations")[:1]
        row |= {"chosen": f"number {number}", "rejected": "I " + "do not " * (number % 4) + "know"}
    (folder / "pairs.json").write_text(json.dumps(rows, indent=1))
    (folder / "pairs.yaml").write_text("datasets:\n  - {json_path: pairs.json, data_root: .}\n")
    return folder / "pairs.yaml"


def write_model(folder: Path, **changes) -> None:
    """Write a model small enough to train in a moment, and its processor."""
    preset = HicoConfig.preset("tiny")
    text = {**preset.text_config.to_dict(), **LLM, "layer_types": None}
    config = HicoConfig.preset("tiny", encoder=ENCODER, text_config=text, **changes)
    config.compressor = {"name": "token_merge", "tokens_per_frame": 1, "tokens_per_image": 1}
    torch.manual_seed(0)
    HicoForConditionalGeneration(config).save_pretrained(folder)
    HicoProcessor.from_config(config, byte_tokenizer()).save_pretrained(folder)


def write_video(path: Path, *, num_frames: int, rng: np.random.Generator) -> None:
    """Write noise that changes slowly."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        for _ in range(num_frames):
            frame = np.roll(frame, 2, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make(folder: Path, **changes) -> Recipe:
    """Return a recipe for the corpus in ``folder``."""
    settings = {
        "name": "stage",
        "model": str(folder / "init"),
        "output_dir": str(folder / "out"),
        "data": str(folder / "mix.yaml"),
        "frame_sampling": "rand",
        "min_frames": 4,
        "max_frames": 8,
        "max_length": 2048,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "decode_timeout": None,
        "use_cpu": True,
        "seed": 3,
    }
    return make_recipe({**settings, **changes})


def trainer_for(recipe: Recipe) -> StageTrainer:
    """Put the trainer of a recipe together."""
    return run.make_trainer(recipe, run.training_arguments(recipe), run.prepare(recipe))


def train(recipe: Recipe) -> StageTrainer:
    """Train and return the trainer."""
    trainer = trainer_for(recipe)
    trainer.train()
    return trainer


def losses(history) -> dict[int, float]:
    """Return the logged losses by step."""
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def history(final: str | Path) -> list[dict]:
    """Return what a stage logged."""
    return json.loads((Path(final) / "trainer_state.json").read_text())["log_history"]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the parameters of a saved model."""
    model = HicoForConditionalGeneration.from_pretrained(folder)
    return dict(model.named_parameters())
