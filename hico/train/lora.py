"""Adapters on the LLM (LoRA), through peft: training with them, and merging them into the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hico.adapters import ADAPTER_CONFIG, load_peft
from hico.configuration_hico import HicoConfig
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    model: HicoForConditionalGeneration, settings: Mapping[str, Any], *, trainable: Sequence[str]
) -> nn.Module:
    """Put adapters on the LLM.

    Args:
        model: the model; it is changed.
        settings: keywords of `peft.LoraConfig`; a list of ``target_modules`` names linears of the LLM, all of them
            if omitted.
        trainable: parts that learn in full beside the adapters, and are saved with them.

    Returns:
        The `peft.PeftModel`.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if it does not take the settings, or no linear has a name of ``target_modules``.
    """
    targets = settings.get("target_modules") or LINEARS
    if not isinstance(targets, str):
        targets = rf".*\.language_model\..*\.({'|'.join(sorted(targets))})"
    saved = [f"model.{part}" for part in trainable if any(True for _ in getattr(model.model, part).parameters())]
    peft = load_peft()
    try:
        config = peft.LoraConfig(**{**settings, "target_modules": targets}, modules_to_save=saved or None)
        return peft.get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora {dict(settings)}: {error}") from error


def load_model(folder: str | Path, **options: Any) -> HicoForConditionalGeneration:
    """Load a model to train, in float32; adapters become part of it, and new ones will name ``folder`` as theirs.

    Raises:
        ImportError, FileNotFoundError: if there are adapters, and peft or the model that they belong to is missing.
        ValueError: if weights are of other sizes than the configuration asks for, or adapters cannot be merged.
    """
    try:
        model = HicoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} are of other sizes than the recipe asks for: {error}") from error
    model.name_or_path = str(Path(folder).resolve())
    return model


def merge_lora(folder: str | Path, output: str | Path) -> None:
    """Write a model with its adapters merged in, and its processor.

    Args:
        folder: what a stage with ``lora`` made.
        output: where to write; must not exist.

    Raises:
        FileNotFoundError: if ``folder`` holds no adapters, or their model is gone.
        FileExistsError: if ``output`` exists.
    """
    if Path(output).exists():
        raise FileExistsError(f"{output} exists; name a folder that does not")
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {ADAPTER_CONFIG}; give the result of a stage with lora")
    dtype = HicoConfig.from_pretrained(folder).dtype
    load_model(folder).to(dtype or torch.float32).save_pretrained(output)
    HicoProcessor.from_pretrained(folder).save_pretrained(output)
