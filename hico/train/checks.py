"""What a recipe asks of other libraries, of this machine and of its checkpoint, checked before anything is loaded."""

import json
import warnings
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from hico.adapters import folder_below
from hico.configuration_hico import HicoConfig
from hico.convert.plan import Expected, make_plan
from hico.convert.sources import Source, published_to_hico
from hico.data.fields import check_keys, check_types
from hico.data.settings import frame_settings
from hico.data.spec import check_reader
from hico.sampling import sample_frames
from hico.shards import CheckpointError
from hico.train.config import Recipe
from hico.train.lora import lora_config
from hico.video_io import ReadSettings

_ON_DEVICES = (
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "tf32",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
)
"""Arguments that start something on devices, which a dry run may not have."""
_DECIDED = ("mode", "num_frames", "min_frames", "max_frames", "size", "clip_len", "generator", "start", "end")
"""Settings of videos that the recipe's own keys, the model, the seed or the rows decide."""


class _Planned(TrainingArguments):
    """Arguments that no device is looked for."""

    device = torch.device("cpu")


def check_recipe(recipe: Recipe, *, here: bool = False) -> None:
    """Check what does not depend on data and checkpoint.

    Args:
        recipe: of the stage.
        here: whether this machine must have what the recipe needs.

    Raises:
        ValueError: if a setting of another library is unknown, or settings contradict each other.
        ImportError: if a package that the recipe asks for is not installed.
        FileNotFoundError: if there is no such DeepSpeed file.
    """
    args = planned_arguments(recipe, here=here)
    if args.load_best_model_at_end and args.save_strategy == "steps" and args.eval_steps != args.save_steps:
        raise ValueError(
            f"load_best_model_at_end with eval_steps {args.eval_steps:g} and save_steps {args.save_steps:g}: the "
            "best may not be saved; give both one value, or set save_strategy: best"
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
        has_rate(args, 1)
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except TypeError as error:
        raise ValueError(f"an argument of transformers cannot be used: {error}") from error
    except RuntimeError as error:
        raise ImportError(f"report_to {', '.join(args.report_to)}: {error}") from error
    zero_stage(recipe)
    if recipe.lora is not None:
        lora_config(recipe.lora)


def planned_arguments(recipe: Recipe, *, here: bool = False) -> TrainingArguments:
    """Return the arguments of transformers, as on a machine that has what they need, or on this one.

    Raises:
        ValueError: if they contradict each other, one is unknown, or this machine lacks what they need.
    """
    settings = {key: value for key, value in recipe.trainer_settings().items() if key not in _ON_DEVICES}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return _Planned(output_dir=recipe.output_dir, **(settings if here else {**settings, "use_cpu": True}))
    except TypeError as error:
        raise ValueError(f"an argument of transformers cannot be used: {error}") from error


def has_rate(args: TrainingArguments, num_steps: int) -> bool:
    """Say whether the schedule gives any of so many steps a learning rate above 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=max(args.learning_rate, 1e-12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        for _ in range(num_steps):
            if optimizer.param_groups[0]["lr"] > 0:
                return True
            schedule.step()
    return False


def check_frames(recipe: Recipe) -> None:
    """Check how frames are chosen and read.

    Raises:
        ValueError: if a setting is unknown, of another type, or decided elsewhere.
        ImportError: if the reader of videos is not installed.
    """
    check_keys(recipe.video, [known.name for known in fields(ReadSettings)], what="video")
    check_types(recipe.video, ReadSettings)
    if taken := [key for key in _DECIDED if key in recipe.video]:
        raise ValueError(
            f"video sets {taken[0]!r}; set frame_sampling, min_frames and max_frames of the recipe instead, and leave "
            "the rest to the model, the seed and the rows"
        )
    check_reader(recipe.video.get("reader", "pyav"))
    sample_frames(100, 25.0, **frame_settings(recipe), generator=torch.Generator())


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
        ImportError: if DeepSpeed is not installed.
    """
    spec = recipe.arguments.get("deepspeed")
    if spec is None:
        return None
    if isinstance(spec, str) and not Path(spec).is_file():
        raise FileNotFoundError(f"there is no DeepSpeed file {spec}; set deepspeed: null to go without")
    try:
        settings = json.loads(Path(spec).read_text()) if isinstance(spec, str) else spec
        stage = settings["zero_optimization"]["stage"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"deepspeed: {spec} sets no zero_optimization with a stage: {error!r}") from error
    if find_spec("deepspeed") is None:
        raise ImportError("deepspeed needs the package of that name; run `pip install 'hico[deepspeed]'`")
    return stage
