"""What lies at a path: a model in one of three layouts, an LLM, a vision tower, or a file of weights."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hico.configuration_hico import HicoConfig
from hico.convert.plan import Rename, Unused
from hico.published import LAYER_SCALE, SYSTEMS, is_published, saying_what_it_is, system_of, to_hico
from hico.shards import CheckpointError, Shard, iterate_shards

HICO, LLM, VISION_TOWER, WEIGHTS = "hico", "LLM", "vision tower", "weights"
_TOWER_TYPES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}
"""``model_type`` of a vision model of transformers -> name of our encoder."""
_TOWER_SETTINGS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "hidden_act": "hidden_act",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint or a part of one, before its weights are read.

    Args:
        path: folder or file.
        kind: `HICO`, a system of `hico.published`, `LLM`, `VISION_TOWER` or `WEIGHTS`.
        config: content of its ``config.json``.
    """

    path: Path
    kind: str
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, path: str | Path) -> "Source":
        """Look at a path.

        Raises:
            CheckpointError: if nothing that can be read lies there.
        """
        path = Path(path)
        if path.is_file():
            return cls(path, WEIGHTS)
        if not path.is_dir():
            raise CheckpointError(f"{path}: there is no such file or folder")
        try:
            config = json.loads((path / "config.json").read_text())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: has no config.json; give the folder of a checkpoint") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path / 'config.json'}: cannot be read ({error})") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path / 'config.json'}: holds no keys and values; download it again")
        return cls(path, _kind_of(config), config)

    @property
    def is_published(self) -> bool:
        return self.kind in SYSTEMS

    def shards(self, rename: Rename) -> Iterator[tuple[Shard, Rename]]:
        """Open its weight files one after the other, each with how its tensors are renamed."""
        for shard in iterate_shards(self.path):
            yield shard, rename
            del shard  # before the next one is opened


def _kind_of(config: dict[str, Any]) -> str:
    if is_published(config):
        return system_of(config)
    model_type = str(config.get("model_type"))
    if model_type == "hico":
        return HICO
    return VISION_TOWER if model_type in _TOWER_TYPES else LLM


def llm_config(config: dict[str, Any]) -> PreTrainedConfig:
    """Read the ``config.json`` of an LLM of transformers.

    Raises:
        ValueError: if transformers knows no such LLM.
    """
    written = ("architectures", "auto_map", "transformers_version")
    settings = {key: value for key, value in config.items() if key not in written}
    with saying_what_it_is(config):
        return HicoConfig(text_config={"model_type": None, **settings}).text_config


def tower_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the ``config.json`` of a CLIP or SigLIP directory to the settings of our encoder.

    Raises:
        ValueError: if its vision part holds no settings.
    """
    vision = config.get("vision_config") or config
    if not isinstance(vision, dict):
        raise ValueError(f"vision_config is {vision!r}; it must be a mapping of settings")
    settings = {ours: vision[theirs] for theirs, ours in _TOWER_SETTINGS.items() if theirs in vision}
    return {"name": _TOWER_TYPES[config["model_type"]], **settings}


def published_to_hico(system: str) -> Rename:
    """Rename the tensors of a published checkpoint."""
    return partial(to_hico, system=system)


def llm_to_hico(name: str) -> str | None:
    """Rename a tensor of an LLM of transformers."""
    if name.startswith("lm_head."):
        return name
    return "model.language_model." + name.removeprefix("model.")


def projector_to_hico(name: str) -> str | None:
    """Rename a tensor of a stage-1 ``mm_projector.bin`` of either system."""
    match = re.fullmatch(r"(?:model\.)?mm_projector\.(?:mlp\.)?(\d+\..+)", name)
    return f"model.projector.mlp.{match[1]}" if match else None


_TOWER_NAMES: tuple[tuple[str, str | Unused], ...] = (
    (r"(text_model|text_projection|visual_projection)\.|logit_(scale|bias)$", Unused("not of the vision tower")),
    (r"vision_model\.", r"model.encoder.\g<0>"),
    (r"(embeddings|encoder\.layers|pre_layrnorm|post_layernorm|head)\.", r"model.encoder.vision_model.\g<0>"),
    (r"encoder\.norm(?=\.)", "model.encoder.vision_layernorm"),
    (r"encoder\.", "model.encoder."),
    (r"(?:vision_encoder\.)?(blocks\.|patch_embed\.|(?:cls_token|(?:img_)?pos_embed)$)", r"model.encoder.\g<1>"),
    (r"", Unused("not of the encoder")),
)
"""Beginnings of names, in files of UMT and InternVideo2 and in models of transformers, and what they become."""


def tower_to_hico(name: str) -> str | Unused | None:
    """Rename a tensor of a file of UMT or InternVideo2, or of a CLIP or SigLIP model of transformers."""
    pattern, fate = next((pattern, fate) for pattern, fate in _TOWER_NAMES if re.match(pattern, name))
    if isinstance(fate, Unused):
        return fate
    return re.sub(*LAYER_SCALE, re.sub(f"^(?:{pattern})", fate, name))


def encoder_in_file(source: Source) -> str:
    """Say whether a file of weights is InternVideo2's, which alone has norms of queries and keys, or else UMT's."""
    names = (name for shard, _ in source.shards(tower_to_hico) for name in shard.tensors)
    return "internvideo2" if any(name.endswith(".attn.q_norm.weight") for name in names) else "umt"
