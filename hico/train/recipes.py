"""Recipe files: YAML that extends the stages of ``stages.yaml``, or each other, and flags that win over it."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hico.data.fields import check_keys, check_types
from hico.data.yaml_files import parse_yaml, read_yaml
from hico.train.config import PARTS, Recipe

STAGES = Path(__file__).with_name("stages.yaml")
DECIDED = (
    *("remove_unused_columns", "resume_from_checkpoint", "ignore_data_skip", "save_only_model"),
    *("auto_find_batch_size", "train_sampling_strategy", "logging_nan_inf_filter", "label_smoothing_factor"),
    *("average_tokens_across_devices", "dataloader_drop_last", "data_seed"),
)
"""Arguments of transformers that would have no effect, or break what a run promises."""


def load_recipes(path: str | Path, overrides: Mapping[str, Any] | None = None) -> list[Recipe]:
    """Read a recipe file.

    Files that a recipe names (``data``, ``eval_data``, ``deepspeed``, ``extends``, ``stages``) are looked for beside
    it, then from the working directory. ``${NAME}`` in any text is taken from the environment.

    Args:
        path: YAML file: one stage, or a chain with a list of ``stages``, each a file or a mapping.
        overrides: keys that win over the file; of a chain, ``model`` and ``output_dir`` are the chain's own, all
            others go to every stage.

    Returns:
        The stages in order. In a chain, each starts from the result of the one before.

    Raises:
        ValueError: if a key is unknown (the message names the nearest one) or a value is out of range.
    """
    settings = _read(Path(path))
    overrides = dict(overrides or {})
    if "stages" not in settings:
        return [make_recipe({"name": Path(path).stem, **settings, **overrides})]
    chain = {key: overrides.pop(key, settings.pop(key, None)) for key in ("model", "output_dir")}
    if chain["output_dir"] is None:
        raise ValueError(f"{path}: a chain needs an output_dir for the folders of its stages")
    recipes: list[Recipe] = []
    for number, stage in enumerate(settings.pop("stages"), 1):
        if isinstance(stage, str):
            own = {"name": Path(stage).stem, **_read(_beside(Path(path), stage))}
        else:
            own = {"name": stage.get("extends", f"stage{number}"), **_resolve(stage, Path(path))}
        own["output_dir"] = str(Path(chain["output_dir"]) / str(own["name"]))
        own["model"] = str(Path(recipes[-1].output_dir) / "final") if recipes else chain["model"] or own.get("model")
        recipes.append(make_recipe({**own, **overrides}, defaults=settings))
        if recipes[-1].name in [recipe.name for recipe in recipes[:-1]]:
            raise ValueError(f"{path}: two stages are called {recipes[-1].name!r}; set `name` in one of them")
    return recipes


def make_recipe(settings: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> Recipe:
    """Build a recipe from its keys, over the stage or file that ``extends`` names.

    What that sets and the recipe contradicts gives way: learning rates of parts that the recipe freezes, an LLM that
    it gives adapters, a number of frames or rows that does not fit the one that it names.

    Args:
        settings: recipe keys.
        defaults: keys between what is extended and ``settings``.

    Raises:
        ValueError: if a key is unknown or missing, or a value is out of range.
    """
    settings = {**(defaults or {}), **settings}
    own = {known.name for known in fields(Recipe)} - {"arguments"}
    theirs = {known.name for known in fields(TrainingArguments)} - own
    if taken := [key for key in settings if key in DECIDED]:
        raise ValueError(f"{taken[0]} cannot be set: rows, resuming and losses are the trainer's own; leave it out")
    check_keys(settings, sorted({*own, *theirs, "extends"}), what="recipe")
    settings = _over(_extended(settings), {key: value for key, value in settings.items() if key != "extends"})
    missing = [key for key in ("name", "model", "output_dir", "data") if settings.get(key) is None]
    if missing:
        raise ValueError(f"the recipe {settings.get('name', '')!r} lacks {', '.join(missing)}")
    arguments = {key: value for key, value in settings.items() if key in theirs}
    return Recipe(arguments=arguments, **{key: value for key, value in settings.items() if key in own})


def _extended(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of what a recipe extends, and of what that extends."""
    name = settings.get("extends")
    if name is None:
        return {"trainable": list(PARTS)}
    if str(name).endswith((".yaml", ".yml")):
        below = _read(Path(name))
        return _over(_extended(below), {key: value for key, value in below.items() if key != "extends"})
    stages = read_yaml(STAGES)
    check_keys([name], stages, what="extends")
    return {"name": name, **stages[name]}


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``own`` over ``base``, without what it contradicts there."""
    check_types(own, Recipe)
    result = {**base, **own}

    def give_way(key: str, value: Any) -> None:
        if key in base and key not in own:
            result[key] = value

    if own.get("lora") is not None:
        give_way("trainable", [part for part in result["trainable"] if part != "llm"])
    rates = result.get("part_learning_rates") or {}
    give_way("part_learning_rates", {part: rate for part, rate in rates.items() if part in result["trainable"]})
    if "max_frames" in own:
        give_way("min_frames", min(result.get("min_frames", 1), own["max_frames"]))
    if "min_frames" in own:
        give_way("max_frames", max(result.get("max_frames", 1), own["min_frames"]))
    if own.get("gradient_accumulation_steps") or own.get("max_tokens_per_batch"):
        give_way("global_batch_size", None)
    if own.get("max_tokens_per_batch"):
        give_way("max_length", min(result.get("max_length", math.inf), own["max_tokens_per_batch"]))
    if own.get("global_batch_size"):
        per_device = math.gcd(base.get("per_device_train_batch_size", 1), own["global_batch_size"])
        give_way("per_device_train_batch_size", per_device)
    return result


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Turn ``--key value`` and ``--key=value`` into recipe keys; values are YAML, a key alone means true.

    Raises:
        ValueError: if a word is not a flag.
    """
    overrides: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"expected a flag such as --learning_rate, got {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        overrides[key.replace("-", "_")] = parse_yaml(value, f"the value of --{key}")
    return overrides


def _read(path: Path) -> dict[str, Any]:
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold recipe keys, not {type(settings).__name__}")
    return _resolve(settings, path)


def _resolve(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    def is_file(key: str, value: Any) -> bool:
        named = key in ("data", "eval_data", "deepspeed") or (key == "extends" and str(value).endswith("ml"))
        return named and isinstance(value, str)

    return {key: str(_beside(path, value)) if is_file(key, value) else value for key, value in settings.items()}


def _beside(path: Path, name: str) -> Path:
    beside = path.parent / name
    return beside if beside.exists() else Path(name)
