"""Directories in the published layout, written from golden weights or from random ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hico.published import SIZES_KEY


def golden_config(case) -> dict:
    """Return the published ``config.json`` of an end-to-end case."""
    return {
        "model_type": "llava_qwen_flash",
        "architectures": ["LlavaQwenForCausalLM_Flash"],
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        **case.config["llm"],
        **case.config["mm_config"],
        SIZES_KEY: case.config["tower"],
    }


def write_checkpoint(
    folder: Path, config: dict, weights: dict[str, torch.Tensor], *, num_shards: int = 1, suffix: str = "safetensors"
) -> Path:
    """Write a checkpoint as transformers 4 did.

    Args:
        folder: is made.
        config: content of ``config.json``.
        weights: by their published names.
        num_shards: files to spread them over.
        suffix: ``safetensors`` or ``bin``.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(weights)
    size = -(-len(names) // num_shards)
    weight_map = {}
    for number in range(num_shards):
        shard = {name: weights[name] for name in names[number * size : (number + 1) * size]}
        file = f"{stem}-{number + 1:05d}-of-{num_shards:05d}.{suffix}" if num_shards > 1 else f"{stem}.{suffix}"
        save_file(shard, folder / file) if suffix == "safetensors" else torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    if num_shards > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder
