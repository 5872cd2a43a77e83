"""Say what a checkpoint is without loading its weights."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hico.configuration_hico import HicoConfig
from hico.convert.plan import Rename, Unused
from hico.convert.sources import (
    HICO,
    LLM,
    VISION_TOWER,
    WEIGHTS,
    Source,
    llm_config,
    llm_to_hico,
    projector_to_hico,
    published_to_hico,
    tower_settings,
    tower_to_hico,
)
from hico.published import translate

PARTS = {
    "model.encoder.": "encoder",
    "model.compressor.": "compressor",
    "model.projector.": "projector",
    "model.language_model.": "LLM",
    "lm_head.": "LM head",
}
"""Beginnings of our names -> parts of a model."""
UNUSED = "not used"


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Args:
        kind: ``hico``, ``videochat-flash``, ``longva``, ``LLM``, ``vision tower`` or ``weights``.
        facts: what its configuration says, in the order in which to show it.
        num_parameters: per part.
        dtypes: number of tensors per dtype.
        num_bytes: of all tensors.
        ignored: keys of the configuration that change nothing, and why.
        unknown: keys of the configuration that nobody knows, with their values.
        fault: why it cannot be loaded, or None if nothing speaks against it.
    """

    path: Path
    kind: str
    facts: dict[str, Any]
    num_parameters: dict[str, int]
    dtypes: dict[str, int]
    num_bytes: int
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None

    def report(self) -> str:
        """Return what was found as text."""
        rows = [("checkpoint", str(self.path)), ("kind", self.kind)]
        rows += [(name, str(value)) for name, value in self.facts.items()]
        rows += [(f"parameters, {part}", f"{count:,}") for part, count in self.num_parameters.items()]
        rows += [("parameters", f"{sum(self.num_parameters.values()):,}")] if self.num_parameters else []
        rows += [("dtype", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in self.dtypes.items()))]
        rows += [("size", f"{self.num_bytes / 1e9:.2f} GB")]
        rows += [(f"key {key}", f"not used: {reason}") for key, reason in self.ignored.items()]
        rows += [(f"key {key}", f"not known: {value!r}") for key, value in self.unknown.items()]
        rows += [("cannot be loaded", self.fault)] if self.fault else []
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Say what a checkpoint, or a part of one, is. Only headers of its files are read.

    Raises:
        CheckpointError: if a file is missing or damaged; the message names it.
    """
    source = Source.at(path)
    facts, ignored, unknown, fault = {}, {}, {}, None
    try:
        if source.is_published:
            found = translate(source.config)
            facts, ignored, unknown = _model_facts(HicoConfig(**found.config)), found.ignored, found.unknown
        else:
            facts = _FACTS[source.kind](source.config)
    except ValueError as error:
        fault = str(error)
    except Exception as error:  # settings that contradict each other make transformers fail in any way
        fault = f"its settings contradict each other ({error!r})"
    parts, dtypes, num_bytes = Counter(), Counter(), 0
    rename = published_to_hico(source.kind) if source.is_published else _RENAMES[source.kind]
    for shard, _ in source.shards(rename):
        for name, info in shard.tensors.items():
            parts[_part_of(rename(name))] += info.num_values
            dtypes[info.dtype] += 1
            num_bytes += info.nbytes
        del shard  # before the next one is opened
    return Inspection(source.path, source.kind, facts, dict(parts), dict(dtypes), num_bytes, ignored, unknown, fault)


def _model_facts(config: HicoConfig) -> dict[str, Any]:
    vision, num_frames = config.vision, config.clip_len
    return {
        "encoder": _spec(config.encoder),
        "compressor": _spec(config.compressor),
        **({} if config.video_compressor is None else {"video compressor": _spec(config.video_compressor)}),
        "clip": f"{num_frames} frames of {vision.image_size} px, {vision.num_video_tokens(num_frames)} tokens",
        "image layout": config.image_layout,
        "drop schedule": config.drop_schedule or "none",
        **_text_facts(config.text_config),
    }


def _text_facts(text: PreTrainedConfig) -> dict[str, Any]:
    heads = text.num_attention_heads
    return {
        "LLM": f"{text.model_type}, {text.num_hidden_layers} layers, {text.hidden_size} wide, "
        f"{heads} heads ({getattr(text, 'num_key_value_heads', heads)} key-value), vocabulary {text.vocab_size}",
        "context": f"{text.max_position_embeddings} tokens",
        "rope": _rope(getattr(text, "rope_parameters", None)),
    }


def _rope(settings: dict[str, Any] | None) -> str:
    if not settings:
        return "none"
    if "rope_type" not in settings:  # it differs between kinds of layers
        return "; ".join(f"{kind}: {_rope(its_settings)}" for kind, its_settings in settings.items())
    rest = {name: value for name, value in settings.items() if name not in ("rope_type", "rope_theta")}
    facts = [settings["rope_type"], f"theta {settings['rope_theta']:g}"]
    return ", ".join([*facts, *(f"{name} {value}" for name, value in rest.items())])


def _spec(settings: dict[str, Any]) -> str:
    rest = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "name")
    return f"{settings['name']} ({rest})" if rest else settings["name"]


_FACTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    HICO: lambda config: _model_facts(HicoConfig.from_dict(config)),
    LLM: lambda config: _text_facts(llm_config(config)),
    VISION_TOWER: lambda config: {"encoder": _spec(tower_settings(config))},
    WEIGHTS: lambda config: {},
}


def _part_to_hico(name: str) -> str | Unused | None:
    return projector_to_hico(name) or tower_to_hico(name)


_RENAMES: dict[str, Rename] = {
    HICO: lambda name: name,
    LLM: llm_to_hico,
    VISION_TOWER: tower_to_hico,
    WEIGHTS: _part_to_hico,
}


def _part_of(target: str | Unused | None) -> str:
    if not isinstance(target, str):
        return UNUSED
    return next((part for prefix, part in PARTS.items() if target.startswith(prefix)), UNUSED)
