"""What a checkpoint was made from and how: written beside it, and held against what a restart asks for."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from hico.data.batching import BatchSampler
from hico.data.mixture import Mixture
from hico.data.spec import expand_path, read_specs
from hico.data.tables import open_rows
from hico.data.yaml_files import read_yaml
from hico.train import checkpoint
from hico.train.config import Recipe

_DATA = ("started_from", "seed", "datasets", "order")
"""What a run must have in common with the checkpoint that it goes on from."""
_OPTIMIZED = (
    *("objective", "trainable", "lora", "optim", "optim_args", "optim_target_modules", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)
"""Settings that the state of the optimizer belongs to."""
_HOW = re.compile(
    r"(output_dir|name|model|plugins|check_files|decode_timeout|peak_tflops|on_bad_sample|max_bad_fraction"
    r"|attn_implementation|eval_(?!data|fraction).*|per_device_eval.*|(activation|gradient)_checkpointing.*|use_cpu"
    r"|deepspeed|tf32|project|fsdp"
    r"|(dataloader|ddp|disable|fsdp|hub|include|log|logging|push|report|run|save|skip|torch|trackio)_.*)"
)
"""Settings that say how a stage is run or watched, not what comes of it."""


def manifest(recipe: Recipe, mixture: Mixture, sampler: BatchSampler, batches_per_step: int) -> dict[str, Any]:
    """Say what a stage is made from: its settings, the model that it starts from, its data and their order.

    Args:
        recipe: of the stage.
        mixture: its data.
        sampler: all batches, as of one device.
        batches_per_step: micro-batches of a step, over all devices.
    """
    return {
        "stage": recipe.name,
        "settings": settings_of(recipe),
        "started_from": _identity(recipe),
        "order": _row_order(sampler, batches_per_step),
        **mixture.manifest(),
    }


def changes_since_end(final: Path, recipe: Recipe) -> dict[str, str]:
    """Say in words what differs between a finished stage and what is asked for: settings, model below, rows."""
    before = checkpoint.read_manifest(final) or {}
    changed = _changes(before, {"settings": settings_of(recipe)})
    identity = _identity(recipe)
    if Path(recipe.model).is_dir() and before.get("started_from", identity) != identity:
        changed["started_from"] = f"{recipe.model} was trained again since"
    try:
        specs = read_specs(recipe.data)
        now = [[open_rows(path).sha256 for path in expand_path(spec.json_path)] for spec in specs]
    except FileNotFoundError:  # what is finished needs its data no more
        return changed
    then = [[file["sha256"] for file in dataset["files"]] for dataset in before.get("datasets", [])]
    if then and now != then:
        changed["datasets"] = "its rows have changed since"
    return changed


def is_longer(final: Path, recipe: Recipe) -> bool:
    """Say whether more steps or epochs are asked for than a finished stage made."""
    before, now = (checkpoint.read_manifest(final) or {}).get("settings", {}), settings_of(recipe)
    key = "max_steps" if _value(before, "max_steps") > 0 or _value(now, "max_steps") > 0 else "num_train_epochs"
    return _value(now, key) > _value(before, key) > 0


def changes_since(last: Path, asked: Mapping[str, Any]) -> str:
    """Hold a checkpoint against the manifest of the run that goes on from it.

    Returns:
        What changed among the settings, in words; nothing if all is as it was.

    Raises:
        ValueError: if the run is of other data, in another order, started from another model, or of another optimizer.
    """
    before, asked = checkpoint.read_manifest(last) or {}, json.loads(json.dumps(asked))
    for key in _DATA:
        if _wherever(before.get(key)) != _wherever(asked[key]):
            hint = " (batch sizes, devices, lengths or held-out rows differ)" if key == "order" else ""
            raise ValueError(
                f"{last} was trained on other data: {key} was {str(before.get(key))[:300]} and is "
                f"{str(asked[key])[:300]}{hint}; put that back, give --overwrite, or name another output_dir"
            )
    changed = _changes(before, asked)
    if held := [said for key, said in changed.items() if key in _OPTIMIZED]:
        raise ValueError(
            f"{last} holds the optimizer of other settings: {', '.join(held)}; put that back, give --overwrite, or "
            "name another output_dir"
        )
    return ", ".join(changed.values())


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide what comes of a stage, as JSON has them."""
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
    return json.loads(json.dumps({key: value for key, value in settings.items() if not _HOW.fullmatch(key)}))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    if "settings" not in before:
        return {}
    old, new = before["settings"], now["settings"]
    return {
        key: f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in {**old, **new}
        if _value(old, key) != _value(new, key)
    }


def _value(settings: Mapping[str, Any], key: str) -> Any:
    """Return a setting, or what it is where no recipe names it."""
    return settings.get(key, getattr(TrainingArguments, key, getattr(Recipe, key, None)))


def _row_order(sampler: BatchSampler, batches_per_step: int) -> dict[str, Any]:
    """Return the steps of the first epoch, and a digest of their rows that any number of devices has in common."""
    batches, digest = list(sampler), hashlib.sha256()
    steps = range(0, len(batches), batches_per_step)
    for start in steps:
        rows = sorted(row for batch in batches[start : start + batches_per_step] for _, row in batch)
        digest.update(np.array([len(rows), *rows], dtype="<i8").tobytes())
    return {"steps_per_epoch": len(steps), "sha256": digest.hexdigest()}


def _identity(recipe: Recipe) -> str | None:
    return (checkpoint.read_manifest(Path(recipe.model)) or {}).get("id")


def _wherever(value: Any) -> Any:
    """Return a part of a manifest without the paths of files: their digests tell them, wherever they lie."""
    if isinstance(value, list):
        return [_wherever(item) for item in value]
    if isinstance(value, dict):
        return {key: _wherever(item) for key, item in value.items() if key != "path"}
    return value
