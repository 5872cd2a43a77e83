"""What a recipe asks of other libraries, of this machine and of its checkpoint, checked before anything is loaded."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.logging import log_levels

from hico.adapters import folder_below
from hico.configuration_hico import HicoConfig
from hico.convert.plan import Expected, make_plan
from hico.convert.sources import Source, published_to_hico
from hico.data.fields import check_keys, check_types, nearest_hint
from hico.data.settings import frame_settings
from hico.data.spec import check_reader
from hico.data.survey import MODALITIES
from hico.shards import CheckpointError
from hico.train.config import Recipe
from hico.train.lora import lora_config
from hico.video_io import ReadSettings, read_video

_ELSEWHERE = (
    *("deepspeed", "fsdp", "fsdp_config", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("gradient_checkpointing", "activation_checkpointing"),
)
"""Arguments that depend on devices, which a dry run may not have, or that are renamed for newer transformers."""
_METRICS = [f"{prefix}loss{of}" for prefix in ("", "eval_") for of in ("", *(f"_{kind}" for kind in MODALITIES))]
_FRAMES = ("mode", "num_frames", "min_frames", "max_frames")
_UNLISTED = ("azure_ml", "flyte")
"""Trackers whose packages transformers does not look for, or not always."""


class _Planned(TrainingArguments):
    """Arguments that no device is looked for."""

    device = torch.device("cpu")


def check_recipe(recipe: Recipe) -> None:
    """Check what does not depend on data and checkpoint.

    Raises:
        ValueError: if a setting of another library is unknown, or settings contradict each other.
        ImportError: if a package that the recipe asks for is not installed.
        FileNotFoundError: if there is no such DeepSpeed file.
    """
    check_arguments(recipe)
    check_trackers(recipe)
    zero_stage(recipe)
    if recipe.lora is not None:
        lora_config(recipe.lora)
    check_words(recipe)
    check_output(Path(recipe.output_dir))
    check_video(recipe.video)
    for key in ("text_config", "encoder") if recipe.image_size else ("text_config",):
        if not isinstance(changes := recipe.model_config.get(key, {}), Mapping):
            raise ValueError(f"model_config sets {key} to {changes!r}; it must be a mapping of what changes")


def check_words(recipe: Recipe) -> None:
    """Raise ``ValueError`` at a word that transformers knows only when it is needed, and then stops at."""
    for key, asked, known in (
        ("attn_implementation", recipe.attn_implementation, ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]),
        ("metric_for_best_model", recipe.arguments.get("metric_for_best_model"), _METRICS),
        ("log_level", recipe.arguments.get("log_level"), [*log_levels, "passive"]),
    ):
        if asked is not None and asked not in known and "/" not in asked:  # with a slash it is a kernel of the hub
            raise ValueError(f"{key} is {asked!r}{nearest_hint(asked, known)}")


def check_output(folder: Path) -> None:
    """Raise ``ValueError`` if a folder is not there and cannot be made, or cannot be written to."""
    there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is not a folder"
        raise ValueError(f"output_dir is {folder}, but {there} {what}; name another")


def check_video(settings: Mapping[str, Any]) -> None:
    """Check settings of `hico.video_io.read_video` that a recipe gives beside those of its own.

    Raises:
        ValueError: if one is unknown, of another type, or the recipe's own.
        ImportError: if the reader is not installed.
    """
    check_keys(settings, [known.name for known in fields(ReadSettings)], what="video")
    check_types(settings, ReadSettings)
    if taken := [key for key in _FRAMES if key in settings]:
        raise ValueError(
            f"video sets {taken[0]!r}; set frame_sampling, min_frames and max_frames of the recipe instead"
        )
    check_reader(settings.get("reader", "pyav"))


def check_frames(recipe: Recipe, clip_len: int) -> None:
    """Raise ``ValueError`` if the settings for frames contradict each other or are unknown."""
    if recipe.frame_sampling in ("dual", "dynamic_fps1"):
        for key in ("min_frames", "max_frames"):
            frames = getattr(recipe, key)
            if frames % clip_len:
                raise ValueError(
                    f"{key} {frames} does not split into clips of {clip_len} frames; "
                    f"use {max(clip_len, frames - frames % clip_len)} or {frames + -frames % clip_len}"
                )
    for key in ("size", "clip_len", "generator", "start", "end"):
        if key in recipe.video:
            raise ValueError(f"video sets {key!r}, which the model, the seed or the rows decide; leave it out")
    # Reading a folder of small pictures meets every rule of sampling and reading.
    frames = np.zeros((8, 8, 8, 3), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(Path(folder) / f"{number}.png")
        try:
            read_video(folder, clip_len=clip_len, **{**frame_settings(recipe), **recipe.video})
        except TypeError as error:
            raise ValueError(f"video: {error}") from error


def check_arguments(recipe: Recipe) -> None:
    """Let transformers check its arguments against each other, its optimizer and its schedule.

    Raises:
        ValueError: if they contradict each other, or one is unknown.
        ImportError: if the optimizer's package is not installed.
    """
    settings = {key: value for key, value in recipe.trainer_settings().items() if key not in _ELSEWHERE}
    try:
        args = _Planned(output_dir=recipe.output_dir, **{**settings, "use_cpu": True})
        if args.load_best_model_at_end and args.save_strategy == "steps" and args.eval_steps != args.save_steps:
            raise ValueError(
                f"load_best_model_at_end with eval_steps {args.eval_steps:g} and save_steps {args.save_steps:g}: the "
                "best may not be saved; give both one value, or set save_strategy: best"
            )
        Trainer.get_optimizer_cls_and_kwargs(args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_scheduler(
                args.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1, requires_grad=True)]),
                num_warmup_steps=0,
                num_training_steps=1,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
    except TypeError as error:
        raise ValueError(f"an argument of transformers cannot be used: {error}") from error


def check_trackers(recipe: Recipe) -> None:
    """Check that what logs go to is known and installed.

    Raises:
        ValueError: if it is not known.
        ImportError: if it is not installed.
    """
    asked = recipe.arguments.get("report_to", "none")
    if asked is None:
        raise ValueError("report_to is null; write report_to: none, or tensorboard or wandb")
    for name in [asked] if isinstance(asked, str) else asked:
        if name in ("none", "all"):
            continue
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ValueError(f"report_to: {error}") from error
        if name not in (*get_available_reporting_integrations(), *_UNLISTED):
            raise ImportError(f"report_to: {name} needs a package that is not installed; run `pip install {name}`")


def check_weights(folder: Path, config: HicoConfig) -> None:
    """Hold the names and sizes of a checkpoint's tensors against a configuration, without reading the tensors.

    Args:
        folder: a checkpoint of ours, a published one, or what a stage with ``lora`` made, which names the one below.
        config: what is to be built of it.

    Raises:
        ValueError: if tensors are missing, left over, damaged or of other sizes.
        FileNotFoundError: if the checkpoint below is gone.
    """
    while (below := folder_below(folder)) is not None:
        folder = below
    source = Source.at(folder)
    rename = published_to_hico(source.kind) if source.is_published else lambda name: name
    expected = Expected.of(config)
    try:
        make_plan(source.shards(rename), expected)
    except CheckpointError as error:
        raise ValueError(
            f"the weights in {folder} are of other sizes or names than its configuration with the recipe's changes "
            f"(image_size, model_config) asks for: {error}"
        ) from error


def zero_stage(recipe: Recipe) -> int | None:
    """Return the ZeRO stage of the recipe's DeepSpeed file, if there is one.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not one of DeepSpeed.
    """
    spec = recipe.arguments.get("deepspeed")
    if spec is None:
        return None
    settings = _read_json(Path(spec)) if isinstance(spec, str) else spec
    zero = settings.get("zero_optimization", {}) if isinstance(settings, Mapping) else None
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed: {spec} sets no zero_optimization with a stage of 0 to 3; see train/deepspeed/")
    return stage


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no DeepSpeed file {path}; set deepspeed: null to go without")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the DeepSpeed file {path} is not JSON: {error}") from error
