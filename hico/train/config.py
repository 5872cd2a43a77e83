"""Recipes: what a stage trains, on what, and how. YAML files extend the presets of `hico.train.stages`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hico.data.fields import check_keys, check_ranges, check_types, nearest_hint
from hico.data.settings import RowSettings
from hico.data.yaml_files import parse_yaml, read_yaml
from hico.train.stages import STAGES

PARTS = ("encoder", "compressor", "projector", "llm")
"""What can be trained, frozen, or given a learning rate of its own."""
RANGES = {
    "at least 1": (
        *("max_length", "image_size", "global_batch_size", "max_tokens_per_batch", "gradient_accumulation_steps"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit"),
    ),
    "above 0": ("decode_timeout", "peak_tflops", "num_train_epochs", "save_steps", "logging_steps", "eval_steps"),
    "0 or above": (
        *("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "neftune_noise_alpha", "seed"),
        "dataloader_num_workers",
    ),
    "from 0 to 1": ("max_bad_fraction",),
}
"""How a range is called in `hico.data.fields` -> the keys of recipes that must lie in it."""
DECIDED = {
    "remove_unused_columns": "a row keeps what the model takes",
    "resume_from_checkpoint": "a run goes on after its last checkpoint by itself",
    "ignore_data_skip": "a run goes on with the next row by itself",
    "save_only_model": "a run goes on with its optimizer",
    "auto_find_batch_size": "the order of rows follows from the batch size",
    "train_sampling_strategy": "group_by_length orders the rows",
    "logging_nan_inf_filter": "losses are logged as they are",
    "label_smoothing_factor": "every learned token weighs the same",
    "average_tokens_across_devices": "every learned token weighs the same",
    "dataloader_drop_last": "every row is seen",
    "data_seed": "the order of rows follows from seed",
}
"""Arguments of transformers that are no recipe keys -> why."""


@dataclass(kw_only=True)
class Recipe(RowSettings):
    """One stage of training.

    Every other key of a recipe file is a field of `transformers.TrainingArguments` and is kept in ``arguments``.
    """

    name: str
    """How the stage is called in logs and folders."""
    model: str
    """Folder of the checkpoint to start from; in a chain only the first stage needs one."""
    output_dir: str
    """Where checkpoints and logs go; the result is its subfolder ``final``."""
    data: str | list
    """Mixture file, or the list of its datasets."""
    eval_data: str | list | None = None
    """Mixture held out for evaluation."""
    eval_fraction: float = 0.0
    """Share of the training rows to hold out instead, in [0, 1)."""
    sampling_strategy: str = "all"
    """Rows to take of every dataset, after the dataset's own strategy."""
    objective: str = "answers"
    """What is learned: ``answers``; or ``tracks``, the encoder alone on what moves, see `hico.tiny.tracks`."""
    trainable: list[str] = field(default_factory=lambda: list(PARTS))
    """Parts that learn; the others are frozen."""
    part_learning_rates: dict[str, float] = field(default_factory=dict)
    """Part -> learning rate, where it differs from ``learning_rate``."""
    image_size: int | None = None
    """Pixels per side that the encoder sees; the checkpoint's if omitted."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """Further changes to the checkpoint's configuration, nested as there."""
    attn_implementation: str | None = None
    """Attention of the LLM, as transformers names it (``sdpa``, ``flash_attention_2``); its default if omitted."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all devices; sets the gradient accumulation."""
    group_by_length: bool = False
    """Put rows of one modality and similar length into a batch."""
    max_tokens_per_batch: int | None = None
    """Token budget of a batch on one device, instead of ``per_device_train_batch_size`` rows."""
    packing: bool = False
    """Concatenate the rows of a batch into one sequence, without attention across them."""
    max_bad_fraction: float = 0.01
    """Share of skipped rows that stops the run."""
    check_files: bool = True
    """Look for every file of the mixture before the first step."""
    drop_schedule: str | list | dict | None = None
    """Progressive visual dropout in the LLM (``uniform@4:0.75,attention@18:0.25``); the checkpoint's if omitted."""
    lora: dict | None = None
    """Adapters on the LLM: keywords of `peft.LoraConfig`."""
    peak_tflops: float | None = None
    """Dense bf16 peak of one device, for the model FLOPs utilisation; known GPUs need none."""
    arguments: dict = field(default_factory=dict)
    """Keywords of `transformers.TrainingArguments`."""

    def __post_init__(self):
        check_types(vars(self), Recipe)
        check_types(self.arguments, TrainingArguments)
        check_ranges({**vars(self), **self.arguments}, RANGES)
        check_ranges(self.part_learning_rates, {"0 or above": self.part_learning_rates})
        for key, parts in (("trainable", self.trainable), ("part_learning_rates", self.part_learning_rates)):
            for part in parts:
                if part not in PARTS:
                    raise ValueError(f"{key} names {part!r}{nearest_hint(part, PARTS)}")
        if self.objective == "tracks" and self.trainable != ["encoder"]:
            raise ValueError(
                f"objective 'tracks' trains the encoder alone; set trainable: [encoder], not {self.trainable}"
            )
        if self.objective == "tracks" and self.evaluates:
            raise ValueError("objective 'tracks' has no evaluation; leave out eval_fraction and eval_data")
        if frozen := set(self.part_learning_rates) - set(self.trainable):
            raise ValueError(f"part_learning_rates names {sorted(frozen)}, which `trainable` freezes")
        if self.lora is not None and "llm" in self.trainable:
            raise ValueError("lora trains adapters in place of the LLM; take 'llm' out of `trainable`")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames {self.min_frames} and max_frames {self.max_frames} contradict each other; "
                "use 1 <= min_frames <= max_frames"
            )
        choices = {
            "on_bad_sample": ("raise", "skip"),
            "on_long_sample": ("cut", "bad"),
            "time_message": ("short", "long", None),
        }
        choices["objective"] = ("answers", "tracks")
        choices["label_scheme"] = ("assistant", "published", "longva")
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}; use one of {allowed}")
        if not 0 <= self.eval_fraction < 1 or (self.eval_fraction and self.eval_data):
            raise ValueError(f"eval_fraction is {self.eval_fraction}; use [0, 1), and 0 beside eval_data")
        for key, idle in (("eval_strategy", "no"), ("load_best_model_at_end", False)):
            if self.arguments.get(key, idle) != idle and not self.evaluates:
                raise ValueError(
                    f"{key} is {self.arguments[key]!r}, but nothing is held out; set eval_fraction or eval_data"
                )
        if self.packing and self.max_tokens_per_batch is None:
            raise ValueError("packing fills sequences up to a token budget; set max_tokens_per_batch")
        if self.packing and self.drop_schedule not in (None, "none"):
            raise ValueError("packing cannot be combined with drop_schedule: dropped tokens move the rows' borders")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < self.max_length:
            raise ValueError(
                f"max_tokens_per_batch {self.max_tokens_per_batch} is below max_length {self.max_length}; "
                "a batch must hold the longest row"
            )
        if self.max_tokens_per_batch is not None and self.global_batch_size is not None:
            raise ValueError(
                "global_batch_size counts rows, max_tokens_per_batch varies them; "
                "set `global_batch_size: null` and gradient_accumulation_steps"
            )

    def gradient_accumulation(self, world_size: int) -> int:
        """Return the micro-batches per optimizer step on ``world_size`` devices.

        Raises:
            ValueError: if the global batch does not divide.
        """
        asked = self.arguments.get("gradient_accumulation_steps")
        if self.global_batch_size is None:
            return asked or 1
        per_step = self.rows_per_device * world_size
        steps, rest = divmod(self.global_batch_size, per_step)
        if rest or not steps or (asked is not None and asked != steps):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not per_device_train_batch_size "
                f"{self.rows_per_device} x {world_size} devices x gradient_accumulation_steps {asked or 'n'}; "
                "change one of them (global_batch_size: null leaves the product to the others)"
            )
        return steps

    def trainer_settings(self) -> dict[str, Any]:
        """Return the keywords of `transformers.TrainingArguments`, with our defaults where they differ."""
        defaults = {"eval_strategy": "epoch" if self.evaluates else "no"}
        return {**defaults, **self.arguments}

    @property
    def evaluates(self) -> bool:
        """Whether rows are held out."""
        return self.eval_data is not None or self.eval_fraction > 0

    @property
    def rows_per_device(self) -> int:
        """Rows of a micro-batch on one device."""
        return self.arguments.get("per_device_train_batch_size", 8)


def load_recipes(path: str | Path, overrides: Mapping[str, Any] | None = None) -> list[Recipe]:
    """Read a recipe file.

    Files that a recipe names (``data``, ``eval_data``, ``deepspeed``, ``stages``) are looked for beside it, then from
    the working directory. ``${NAME}`` in any text is taken from the environment.

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
    check_types({key: value for key, value in chain.items() if value is not None}, Recipe)
    if chain["output_dir"] is None:
        raise ValueError(f"{path}: a chain needs an output_dir for the folders of its stages")
    stages = settings.pop("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError(f"{path}: stages is {stages!r}; list recipe files or mappings")
    recipes: list[Recipe] = []
    for number, stage in enumerate(stages, 1):
        if isinstance(stage, str):
            own = {"name": Path(stage).stem, **_read(_beside(Path(path), stage))}
        elif isinstance(stage, Mapping):
            own = {"name": stage.get("extends", f"stage{number}"), **_resolve(stage, Path(path))}
        else:
            raise ValueError(f"{path}: stage {number} is {stage!r}; it must be a recipe file or a mapping")
        check_types({"name": own["name"]}, Recipe)
        own["output_dir"] = str(Path(chain["output_dir"]) / own["name"])
        own["model"] = str(Path(recipes[-1].output_dir) / "final") if recipes else chain["model"] or own.get("model")
        recipes.append(make_recipe({**own, **overrides}, defaults=settings))
        if recipes[-1].name in [recipe.name for recipe in recipes[:-1]]:
            raise ValueError(f"{path}: two stages are called {recipes[-1].name!r}; set `name` in one of them")
    return recipes


def make_recipe(settings: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> Recipe:
    """Build a recipe from its keys, over the preset that ``extends`` names.

    Args:
        settings: recipe keys.
        defaults: keys between the preset and ``settings``.

    Raises:
        ValueError: if a key is unknown or missing, or a value is out of range.
    """
    settings = {**(defaults or {}), **settings}
    preset = settings.pop("extends", None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in STAGES:
            raise ValueError(f"extends names {preset!r}{nearest_hint(preset, STAGES)}")
        settings = {"name": preset, **STAGES[preset], **settings}
    own = {known.name for known in fields(Recipe)} - {"arguments"}
    theirs = {known.name for known in fields(TrainingArguments)} - own
    if "stages" in settings:
        raise ValueError("stages cannot be set here: they belong in the file of --config, which lists plain stages")
    if taken := [key for key in settings if key in DECIDED]:
        raise ValueError(f"{taken[0]} cannot be set: {DECIDED[taken[0]]}; leave it out")
    check_keys(settings, sorted({*own, *theirs, "extends"}), what="recipe")
    missing = [key for key in ("name", "model", "output_dir", "data") if settings.get(key) is None]
    if missing:
        raise ValueError(f"the recipe {settings.get('name', '')!r} lacks {', '.join(missing)}")
    arguments = {key: value for key, value in settings.items() if key in theirs}
    return Recipe(arguments=arguments, **{key: value for key, value in settings.items() if key in own})


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
    named = ("data", "eval_data", "deepspeed")
    return {
        key: str(_beside(path, value)) if key in named and isinstance(value, str) else value
        for key, value in settings.items()
    }


def _beside(path: Path, name: str) -> Path:
    beside = path.parent / name
    return beside if beside.exists() else Path(name)
