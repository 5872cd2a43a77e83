"""Adapters (LoRA) as peft writes them down: whose they are, and how they become part of a model."""

import json
from pathlib import Path

from torch import nn

ADAPTER_CONFIG = "adapter_config.json"


def folder_below(folder: str | Path) -> Path | None:
    """Return the folder of the model that the adapters in ``folder`` were trained on; ``None`` if it holds none.

    Raises:
        FileNotFoundError: if that folder is gone.
        ValueError: if the adapters do not name one.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        below = Path(json.loads(path.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} names no model that its adapters belong to ({error!r})") from error
    if not below.is_dir() or below.resolve() == Path(folder).resolve():
        raise FileNotFoundError(
            f"{folder} holds adapters for {below}, which does not exist or is itself; put it back there, or write "
            f"where it is into base_model_name_or_path of {path}"
        )
    return below


def merge_adapters(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapters in ``folder`` to the weights of the model that they were trained on.

    Raises:
        ImportError: if peft is not installed.
    """
    return load_peft().PeftModel.from_pretrained(model, folder).merge_and_unload()


def load_peft():
    """Import peft.

    Raises:
        ImportError: if it is not installed; the message says how to.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora needs the package peft; run `pip install 'hico[peft]'`") from error
    return peft
