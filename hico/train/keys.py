"""Which recipe keys go with which objective: one that would have no effect is an error."""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

_OF_TEXT = ("rope_parameters", "long_documents", "long_share", "across_documents")
_NOT_OF_TEXT = (
    *("frame_sampling", "min_frames", "max_frames", "video", "time_message", "label_scheme", "on_long_sample"),
    *("image_size", "model_config", "drop_schedule", "group_by_length", "max_tokens_per_batch", "packing"),
    *("part_learning_rates", "lora", "quantization", "check_files"),
)
_Faults = Iterator[tuple[Any, str]]


def check_text(recipe: Any) -> _Faults:
    """Yield what is wrong with the keys of ``objective: text``: whether it is, and how to say it."""
    changed = {field.name for field in fields(recipe) if getattr(recipe, field.name) != _default(field)}
    is_text, named = recipe.objective == "text", [key for key in _NOT_OF_TEXT if key in changed]
    own = [key for key in _OF_TEXT if key in changed]
    alone = sorted(recipe.trainable) in (["compressor", "encoder", "llm", "projector"], ["llm"])
    batched = recipe.arguments.get("per_device_train_batch_size", 8) > 1
    yield is_text and named, f"objective text has no use for {', '.join(named)}; leave it out"
    yield not is_text and own, f"{', '.join(own)} has an effect with objective: text only; leave it out"
    yield is_text and not alone, f"objective text trains the LLM, all of it; trainable is {recipe.trainable}"
    yield is_text and recipe.evaluates, "objective text has no evaluation; leave out eval_fraction and eval_data"
    yield is_text and recipe.max_length < 2, f"max_length is {recipe.max_length}; it must be at least 2"
    share = recipe.long_share
    yield share is not None and not 0 <= share < 1, f"long_share is {share}; use a share from 0 to below 1"
    yield recipe.long_documents < 1, f"long_documents is {recipe.long_documents}; it must be at least 1"
    yield (
        is_text and not recipe.across_documents and batched,
        "across_documents: false needs rows of one sequence; set per_device_train_batch_size: 1",
    )


def check_memory(recipe: Any) -> _Faults:
    """Yield what is wrong with the keys that save memory; see `check_text`."""
    for key in ("loss_chunk", "mlp_chunk"):
        size = getattr(recipe, key)
        yield size is not None and size < 1, f"{key} is {size}; it must be at least 1"
    given = [key for key in ("loss_chunk", "mlp_chunk") if getattr(recipe, key)]
    if recipe.offload_activations:
        given.append("offload_activations")
    checkpoints = recipe.arguments.get("gradient_checkpointing") or recipe.arguments.get("activation_checkpointing")
    yield recipe.objective == "tracks" and given, f"objective tracks trains no LLM; leave out {', '.join(given)}"
    yield (
        recipe.offload_activations and not checkpoints,
        "offload_activations moves what gradient checkpointing saves; set gradient_checkpointing: true",
    )


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
