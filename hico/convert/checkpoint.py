"""Convert a checkpoint from one layout to another."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hico.configuration_hico import HicoConfig
from hico.convert.export import export_config
from hico.convert.plan import Expected, Plan, Rename, make_plan
from hico.convert.report import Report
from hico.convert.sources import (
    HICO,
    LLM,
    VISION_TOWER,
    WEIGHTS,
    Source,
    encoder_in_file,
    llm_config,
    llm_to_hico,
    projector_to_hico,
    published_to_hico,
    tower_settings,
    tower_to_hico,
)
from hico.convert.write import whole_folder, write_weights
from hico.processing_hico import HicoProcessor
from hico.projector import MLPProjector
from hico.prompt import CHAT_TEMPLATE
from hico.published import to_published, translate
from hico.shards import SAFETENSORS_DTYPES, CheckpointError, Shard, TensorShard, open_shard
from hico.tokenizer import add_placeholders, load_llm_tokenizer

LAYOUTS = ("hico", "published")
DEFAULT_PRESET = {"clip": "longva-7b", "internvideo2": "videochat-flash-7b-internvideo2"}
"""Encoder -> preset that a model made of parts follows; the others follow `ASSEMBLED_PRESET`."""
ASSEMBLED_PRESET = "videochat-flash-7b-224"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "hico",
    encoder: str | Path | None = None,
    projector: str | Path | None = None,
    preset: str | None = None,
) -> Report:
    """Convert a checkpoint from one layout to another, or make one of parts.

    Tensors are copied as they are, a piece at a time; the target appears whole or not at all.

    Args:
        source: a checkpoint of VideoChat-Flash or LongVA, or ours; or an LLM of transformers, for a model of parts.
        target: folder to write.
        to: ``"hico"``, or ``"published"`` for the layout of the system that the model follows.
        encoder: for a model of parts: a file of the pre-training of UMT (``UMT-L_f4_vision.pt``) or InternVideo2
            (``InternVideo2-1B_f4_vision.pt``), or the folder of a CLIP or SigLIP model.
        projector: for a model of parts: ``mm_projector.bin`` of stage 1; random, from a fixed seed, if omitted.
        preset: for a model of parts: the `HicoConfig.preset` that says the rest; if omitted, LongVA's for CLIP, and
            otherwise VideoChat-Flash's with that encoder.

    Returns:
        What became of every tensor and key.

    Raises:
        ValueError: if the configuration cannot be expressed, ``target`` exists, or the arguments contradict.
        CheckpointError: if a file cannot be read, or a tensor is left over or missing.
    """
    target, source = Path(target), Source.at(source)
    if to not in LAYOUTS:
        raise ValueError(f"unknown layout {to!r}; use one of {', '.join(LAYOUTS)}")
    if source.kind in (WEIGHTS, VISION_TOWER):
        raise ValueError(
            f"{source.path} is a part and no model; give the folder of an LLM, and this as its encoder or projector"
        )
    if source.kind != LLM and (encoder or projector or preset):
        raise ValueError(
            f"{source.path} is a whole model ({source.kind}); encoder, projector and preset go with an LLM"
        )
    if to == "published":
        return _to_published(source, target)
    if source.kind == LLM:
        return _assemble(source, target, encoder, projector, preset)
    return _from_published(source, target)


def _from_published(source: Source, target: Path) -> Report:
    if not source.is_published:
        raise ValueError(f"{source.path} is in our layout already; --to published converts it back")
    found, config = translate(source.config), HicoConfig.from_pretrained(source.path)
    plan = make_plan(source.shards(published_to_hico(source.kind)), Expected.of(config))
    _check_tied(plan, open_shard)
    tokenizer = load_llm_tokenizer(str(source.path), known=False)
    notes = [] if tokenizer else [_NO_TOKENIZER]
    with whole_folder(target) as folder:
        write_weights(folder, plan.moves, open_shard)
        _copy_generation_config(source.path, folder)
        if tokenizer:
            HicoProcessor.from_pretrained(source.path).save_pretrained(folder)
        _save_config(config, plan, folder)
    return Report(f"{source.path} ({source.kind})", target, plan, found.ignored, found.unknown, notes)


def _to_published(source: Source, target: Path) -> Report:
    if source.kind != HICO:
        raise ValueError(f"{source.path} ({source.kind}) is not in our layout; convert it to hico first")
    config = HicoConfig.from_pretrained(source.path)
    tokenizer = load_llm_tokenizer(str(source.path))
    has_processor = tokenizer is not None and (source.path / "processor_config.json").is_file()
    processor = HicoProcessor.from_pretrained(source.path) if has_processor else None
    system, settings = export_config(config, image_tiling=processor and processor.image_tiling)
    rename = partial(to_published, system=system, encoder=config.encoder["name"])
    plan = make_plan(source.shards(rename), Expected.of(config).renamed(rename))
    _check_tied(plan, open_shard)
    notes = [] if tokenizer else [_NO_TOKENIZER]
    if processor:
        notes += _lost_settings(processor, translate(settings).processor)
    with whole_folder(target) as folder:
        write_weights(folder, plan.moves, open_shard)
        _copy_generation_config(source.path, folder)
        if tokenizer:
            tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(settings, indent=2))
    return Report(f"{source.path} ({HICO})", target, plan, notes=notes)


def _lost_settings(processor: HicoProcessor, published: dict[str, Any]) -> list[str]:
    """Name the settings of a processor that are others once its model is ``published``."""
    return [
        f"the published layout has no place for the processor's {name} {getattr(processor, name)!r}; "
        f"read from there, it is {value!r}"
        for name, value in published.items()
        if getattr(processor, name) != value
    ]


def _assemble(
    source: Source, target: Path, encoder: str | Path | None, projector: str | Path | None, preset: str | None
) -> Report:
    text_config = llm_config(source.config)
    if encoder is None:
        raise ValueError(f"{source.path} is an LLM ({source.config.get('model_type')}); say which encoder it gets")
    tower = Source.at(encoder)
    if tower.kind not in (WEIGHTS, VISION_TOWER):
        raise ValueError(
            f"{encoder} is no vision tower ({tower.kind}); give a file of UMT or InternVideo2, or a CLIP or SigLIP "
            "folder"
        )
    tokenizer = load_llm_tokenizer(str(source.path))
    config = _assembled_config(text_config, tower, tokenizer, preset)
    expected = Expected.of(config)
    notes = [] if tokenizer else [_NO_TOKENIZER]
    parts: list[Iterator[tuple[Shard, Rename]]] = [source.shards(llm_to_hico), tower.shards(tower_to_hico)]
    made: dict[Path, Shard] = {}
    if projector is None:
        shard = _random_projector(expected, text_config.dtype or torch.float32)
        made[shard.path] = shard
        parts.append(iter([(shard, lambda name: name)]))
        notes.append("the projector is random (seed 0) until it is trained")
    else:
        parts.append(Source.at(projector).shards(projector_to_hico))
    plan = make_plan(chain(*parts), expected)

    def open_any(path: Path) -> Shard:
        return made[path] if path in made else open_shard(path)

    _check_tied(plan, open_any)
    with whole_folder(target) as folder:
        write_weights(folder, plan.moves, open_any)
        _copy_generation_config(source.path, folder)
        if tokenizer:
            tokenizer.padding_side = "left"
            # The models here are trained on ChatML; an LLM that does not know it keeps its own language.
            template = CHAT_TEMPLATE if "<|im_start|>" in tokenizer.get_vocab() else tokenizer.chat_template
            HicoProcessor.from_config(config, tokenizer, chat_template=template).save_pretrained(folder)
        _save_config(config, plan, folder)
    return Report(f"{source.path} and {encoder}", target, plan, notes=notes)


def _assembled_config(
    text_config: PreTrainedConfig, tower: Source, tokenizer: PreTrainedTokenizerBase | None, preset: str | None
) -> HicoConfig:
    changes: dict[str, Any] = {"text_config": text_config}
    if tower.kind == VISION_TOWER:
        changes["encoder"] = tower_settings(tower.config)
    if preset is None:
        name = changes["encoder"]["name"] if "encoder" in changes else encoder_in_file(tower)
        preset = DEFAULT_PRESET.get(name, ASSEMBLED_PRESET)
    if tokenizer:
        changes |= add_placeholders(tokenizer)
    return HicoConfig.preset(preset, **changes)


def _random_projector(expected: Expected, dtype: torch.dtype) -> Shard:
    llm_width, width = expected.shapes["model.projector.mlp.0.weight"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = MLPProjector(width, llm_width).to(dtype).state_dict()
    return TensorShard(Path("random projector"), {f"model.projector.{name}": w for name, w in weights.items()})


def _check_tied(plan: Plan, open_any: Callable[[Path], Shard]) -> None:
    """Refuse to leave out a tied tensor that is not the same as the one that it is tied to."""
    sources = {move.target: move for move in plan.moves}
    for drop in plan.drops:
        if drop.same_as is not None:
            kept = sources[drop.same_as]
            if _digest(open_any(drop.shard), drop.name) != _digest(open_any(kept.shard), kept.name):
                raise CheckpointError(
                    f"{drop.shard}: {drop.name!r} differs from {kept.name!r}, but the configuration ties them; "
                    "set tie_word_embeddings to false"
                )


def _digest(shard: Shard, name: str) -> bytes:
    """Sum a tensor up, so that two can be compared with neither of them in memory, nor both files open."""
    digest = hashlib.blake2b(repr(shard.tensors[name]).encode())
    for piece in shard.pieces(name):
        digest.update(piece)
    return digest.digest()


def _save_config(config: HicoConfig, plan: Plan, folder: Path) -> None:
    """Save the configuration, last of all: a folder without it does not load."""
    if config.dtype is None:
        embeddings = next(move for move in plan.moves if move.target.endswith("embed_tokens.weight"))
        config.dtype = SAFETENSORS_DTYPES[embeddings.info.dtype]
    config.architectures = ["HicoForConditionalGeneration"]
    config.save_pretrained(folder)


def _copy_generation_config(source: Path, folder: Path) -> None:
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


_NO_TOKENIZER = "there is no tokenizer beside the weights, so no processor was written"
