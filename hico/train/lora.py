"""Adapters on the LLM (LoRA), through peft: training with them, and merging them into the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hico.configuration_hico import HicoConfig
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG = "adapter_config.json"


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
        ValueError: if a setting is unknown to peft.
    """
    peft = _peft()
    settings = dict(settings)
    targets = settings.pop("target_modules", LINEARS)
    if not isinstance(targets, str):
        targets = rf".*\.language_model\..*\.({'|'.join(targets)})"
    saved = [f"model.{part}" for part in trainable if any(True for _ in getattr(model.model, part).parameters())]
    try:
        config = peft.LoraConfig(target_modules=targets, modules_to_save=saved or None, **settings)
    except TypeError as error:
        raise ValueError(f"lora: {error}; use the keywords of peft.LoraConfig") from error
    return peft.get_peft_model(model, config)


def load_merged(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> HicoForConditionalGeneration:
    """Load the model that adapters were trained on, with them merged in.

    Args:
        folder: what a stage with ``lora`` made; it names the model.
        dtype: of the result.

    Raises:
        ImportError: if peft is not installed.
        FileNotFoundError: if the model that the adapters belong to is gone.
    """
    peft = _peft()
    base = Path(peft.PeftConfig.from_pretrained(folder).base_model_name_or_path)
    if not base.is_dir():
        raise FileNotFoundError(f"{folder} holds adapters for {base}, which does not exist; put it back there")
    config = HicoConfig.from_pretrained(folder)
    model = HicoForConditionalGeneration.from_pretrained(base, config=config, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


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
    load_merged(folder).save_pretrained(output)
    HicoProcessor.from_pretrained(folder).save_pretrained(output)


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora needs the package peft; run `pip install 'hico[peft]'`") from error
    return peft
