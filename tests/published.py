"""Directories in the published layout, written from golden weights or from random ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hico import HicoConfig, HicoForConditionalGeneration
from hico.published import SIZES_KEY, VIDEOCHAT_FLASH, to_published, translate
from hico.tokenizer import byte_tokenizer


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


TINY_TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""Keys of a tiny Qwen2, as transformers 4 wrote them."""


def tiny_llm(**changes) -> Qwen2ForCausalLM:
    """Return a Qwen2 of `TINY_TEXT` with random weights."""
    settings = {**TINY_TEXT, **changes}
    return Qwen2ForCausalLM(Qwen2Config(**settings)).eval()


def tiny_clip() -> CLIPVisionModel:
    """Return a whole CLIP vision tower, with the layer and the norm that LongVA does not run."""
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 40}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=3, num_attention_heads=2)).eval()


def longva(llm, tower, projector, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return configuration and weights of a LongVA checkpoint, made of modules of transformers and torch."""
    clip = tower.config
    sizes = {"img": clip.image_size, "dim": clip.hidden_size, "depth": clip.num_hidden_layers}
    sizes |= {"heads": clip.num_attention_heads, "patch": clip.patch_size, "mlp": clip.intermediate_size}
    config = {
        **TINY_TEXT,
        "model_type": "llava_qwen",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "unires",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "anyres",
        SIZES_KEY: sizes,
        **changes,
    }
    tower_prefix = "model.vision_tower.vision_tower.vision_model."
    weights = dict(llm.state_dict())
    weights |= {tower_prefix + name.removeprefix("vision_model."): w for name, w in tower.state_dict().items()}
    weights[tower_prefix + "embeddings.position_ids"] = torch.arange(17)[None]
    weights |= {f"model.mm_projector.{name}": w for name, w in projector.state_dict().items()}
    return config, {name: weight.clone().contiguous() for name, weight in weights.items()}


def videochat_flash(llm, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return configuration and random weights of a VideoChat-Flash checkpoint over an LLM."""
    config = {
        **TINY_TEXT,
        "model_type": "videochat_flash_qwen",
        "mm_vision_tower": "umt-hd-large",
        "mm_projector_type": "tome16_mlp_hd64",
        SIZES_KEY: {"img": 128, "dim": 24, "depth": 3, "heads": 2},
        **changes,
    }
    model = HicoForConditionalGeneration(HicoConfig(**translate(config).config))
    parts = ("model.encoder.", "model.projector.")
    vision = {name: weight for name, weight in model.state_dict().items() if name.startswith(parts)}
    weights = {to_published(name, VIDEOCHAT_FLASH, "umt"): w for name, w in vision.items()} | dict(llm.state_dict())
    return config, {name: weight.clone().contiguous() for name, weight in weights.items()}


def internvideo2(llm, *, scale: str = "gamma", **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return configuration and random weights of VideoChat-Flash with InternVideo2, names and shapes written by hand.

    Args:
        llm: a `tiny_llm`.
        scale: what the scales of the blocks are called.
        changes: keys of the configuration.
    """
    config = {
        **TINY_TEXT,
        "model_type": "videochat_flash_qwen",
        "mm_vision_tower": "internvideo2",
        "mm_vision_tower_lr": 2e-06,
        "mm_vision_select_layer": -2,
        "mm_hidden_size": 48,
        "mm_local_num_frames": 4,
        "mm_projector_type": "tome16_mlp_hd64",
        SIZES_KEY: {"img": 128, "dim": 48, "depth": 3, "heads": 3, "patch": 16, "mlp": 80, "side": 8},
        **changes,
    }
    shapes = {"cls_token": (1, 1, 48), "pos_embed": (1, 1 + 4 * 64, 48), "img_pos_embed": (1, 1 + 64, 48)}
    shapes |= {"patch_embed.proj.weight": (48, 3, 1, 16, 16), "patch_embed.proj.bias": (48,)}
    for index in range(2):
        block = dict.fromkeys(("norm1.weight", "norm2.weight", f"ls1.{scale}", f"ls2.{scale}"), (48,))
        block |= {"attn.qkv.weight": (144, 48), "attn.q_norm.weight": (48,), "attn.k_norm.weight": (48,)}
        block |= {"attn.proj.weight": (48, 48), "attn.proj.bias": (48,)}
        block |= {"mlp.fc1.weight": (80, 48), "mlp.fc1.bias": (80,)}
        block |= {"mlp.fc2.weight": (48, 80), "mlp.fc2.bias": (48,)}
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    shapes = {f"model.vision_tower.vision_tower.{name}": shape for name, shape in shapes.items()}
    shapes |= {"model.mm_projector.mlp.0.weight": (32, 48), "model.mm_projector.mlp.0.bias": (32,)}
    shapes |= {"model.mm_projector.mlp.2.weight": (32, 32), "model.mm_projector.mlp.2.bias": (32,)}
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return config, weights | {name: weight.clone() for name, weight in llm.state_dict().items()}


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer of ChatML that knows no placeholder, and whose own template takes text only."""
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].endswith("_pad|>")]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{{ 'system: ' + messages[0]['content'] }}",
    )
    plain.save_pretrained(folder)
    return plain
