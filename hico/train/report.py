"""What a recipe would do: the report of ``--dry_run``."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from hico.modeling_hico import HicoForConditionalGeneration
from hico.train.arguments import zero_stage
from hico.train.config import Recipe
from hico.train.lora import add_lora
from hico.train.parts import count_parameters, freeze
from hico.train.plan import Prepared


def dry_run(recipe: Recipe, prepared: Prepared, *, world_size: int) -> str:
    """Describe a stage without weights, devices or a single step.

    Args:
        recipe: of the stage.
        prepared: its checked data and configuration.
        world_size: devices to plan for.

    Returns:
        Text: resolution, parameters and learning rates of parts, rows per dataset, tokens per step, steps, memory.

    Raises:
        ValueError: if no part learns, adapters find no place, or the batch does not divide.
    """
    if recipe.objective == "text":
        from hico.train.text_report import dry_run_text

        return dry_run_text(recipe, prepared, world_size=world_size)
    with torch.device("meta"):
        model = HicoForConditionalGeneration._from_config(
            prepared.config, attn_implementation=recipe.attn_implementation
        )
    freeze(model, [*recipe.trainable, *(["llm"] if recipe.lora is not None else [])])
    parameters = count_parameters(model)
    size, asked = prepared.config.vision.image_size, recipe.model_config.get("encoder", {})
    asked = recipe.image_size or (isinstance(asked, Mapping) and asked.get("image_size"))
    whose = "the recipe's" if asked else "the checkpoint's"
    frames = f"{recipe.min_frames} to {recipe.max_frames}"
    lines = [
        f"stage {recipe.name}: {recipe.model} -> {recipe.output_dir}",
        f"sees {frames} frames of {size} x {size} pixels ({whose})",
        "",
        "part           trainable          total  learning rate",
    ]
    rate = recipe.arguments.get("learning_rate", 5e-5)
    for part, (learned, total) in parameters.items():
        note = f"  {recipe.part_learning_rates.get(part, rate):g}" if learned else ""
        note += " (adapters only)" if part == "llm" and recipe.lora is not None else ""
        lines.append(f"{part:<10} {learned:>13,} {total:>14,}{note}")
    lines += ["", "dataset                            rows        taken  strategy"]
    for dataset, taken in zip(prepared.mixture.datasets, prepared.mixture.taken, strict=True):
        lines.append(f"{dataset.name:<28} {len(dataset):>10,} {len(taken):>12,}  {dataset.spec.sampling_strategy}")
    if prepared.eval_rows is not None:
        lines.append(f"held out: {len(prepared.eval_rows):,} rows")
    accumulation = recipe.gradient_accumulation(world_size)
    steps_per_epoch, steps = prepared.steps(world_size)
    lengths = prepared.lengths[prepared.rows]
    per_step = lengths.sum() / steps_per_epoch
    shared = f", each row shared by {recipe.sequence_parallel}" if recipe.sequence_parallel > 1 else ""
    lines += [
        "",
        f"{world_size} device(s){shared}, {accumulation} micro-batch(es) per step, {len(prepared.rows):,} rows",
        f"tokens per row: {lengths.mean():,.0f} on average, {lengths.max():,} at most (estimated)",
        f"tokens per step: {per_step:,.0f} (estimated)",
        f"steps: {steps:,}",
        "",
        *_memory(recipe, prepared, model, world_size),
    ]
    if recipe.lora is not None:
        add_lora(model, recipe.lora, trainable=recipe.trainable)
    return "\n".join(lines)


def _memory(recipe: Recipe, prepared: Prepared, model: HicoForConditionalGeneration, world_size: int) -> list[str]:
    """Estimate the memory of one device for its largest batch, with an attention that keeps no scores."""
    zero = zero_stage(recipe)
    parameters = count_parameters(model)
    total, learned = (sum(counts[i] for counts in parameters.values()) for i in (1, 0))
    if recipe.lora is not None:
        learned -= parameters["llm"][0]
    half = zero is not None and recipe.arguments.get("bf16", False)
    frozen = 2 if half or recipe.frozen_dtype not in (None, "float32") else 4
    weights = learned * (2 if half else 4) + (total - learned) * frozen
    if recipe.quantization is not None:
        weights += parameters["llm"][1] * ((0.5 if recipe.quantization.get("load_in_4bit") else 1) - frozen)
    share = {stage: world_size if (zero or 0) >= stage else 1 for stage in (1, 2, 3)}
    element = 2 if recipe.arguments.get("bf16") or recipe.arguments.get("fp16") else 4
    vision, encoder, llm = prepared.config.vision, model.model.encoder, prepared.config.text_config
    longest = int(np.max(prepared.lengths[prepared.rows]))
    tokens = recipe.max_tokens_per_batch or longest * recipe.rows_per_device
    per_clip = vision.num_video_tokens(64 * vision.clip_len) / 64  # of a long video
    num_clips = math.ceil(tokens / per_clip) if prepared.mixture.num_videos.any() else 0
    patches = num_clips * math.prod(encoder.grid(vision.clip_len, encoder.image_size, encoder.image_size))
    depth = sum(isinstance(module, GradientCheckpointingLayer) for module in encoder.modules())

    def activations(count: float, width: int, depth: int) -> float:
        # A layer keeps about 17 numbers of the width per token. Checkpointing keeps one, and one layer in full.
        kept = depth + 17 if recipe.arguments.get("gradient_checkpointing") else 17 * depth
        return count * width * kept * element

    sizes = {
        "weights": weights / share[3],
        "gradients": learned * (2 if half else 4) / share[2],
        "optimizer": learned * (12 if half else 8) / share[1],
        "LLM activations": activations(tokens / recipe.sequence_parallel, llm.hidden_size, llm.num_hidden_layers),
        "encoder act.": activations(
            patches / recipe.sequence_parallel, encoder.hidden_size, depth if parameters["encoder"][0] else 0
        ),
    }
    if recipe.objective == "preference" and recipe.lora is None:
        half = half or recipe.frozen_dtype not in (None, "float32")
        sizes["reference"] = learned * (2 if half else 4)  # a copy of what learns; it shares the rest
    sizes["together"] = sum(sizes.values())
    sharded = f"ZeRO-{zero}" if zero is not None else "not sharded by DeepSpeed"
    title = (
        f"memory per device (estimated; {sharded}; without the logits of learned tokens and the buffers of devices)"
    )
    return [title, *(f"{name:<16} {size / 2**30:>9.2f} GiB" for name, size in sizes.items())]
