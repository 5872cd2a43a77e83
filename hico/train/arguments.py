"""The arguments of transformers that a recipe makes."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hico.train.config import Recipe


@dataclass
class StageArguments(TrainingArguments):
    """Arguments that carry the recipe along: trackers log every field of theirs."""

    recipe: dict[str, Any] = field(default_factory=dict)

    def count_steps(self, num_steps: int) -> None:
        """Turn shares of all steps into numbers of steps, which a restart compares with those of its checkpoint."""
        for key in ("logging_steps", "eval_steps", "save_steps"):
            if 0 < (getattr(self, key) or 0) < 1:
                setattr(self, key, math.ceil(num_steps * getattr(self, key)))


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
