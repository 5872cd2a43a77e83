"""What a checkpoint was made from and how: written beside it, and held against what a restart asks for."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from hico.data.batching import BatchSampler
from hico.data.mixture import Mixture
from hico.data.yaml_files import read_yaml
from hico.train import checkpoint
from hico.train.config import Recipe

_DATA = ("started_from", "seed", "datasets", "order")
"""What a run must have in common with the checkpoint that it goes on from."""
_OPTIMIZED = ("objective", "trainable", "lora", "optim", "optim_args", "optim_target_modules")
"""Settings that decide what the state of the optimizer belongs to."""
_HOW = re.compile(
    r"(output_dir|name|model|check_files|decode_timeout|peak_tflops|on_bad_sample|max_bad_fraction|attn_implementation"
    r"|eval_(?!data|fraction).*|per_device_eval.*|(activation|gradient)_checkpointing.*|use_cpu|deepspeed|tf32|project"
    r"|fsdp|(dataloader|ddp|disable|fsdp|hub|include|log|logging|push|report|run|save|skip|torch|trackio)_.*)"
)
"""Settings that say how a stage is run or watched, not what comes of it."""
_DEFAULTS = {
    known.name: known.default_factory() if known.default is MISSING else known.default
    for kind in (TrainingArguments, Recipe)
    for known in fields(kind)
    if known.default is not MISSING or known.default_factory is not MISSING
}
"""What a setting is that no recipe names."""


def manifest(recipe: Recipe, mixture: Mixture, *, order: Mapping[str, Any]) -> dict[str, Any]:
    """Say what a stage is made from: its settings, the model that it starts from, its data and their order.

    Args:
        recipe: of the stage.
        mixture: its data.
        order: of its rows, see `row_order`.
    """
    return {
        "stage": recipe.name,
        "settings": _settings(recipe),
        "started_from": _identity(recipe),
        "order": dict(order),
        **mixture.manifest(),
    }


def row_order(sampler: BatchSampler, batches_per_step: int) -> dict[str, Any]:
    """Describe which rows the steps of the first epoch see, whatever the number of devices.

    Args:
        sampler: all batches, as of one device.
        batches_per_step: micro-batches of a step, over all devices.

    Returns:
        The number of steps, and a digest of their rows.
    """
    batches, steps, digest = list(sampler), 0, hashlib.sha256()
    for start in range(0, len(batches), batches_per_step):
        rows = sorted(row for batch in batches[start : start + batches_per_step] for _, row in batch)
        digest.update(np.array([len(rows), *rows], dtype="<i8").tobytes())
        steps += 1
    return {"steps_per_epoch": steps, "sha256": digest.hexdigest()}


def check_resumable(last: Path, asked: Mapping[str, Any]) -> str:
    """Hold a checkpoint against the manifest of the run that goes on from it.

    Returns:
        What changed among the settings, in words; nothing if all is as it was.

    Raises:
        ValueError: if the run is of other data, in another order, started from another model, or of another optimizer.
    """
    before, asked = checkpoint.read_manifest(last) or {}, _as_read(asked)
    for key in _DATA:
        if _wherever(before.get(key)) != _wherever(asked[key]):
            hint = " (batch sizes, devices, lengths or held-out rows differ)" if key == "order" else ""
            raise ValueError(
                f"{last} was trained on other data: {key} was {str(before.get(key))[:300]} and is "
                f"{str(asked[key])[:300]}{hint}; put that back, or train into another output_dir"
            )
    settings = before.get("settings", {})
    if changed := _changes(settings, asked["settings"], _OPTIMIZED):
        raise ValueError(
            f"{last} holds the optimizer of other settings: {changed}; put that back, or train into another output_dir"
        )
    return _changes(settings, asked["settings"])


def check_finished(final: Path, recipe: Recipe) -> None:
    """Raise ``ValueError`` if a finished stage was made by other settings, or from another model, than asked for."""
    before = checkpoint.read_manifest(final) or {}
    changed = _changes(before.get("settings", {}), _as_read(_settings(recipe)))
    identity = _identity(recipe)
    if Path(recipe.model).is_dir() and before.get("started_from", identity) != identity:
        changed = f"{recipe.model} was trained again since" + (f", and {changed}" if changed else "")
    if changed:
        raise ValueError(
            f"stage {recipe.name} is finished, but {changed}; remove {final.parent} to train it again, "
            "put the settings back, or name another output_dir"
        )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return what differs from the defaults among the settings that decide what comes of a stage."""
    settings = {**vars(recipe), **recipe.arguments, "trainable": sorted(recipe.trainable)}
    del settings["arguments"]
    if recipe.global_batch_size is not None:
        # Then these follow from the number of devices.
        settings.pop("per_device_train_batch_size", None)
        settings.pop("gradient_accumulation_steps", None)
    for key in ("data", "eval_data"):
        if isinstance(settings.get(key), str):
            datasets = json.dumps(read_yaml(Path(settings[key])), sort_keys=True)
            settings[key] = hashlib.sha256(datasets.encode()).hexdigest()
    return {
        key: value
        for key, value in settings.items()
        if not _HOW.fullmatch(key) and value != _DEFAULTS.get(key, MISSING)
    }


def _identity(recipe: Recipe) -> str | None:
    return (checkpoint.read_manifest(Path(recipe.model)) or {}).get("id")


def _wherever(value: Any) -> Any:
    """Return a part of a manifest without the paths of files: their digests tell them, wherever they lie."""
    if isinstance(value, list):
        return [_wherever(item) for item in value]
    if isinstance(value, dict):
        return {key: _wherever(item) for key, item in value.items() if key != "path"}
    return value


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], among: Sequence[str] | None = None) -> str:
    """Say in words which settings changed: any of them, or ``among`` some."""
    keys = [key for key in among or {**before, **now} if before and before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)


def _as_read(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))
