"""What a stage was made from: written beside every checkpoint, and held against what a restart asks for."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from hico.data.batching import BatchSampler
from hico.data.mixture import Mixture
from hico.data.spec import expand_path, read_specs
from hico.data.tables import open_rows
from hico.train.checkpoint import read_manifest
from hico.train.config import Recipe

_OPTIMIZER = (
    *("optim", "optim_args", "optim_target_modules"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
_LEARNING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "bf16", "fp16"),
    *("num_train_epochs", "max_steps", *_OPTIMIZER),
)
"""Arguments of transformers that decide what comes of a stage."""
_RUNNING = (
    *("name", "model", "output_dir", "data", "eval_data", "arguments", "plugins", "check_files", "decode_timeout"),
    *("peak_tflops", "on_bad_sample", "max_bad_fraction", "attn_implementation"),
    *("sequence_parallel", "ulysses_size", "loss_chunk", "mlp_chunk", "offload_activations"),
)
"""Keys of ours that do not, or that stand elsewhere in a manifest."""
_FIXED = ("objective", "trainable", "lora", *_OPTIMIZER)
"""Settings that the state of the optimizer belongs to."""


def manifest(recipe: Recipe, mixture: Mixture, sampler: BatchSampler, batches_per_step: int) -> dict[str, Any]:
    """Say what a stage is made from: its settings, the model that it starts from, its data and their order.

    Args:
        recipe: of the stage.
        mixture: its data.
        sampler: all batches, as of one device.
        batches_per_step: micro-batches of a step, over all devices.
    """
    order, batches = hashlib.sha256(), list(sampler)
    for start in range(0, len(batches), batches_per_step):
        # Rows of a step, however many devices share them.
        rows = sorted(row for batch in batches[start : start + batches_per_step] for _, row in batch)
        order.update(np.array([len(rows), *rows], dtype="<i8").tobytes())
    return {
        "stage": recipe.name,
        "recipe": settings_of(recipe),
        "started_from": _identity(recipe),
        "seed": recipe.seed,
        "datasets": mixture.manifest(),
        "order": order.hexdigest(),
    }


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide what comes of a stage, as JSON has them."""
    own = {key: value for key, value in vars(recipe).items() if key not in _RUNNING}
    # Where the global batch is given, the others follow from the number of devices.
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps") if recipe.global_batch_size is None else ()
    theirs = {key: recipe.arguments.get(key, getattr(TrainingArguments, key, None)) for key in (*_LEARNING, *batch)}
    return json.loads(json.dumps({**own, **theirs, "trainable": sorted(recipe.trainable)}))


def changes_since_end(final: Path, recipe: Recipe) -> dict[str, str]:
    """Say in words what differs between a finished stage and what is asked for: settings, model below, rows."""
    before, identity = _made(final), _identity(recipe)
    changed = _changes(before["recipe"], settings_of(recipe))
    if Path(recipe.model).is_dir() and before["started_from"] != identity:
        changed["started_from"] = f"{recipe.model} was trained again since"
    try:
        now = [
            {
                "sha256": [open_rows(path).sha256 for path in expand_path(spec.json_path)],
                "sampling_strategy": spec.sampling_strategy,
                "repeat": spec.repeat,
                **spec.video_settings,
            }
            for spec in read_specs(recipe.data)
        ]
    except FileNotFoundError:  # what is finished needs its data no more
        return changed
    made = [{key: each[key] for key in each if key not in ("name", "rows_taken")} for each in before["datasets"]]
    if now != made:
        changed["datasets"] = "its rows have changed since"
    return changed


def is_longer(final: Path, recipe: Recipe) -> bool:
    """Say whether more steps or epochs are asked for than a finished stage made."""
    before, now = _made(final)["recipe"], settings_of(recipe)
    key = "max_steps" if max(before["max_steps"], now["max_steps"]) > 0 else "num_train_epochs"
    return now[key] > before[key] > 0


def changes_since(last: Path, asked: Mapping[str, Any]) -> str:
    """Hold a checkpoint against the manifest of the run that goes on from it.

    Returns:
        What changed among the settings, in words; nothing if all is as it was.

    Raises:
        ValueError: if the run is of other data, in another order, started from another model, or of another optimizer.
    """
    before, hint = _made(last), "put that back, give --overwrite, or name another output_dir"
    for key in ("started_from", "seed", "datasets", "order"):
        if before[key] != asked[key]:
            why = " (batch sizes, devices, lengths or held-out rows differ)" if key == "order" else ""
            raise ValueError(
                f"{last} was trained on other data: {key} was {str(before[key])[:300]} and is "
                f"{str(asked[key])[:300]}{why}; {hint}"
            )
    changed = _changes(before["recipe"], asked["recipe"])
    if held := [said for key, said in changed.items() if key in _FIXED]:
        raise ValueError(f"{last} holds the optimizer of other settings: {', '.join(held)}; {hint}")
    return ", ".join(changed.values())


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    return {key: f"{key} was {old[key]!r} and is {new[key]!r}" for key in new if key in old and old[key] != new[key]}


def _made(folder: Path) -> dict[str, Any]:
    made = read_manifest(folder)
    if "recipe" not in made:
        raise ValueError(f"{folder} was made by an earlier version of hico; remove it, or name another output_dir")
    return made


def _identity(recipe: Recipe) -> str | None:
    return (read_manifest(Path(recipe.model)) or {}).get("id")
