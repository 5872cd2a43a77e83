"""Language models to measure, from any folder, and the digest that tells one from another."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hico.adapters import folder_below
from hico.configuration_hico import HicoConfig
from hico.data.rowfiles import file_sha256
from hico.modeling_hico import HicoForConditionalGeneration
from hico.published import is_published
from hico.rotary import keep_rotary_in_float32
from hico.tokenizer import load_llm_tokenizer

_CONTENT = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """Complete what a user said of device and dtype.

    Args:
        device: as torch names it; the best there is if omitted.
        dtype: as torch names it; float32 on CPU and bfloat16 elsewhere if omitted.

    Raises:
        ValueError: if there is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} cannot be used ({reason}); take another one, such as cpu") from error
    return device, getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        ValueError: if there is no such folder, or no tokenizer in it.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; give that of a causal LM or of a hico checkpoint")
    tokenizer = load_llm_tokenizer(str(folder), known=not is_hico(folder))
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer; put the files of the LLM's tokenizer beside its config.json")
    return tokenizer


def num_positions(folder: str | Path) -> int | None:
    """Return the positions that the configuration of a model's LLM names; None if it names none."""
    config = (HicoConfig if is_hico(folder) else AutoConfig).from_pretrained(folder)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_language_model(
    folder: str | Path, *, device: str, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """Load a causal LM, or a model of hico or of the published systems, which answers text by its LLM.

    Args:
        folder: with configuration and weights.
        device: where to put it.
        dtype: of the weights; rotary frequencies stay float32.
        attention: as transformers names it; its default if omitted.
    """
    kind = HicoForConditionalGeneration if is_hico(folder) else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype, **({"attn_implementation": attention} if attention else {}))
    keep_rotary_in_float32(model)
    return model.to(device).eval()


def is_hico(folder: str | Path) -> bool:
    """Say whether a folder holds a model of hico, adapters of one, or one of the published systems."""
    if below := folder_below(folder):
        return is_hico(below)
    settings, _ = PreTrainedConfig.get_config_dict(folder)
    return settings.get("model_type") == "hico" or is_published(settings)


def model_digest(folder: str | Path) -> str:
    """Digest what a model is made of: configuration, weights and tokenizer, and the model below adapters."""
    folder = Path(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix in _CONTENT and path.is_file())
    digest = file_sha256(*files)
    below = folder_below(folder)
    return f"{digest}+{model_digest(below)}" if below else digest
