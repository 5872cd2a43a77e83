"""A tiny LM with its tokenizer, and documents of two domains to train it on."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from hico.tokenizer import byte_tokenizer
from hico.train.config import Recipe
from hico.train.recipes import make_recipe

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 64, "eos_token_id": 258}


def write_lm(folder: Path, config=None, **changes) -> Path:
    """Write a causal LM with the tokenizer of bytes."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = config or Qwen2Config(**{**SIZES, "rope_parameters": rope, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_documents(folder: Path, *, num_documents: int = 16) -> Path:
    """Write documents of two domains, some of them long; return the mixture file."""
    rng = np.random.default_rng(0)
    for name, word in (("books", "page "), ("web", "link ")):
        rows = [
            {"text": f"{name} {number}: " + word * int(rng.integers(1, 40 if number % 4 == 0 else 6)), "n": number}
            for number in range(num_documents)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "text.yaml"
    path.write_text("datasets:\n  - {json_path: books.jsonl}\n  - {json_path: web.jsonl}\n")
    return path


def text_recipe(folder: Path, **changes) -> Recipe:
    """Return a recipe for the documents in ``folder``."""
    settings = {
        "name": "extend",
        "objective": "text",
        "model": str(folder / "lm"),
        "output_dir": str(folder / "out"),
        "data": str(folder / "text.yaml"),
        "rope_parameters": {"rope_theta": 1e6},
        "max_length": 128,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "seed": 3,
    }
    return make_recipe({**settings, **changes})
