"""The arguments of transformers that a recipe makes, and what follows from them."""

import json
import os
import warnings
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from hico.train.config import Recipe

_ON_DEVICES = (
    *("deepspeed", "fsdp", "fsdp_config", "tf32"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
)
"""Arguments that start something on devices, which a dry run may not have."""


@dataclass
class StageArguments(TrainingArguments):
    """Arguments that carry the recipe along: trackers log every field of theirs."""

    recipe: dict[str, Any] = field(default_factory=dict)


class _Planned(TrainingArguments):
    """Arguments that no device is looked for."""

    device = torch.device("cpu")


def training_arguments(recipe: Recipe) -> StageArguments:
    """Turn a recipe into the arguments of transformers; joins the other processes, if a launcher started several.

    Raises:
        ValueError: if they contradict each other, or this machine lacks what they need.
    """
    settings = recipe.trainer_settings()
    settings["gradient_accumulation_steps"] = recipe.gradient_accumulation(int(os.environ.get("WORLD_SIZE", 1)))
    if "activation_checkpointing" in {known.name for known in fields(TrainingArguments)}:
        # Newer transformers warn at the old name; drop this when only they are supported.
        settings["activation_checkpointing"] = settings.pop("gradient_checkpointing", None)
    if settings.get("deepspeed") and "RANK" not in os.environ:
        # DeepSpeed takes a process that no launcher started for one of MPI's, and asks for mpi4py.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ |= {**alone, **os.environ}
    args = StageArguments(
        output_dir=recipe.output_dir,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        recipe={key: value for key, value in {**vars(recipe), **recipe.arguments}.items() if key != "arguments"},
        **settings,
    )
    if args.deepspeed and args.device.type == "cpu" and args.world_size > 1:
        # On CPUs accelerate 1.15 starts torch's process group but not DeepSpeed's, which ZeRO-3 needs for loading.
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    return args


def planned_arguments(recipe: Recipe, *, here: bool = False) -> TrainingArguments:
    """Return the arguments of transformers, as on a machine that has what they need, or as on this one.

    Raises:
        ValueError: if they contradict each other, or this machine lacks what they need.
    """
    settings = {key: value for key, value in recipe.trainer_settings().items() if key not in _ON_DEVICES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _Planned(output_dir=recipe.output_dir, **(settings if here else {**settings, "use_cpu": True}))


def has_rate(args: TrainingArguments, num_steps: int) -> bool:
    """Say whether the schedule gives any of so many steps a learning rate above 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
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


def zero_stage(recipe: Recipe) -> int | None:
    """Return the ZeRO stage of the recipe's DeepSpeed file, if there is one.

    Raises:
        FileNotFoundError: if the file is missing.
        ImportError: if DeepSpeed is not installed.
    """
    spec = recipe.arguments.get("deepspeed")
    if spec is None:
        return None
    if isinstance(spec, str) and not Path(spec).is_file():
        raise FileNotFoundError(f"there is no DeepSpeed file {spec}; set deepspeed: null to go without")
    if find_spec("deepspeed") is None:
        raise ImportError("deepspeed needs the package of that name; run `pip install 'hico[deepspeed]'`")
    settings = json.loads(Path(spec).read_text()) if isinstance(spec, str) else spec
    return settings["zero_optimization"]["stage"]
