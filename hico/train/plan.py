"""What a stage needs beside the values of weights: configuration, processor, data and their order, all checked."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from hico.adapters import folder_below
from hico.configuration_hico import HicoConfig
from hico.convert.plan import Expected, make_plan
from hico.convert.sources import HICO, Source, published_to_hico
from hico.data.batching import BatchRule, BatchSampler
from hico.data.fields import nearest_hint
from hico.data.labels import Labels
from hico.data.lengths import estimate_lengths, measure_lengths
from hico.data.mixture import Mixture, read_mixture
from hico.data.settings import frame_settings, own_fit
from hico.data.spec import check_reader
from hico.llm_dropout.schedule import DropSchedule
from hico.parallel import check_config, split_size
from hico.processing_hico import HicoProcessor
from hico.sampling import sample_frames
from hico.shards import CheckpointError
from hico.train.arguments import has_rate, planned_arguments
from hico.train.config import Recipe
from hico.video_io import ReadSettings

_DECIDED = ("mode", "num_frames", "min_frames", "max_frames", "size", "clip_len", "generator", "start", "end")
"""Settings of videos that the recipe's own keys, the model, the seed or the rows decide."""


@dataclass
class Prepared:
    """What a stage needs beside weights, checked."""

    recipe: Recipe
    config: HicoConfig
    processor: HicoProcessor
    schedule: DropSchedule
    mixture: Mixture
    rows: np.ndarray
    lengths: np.ndarray
    eval_mixture: Mixture | None = None
    eval_rows: np.ndarray | None = None
    eval_lengths: np.ndarray | None = None

    def sampler(self, *, rank: int = 0, world_size: int = 1) -> BatchSampler:
        """Return the training batches of a device."""
        order = {"seed": self.recipe.seed, "rank": rank, "world_size": world_size}
        return self._sampler(self.mixture, self.rows, self.lengths, self.recipe.rows_per_device, **order)

    def eval_sampler(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> BatchSampler:
        """Return a device's share of the held-out rows, in their order."""
        order = {"seed": None, "rank": rank, "world_size": world_size}
        return self._sampler(self.eval_mixture, self.eval_rows, self.eval_lengths, batch_size, **order)

    def _sampler(
        self, mixture: Mixture, rows: np.ndarray, lengths: np.ndarray, batch_size: int, **order: Any
    ) -> BatchSampler:
        recipe, vision = self.recipe, self.config.vision
        needed = self.needed(order["world_size"] * recipe.sequence_parallel)
        rule = BatchRule(batch_size, recipe.max_tokens_per_batch, recipe.packing, recipe.group_by_length)
        if recipe.max_tokens_per_batch and needed != "rows":
            blanks = vision.num_image_tokens(), vision.num_video_tokens(vision.clip_len)
            answers = 2 if mixture.preferences else 1
            rule = replace(rule, needed=needed, blank_tokens=tuple(answers * tokens for tokens in blanks))
        return BatchSampler(rule, rows, lengths=lengths[rows], modality=mixture.modality[rows], **order)

    def needed(self, world_size: int) -> str:
        """Return what every batch must have, see `hico.data.collator.Collator`.

        Devices gather sharded weights together, so all must run the encoder equally often. Where the LLM is frozen,
        text alone has nothing to learn from, and its loss no gradient.
        """
        is_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true" or self.recipe.arguments.get("fsdp")
        is_sharded = is_fsdp or is_deepspeed_zero3_enabled()
        if world_size > 1:
            return "both" if is_sharded else "pixels"
        return "rows" if "llm" in self.recipe.trainable or self.recipe.lora is not None else "pixels"

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: what the recipe asks for, or else the dtype of the starting checkpoint."""
        dtype = self.recipe.dtype or self.config.dtype or torch.float32
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def steps(self, world_size: int) -> tuple[int, int]:
        """Return the optimizer steps of an epoch, and of the stage.

        Raises:
            ValueError: if the global batch does not divide.
        """
        accumulation = self.recipe.gradient_accumulation(world_size)
        per_epoch = max(1, -(-len(self.sampler(world_size=self.recipe.num_groups(world_size))) // accumulation))
        arguments = self.recipe.arguments
        if arguments.get("max_steps", -1) > 0:
            return per_epoch, arguments["max_steps"]
        return per_epoch, math.ceil(per_epoch * arguments.get("num_train_epochs", 3))

    def check_learning(self, world_size: int) -> None:
        """Raise ``ValueError`` if the stage would leave all weights as they are."""
        recipe, args = self.recipe, planned_arguments(self.recipe)
        _, steps = self.steps(world_size)
        rates = [recipe.part_learning_rates.get(part, args.learning_rate) for part in recipe.trainable]
        rates += [args.learning_rate] * (recipe.lora is not None)
        if not any(rates) or not has_rate(args, steps):
            raise ValueError(
                f"stage {recipe.name} would learn nothing: its {len(self.rows)} rows make {steps} step(s), all with "
                f"learning rate 0 (warmup_steps {args.warmup_steps:g}); use smaller batches (global_batch_size "
                f"{recipe.global_batch_size}), more epochs, warmup_steps: 0 or another learning_rate"
            )
        has_visuals = self.mixture.num_videos.any() or self.mixture.num_images.any()
        if not has_visuals and "llm" not in recipe.trainable and recipe.lora is None:
            raise ValueError(
                f"stage {recipe.name} would learn nothing: its rows are text alone, and trainable is "
                f"{recipe.trainable}; add llm, lora, or rows with videos or images"
            )


def prepare(
    recipe: Recipe, *, start: HicoConfig | None = None, is_first: bool = True, world_size: int | None = None
) -> Prepared:
    """Read and check everything but the values of the weights.

    Args:
        recipe: of the stage.
        start: configuration that stages before this one will have made of ``recipe.model``, if they have not run yet.
        is_first: whether this is the first of several processes; it alone looks for the files.
        world_size: devices to train on; those that a launcher says there are if omitted.

    Raises:
        ValueError, FileNotFoundError: for what is wrong with recipe, data or checkpoint.
    """
    if recipe.objective == "text":
        from hico.train.text import prepare_text

        check_sharing(recipe, load_config(recipe, start)[0].get_text_config())
        return prepare_text(recipe, start=start)
    check_frames(recipe)
    config, processor = load_config(recipe, start)
    Labels(processor, recipe.label_scheme)  # the template and the tokenizer must be such that they can be learned from
    if not is_deepspeed_zero3_enabled():  # it would shard the model that is only asked for its sizes
        check_weights(Path(recipe.model), config)
    schedule = read_schedule(recipe, config)
    check_sharing(recipe, config.text_config)
    options = {"seed": recipe.seed, "check_files": recipe.check_files and is_first}
    options |= {"on_bad_sample": recipe.on_bad_sample, "preferences": recipe.objective == "preference"}
    mixture = read_mixture(recipe.data, sampling_strategy=recipe.sampling_strategy, **options)
    if mixture.num_videos.any():
        # What is asked of the trained model later sees as many frames, chosen without chance.
        frames = {**own_fit(processor), **frame_settings(recipe)}
        processor.video = {**frames, "mode": frames["mode"].replace("rand", "middle"), **recipe.video}
    # A budget of tokens needs lengths that are never exceeded; otherwise rows are only put beside similar ones.
    lengths_of = estimate_lengths if recipe.max_tokens_per_batch is None else measure_lengths
    lengths = lengths_of(mixture, processor, recipe)
    found = Prepared(recipe, config, processor, schedule, mixture, np.arange(len(mixture)), lengths)
    if recipe.eval_data is not None:
        found.eval_mixture = read_mixture(recipe.eval_data, **options)
        found.eval_rows = np.arange(len(found.eval_mixture))
        found.eval_lengths = lengths_of(found.eval_mixture, processor, recipe)
    elif recipe.eval_fraction:
        found.rows, found.eval_rows = mixture.split(recipe.eval_fraction)
        found.eval_mixture, found.eval_lengths = mixture, lengths
    found.check_learning(world_size or int(os.environ.get("WORLD_SIZE", 1)))
    return found


def check_sharing(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Check that several processes can share the rows of an LLM of this configuration.

    Raises:
        ValueError: if it has other layers, Ulysses cannot divide its heads, or a setting would do nothing.
    """
    if recipe.sequence_parallel == 1:
        if recipe.ulysses_size is not None:
            raise ValueError("ulysses_size divides the processes that share a row; set sequence_parallel too")
        return
    if recipe.objective != "text" and is_deepspeed_zero3_enabled():
        raise ValueError(
            "sequence_parallel cannot be combined with ZeRO-3 but for objective: text; devices gather weights "
            "together, and were seen to wait for each other for ever; use ZeRO-2 or FSDP2"
        )
    check_config(config)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    ring_size, _ = split_size(recipe.sequence_parallel, heads, recipe.ulysses_size)
    if ring_size > 1 and recipe.attn_implementation not in (None, "sdpa"):
        raise ValueError(
            f"attn_implementation {recipe.attn_implementation!r} would do nothing: a ring of {ring_size} processes "
            "computes attention block by block itself; leave it out"
        )


def check_frames(recipe: Recipe) -> None:
    """Check how frames are chosen and read.

    Raises:
        ValueError: if a setting is unknown, of another type, or decided elsewhere.
        ImportError: if the reader of videos is not installed.
    """
    try:
        ReadSettings.of(recipe.video)
    except TypeError as error:
        raise ValueError(f"video: {error}") from error
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


def load_config(recipe: Recipe, start: HicoConfig | None = None) -> tuple[HicoConfig, HicoProcessor]:
    """Read configuration and processor of the starting checkpoint, with the recipe's changes; see `prepare`.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be read, or ``model_config`` does not describe a model.
    """
    if recipe.objective == "text":
        from hico.train.text import load_text_config

        return load_text_config(recipe, start)
    folder = Path(recipe.model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"stage {recipe.name!r} starts from {folder}, which does not exist or holds no config.json; finish the "
            "stage before, or name another checkpoint with --model"
        )
    source = Source.at(folder)
    if source.kind != HICO and not source.is_published:
        raise ValueError(
            f"stage {recipe.name!r} starts from {folder}, which holds {source.config.get('model_type')} and not a "
            f"whole model; make one with `hico convert {folder} OUTPUT --encoder FILE`"
        )
    config, processor = start or HicoConfig.from_pretrained(folder), HicoProcessor.from_pretrained(folder)
    # Of the two sizes that a recipe can give, the one in model_config has the last word.
    size = {} if recipe.image_size is None else {"encoder": {"image_size": recipe.image_size}}
    try:
        changes = _merged(size, recipe.model_config)
        for name, known, given in (
            ("model_config", config, changes),
            ("model_config.text_config", config.text_config, changes.get("text_config", {})),
        ):
            for key in given:
                if not hasattr(known, key):
                    raise ValueError(f"{name} sets {key!r}{nearest_hint(key, known.to_dict())}")
        config = HicoConfig.from_dict(_merged(config.to_dict(), changes))
    except TypeError as error:
        raise ValueError(f"model_config {recipe.model_config} does not describe a model: {error}") from error
    if recipe.drop_schedule is not None:
        schedule = read_schedule(recipe, config)
        config.drop_schedule = str(schedule) if schedule else None
        config.drop_options = recipe.model_config.get("drop_options")
    processor.vision, processor.time_message = config.vision, recipe.time_message
    return config, processor


def read_schedule(recipe: Recipe, config: HicoConfig) -> DropSchedule:
    """Read the recipe's drop schedule, or else the checkpoint's; ``none`` switches the latter off.

    A mapping of ``llm_compress_type``, ``llm_compress_layer_list`` and ``llm_image_token_ratio_list`` is the
    published form.

    Raises:
        ValueError: if it cannot be read, names a layer that the LLM does not have, or rows are packed.
    """
    spec = config.drop_schedule if recipe.drop_schedule is None else recipe.drop_schedule
    schedule = DropSchedule.from_published(**spec) if isinstance(spec, Mapping) else DropSchedule.parse(spec)
    schedule.check_depth(config.text_config.num_hidden_layers)
    if schedule and recipe.packing:
        raise ValueError(
            f"packing cannot be combined with the checkpoint's drop schedule {schedule}: dropped tokens move the "
            "rows' borders; set drop_schedule: none"
        )
    return schedule


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes``, mappings merged key by key.

    An encoder or compressor of another ``name`` is not merged but takes the place of the one before; its name alone
    may stand for it.
    """
    result = dict(base)
    for key, value in changes.items():
        below = {"name": result[key]} if isinstance(result.get(key), str) else result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            name = below.get("name")
            if name is None or value.get("name", name) == name:
                value = _merged(below, value)
        result[key] = value
    return result
