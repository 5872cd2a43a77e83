"""What a stage of text would do: the report of ``--dry_run``, with the longest length that fits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hico.train.arguments import zero_stage
from hico.train.config import Recipe
from hico.train.footprint import Footprint, MemoryKeys, footprint
from hico.train.lm_head import LOSS_CHUNK
from hico.train.text import PreparedText

CARDS = (80, 141)
"""Memory of one card in GB, as the vendors call it."""


def dry_run_text(recipe: Recipe, prepared: PreparedText, *, world_size: int) -> str:
    """Describe a stage without weights, devices or a single step; see `hico.train.report.dry_run`.

    Returns:
        Text: positions, documents and long ones per domain, tokens per step, steps, memory, the longest lengths.
    """
    llm = prepared.config.get_text_config()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(llm).parameters())
    per_epoch, steps = prepared.steps(world_size)
    accumulation = recipe.gradient_accumulation(world_size)
    per_step = recipe.rows_per_device * accumulation * recipe.num_groups(world_size)
    rate = recipe.arguments.get("learning_rate", 5e-5)
    lines = [
        f"stage {recipe.name}: {recipe.model} -> {recipe.output_dir}",
        f"{llm.model_type} of {parameters:,} parameters, learning rate {rate:g}",
        f"positions: {getattr(llm, 'rope_parameters', None) or 'learned'}, {recipe.max_length:,} tokens",
        "",
        *_domains(prepared),
        "",
        f"{world_size} device(s), {accumulation} micro-batch(es) per step; attention "
        + ("crosses documents" if recipe.across_documents else "stays within a document"),
        f"sequences: {len(prepared.sequences):,} in {per_epoch:,} steps an epoch",
        f"tokens per step: {per_step * recipe.max_length:,}",
        f"steps: {steps:,}",
        "",
        *_memory(recipe, llm, parameters, world_size),
    ]
    return "\n".join(lines)


def _domains(prepared: PreparedText) -> list[str]:
    store, rule = prepared.store, prepared.sequences.rule
    stream = prepared.sequences.stream(0)
    sizes = np.diff(stream.ends, prepend=0)
    is_long = store.lengths >= rule.long_documents
    lines = [f"domain                  documents          tokens   share  over {rule.long_documents:,}: is, drawn"]
    for number, name in enumerate(store.names):
        own, drawn = store.domains == number, store.domains[stream.documents] == number
        tokens = store.lengths[own].sum()
        natural = store.lengths[own & is_long].sum() / tokens
        upsampled = sizes[drawn & is_long[stream.documents]].sum() / max(1, sizes[drawn].sum())
        lines.append(
            f"{name:<20} {own.sum():>12,} {tokens:>15,} {tokens / store.lengths.sum():>7.1%} "
            f"{natural:>12.1%} {upsampled:>6.1%}"
        )
    return lines


def _memory(recipe: Recipe, llm: PreTrainedConfig, parameters: int, world_size: int) -> list[str]:
    zero, offloads = zero_stage(recipe), _offloads_optimizer(recipe)
    half = zero is not None and recipe.arguments.get("bf16", False)
    share = {stage: world_size if (zero or 0) >= stage else 1 for stage in (1, 2, 3)}
    states = {
        "weights": parameters * (2 if half else 4) / share[3],
        "gradients": parameters * (2 if half else 4) / share[2],
        "optimizer": 0 if offloads else parameters * (12 if half else 8) / share[1],
    }
    fixed, shared = sum(states.values()), recipe.sequence_parallel
    asked = memory_keys(recipe, half=half)
    saving = replace(
        asked,
        mlp_chunk=asked.mlp_chunk or 2 * (asked.loss_chunk or LOSS_CHUNK),
        offload_activations=True,
        gradient_checkpointing=True,
    )
    ways = {"this recipe": asked} | ({} if saving == asked else {"with mlp_chunk and offload_activations": saving})
    try:
        found = {name: footprint(llm, keys) for name, keys in ways.items()}
    except Exception as error:  # an LLM may be built in any way, and the rest of the report is worth having
        return [f"memory per device: not counted ({error})"]
    sharded = f"ZeRO-{zero}" if zero is not None else "not sharded by DeepSpeed"
    lines = [f"memory per device ({sharded}; activations counted on a step without numbers; no buffers of devices)"]
    sizes = {**states, "activations": found["this recipe"].at(recipe.max_length * recipe.rows_per_device / shared)}
    sizes["together"] = sum(sizes.values())
    lines += [f"{name:<16} {size / 2**30:>9.2f} GiB" for name, size in sizes.items()]
    lines += ["", f"longest length that fits    {'bytes a token':>14} " + " ".join(f"{gb:>9} GB" for gb in CARDS)]
    for name, counted in found.items():
        lines.append(
            f"{name:<27} {_slope(counted):>14,.0f} " + " ".join(_longest(counted, fixed, gb, shared) for gb in CARDS)
        )
    return lines


def memory_keys(recipe: Recipe, *, half: bool) -> MemoryKeys:
    """Return what a recipe says of memory; ``half`` says that weights are bfloat16."""
    arguments = recipe.arguments
    checkpoints = arguments.get("gradient_checkpointing") or arguments.get("activation_checkpointing")
    return MemoryKeys(
        recipe.loss_chunk,
        recipe.mlp_chunk,
        recipe.offload_activations,
        bool(checkpoints),
        torch.bfloat16 if half else torch.float32,
        autocast=bool(arguments.get("bf16")) and not half,
    )


def _slope(counted: Footprint) -> float:
    return max(slope for _, slope in counted.lines)


def _longest(counted: Footprint, fixed: float, card: int, shared: int) -> str:
    longest = counted.longest(card * 1e9 - fixed) * shared
    return f"{longest:>12,}" if longest else f"{'none':>12}"


def _offloads_optimizer(recipe: Recipe) -> bool:
    spec = recipe.arguments.get("deepspeed")
    settings = json.loads(Path(spec).read_text()) if isinstance(spec, str) else spec or {}
    return (settings.get("zero_optimization") or {}).get("offload_optimizer", {}).get("device") not in (None, "none")
