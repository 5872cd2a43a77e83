"""What models share with transformers: how they are loaded, checked and initialised."""

from copy import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from hico.adapters import ADAPTER_CONFIG, folder_below, merge_adapters
from hico.compat import save_under_own_names
from hico.configuration_hico import HicoConfig
from hico.published import KEY_MAPPING, to_hico_on_load
from hico.shards import WEIGHT_FILES, check_shards

VISION = ("encoder", "compressor", "projector")
"""Parts of `HicoModel` that quantization leaves alone unless it is told otherwise; they hold few of the weights."""
_SKIPS = ("llm_int8_skip_modules", "modules_to_not_convert")
"""What configurations of quantization call the modules that they leave alone."""


class HicoPreTrainedModel(PreTrainedModel):
    """The base of `HicoModel` and `HicoForConditionalGeneration`."""

    config_class = HicoConfig
    base_model_prefix = "model"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_own_weights"):
            module.init_own_weights()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, strict: bool = True, **kwargs):
        """Load a saved model as `transformers.PreTrainedModel.from_pretrained` does, but never half of one.

        Checkpoints of VideoChat-Flash and LongVA are loaded as they are; saved again, they are in our layout. Adapters
        (what a training stage with ``lora`` made) are merged into the model that they were trained on. A
        ``quantization_config`` that names no modules to leave alone quantizes the LLM only.

        Args:
            strict: refuse a checkpoint that lacks weights, or has others or some of another shape; if False, missing
                weights are random, and weights that differ although the config ties them stay apart.

        Raises:
            ValueError: if ``strict`` and the weights are not the model's; the message counts and names them. If
                adapters are to be loaded and quantized, or loaded without the LM head.
            FileNotFoundError: if the model that adapters belong to is gone.
            CheckpointError: if a file of weights is missing, damaged, or holds code, or a tensor under two names.
        """
        adapters = _adapters(pretrained_model_name_or_path, kwargs)
        if adapters is not None:
            return cls._from_adapters(adapters, *args, strict=strict, **kwargs)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _sparing_vision(kwargs["quantization_config"])
        wants_info = kwargs.pop("output_loading_info", False)
        if pretrained_model_name_or_path is not None:
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
            if any((folder / name).is_file() for name in WEIGHT_FILES):
                check_shards(folder, rename=to_hico_on_load)
        kwargs["key_mapping"] = {**KEY_MAPPING, **(kwargs.get("key_mapping") or {})}
        takes_other_shapes = kwargs.get("ignore_mismatched_sizes", False)
        kwargs["ignore_mismatched_sizes"] = strict or takes_other_shapes  # as a fault it is told in one line
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        tied = cls._tied_weights_keys if model.config.tie_word_embeddings else None
        faults = {
            "missing": info["missing_keys"],
            "unexpected": info["unexpected_keys"],
            "of another shape": [] if takes_other_shapes else [name for name, *_ in info["mismatched_keys"]],
            "not what the config ties them to": set(tied or ()) - model.all_tied_weights_keys.keys(),
        }
        if strict and any(faults.values()):
            found = "; ".join(
                f"{len(keys)} {kind}: {', '.join(sorted(keys)[:3])}" for kind, keys in faults.items() if keys
            )
            raise ValueError(
                f"{pretrained_model_name_or_path}: these are not the weights of this {cls.__name__} ({found}); "
                "check that the config belongs to the weights, or pass strict=False to go on all the same"
            )
        save_under_own_names(model)
        return (model, info) if wants_info else model

    @classmethod
    def _from_adapters(cls, folder: Path, *args, output_loading_info: bool = False, **kwargs):
        """Load the model that adapters were trained on, with the configuration beside them, and merge them."""
        if kwargs.get("quantization_config") is not None or not cls.can_generate():
            raise ValueError(
                f"{folder} holds adapters, which cannot be merged into a quantized model, nor into one without LM "
                f"head; write a model of them with `hico merge-lora {folder} NEW`, and load that"
            )
        if (folder / "config.json").is_file():
            kwargs.setdefault("config", folder)
        model, info = cls.from_pretrained(folder_below(folder), *args, output_loading_info=True, **kwargs)
        model = merge_adapters(model, folder)
        model.name_or_path = str(folder)
        return (model, info) if output_loading_info else model


def _adapters(name_or_path: Any, kwargs: dict[str, Any]) -> Path | None:
    """Return the folder of adapters that is asked for, by name or by an Auto class; None if there is none."""
    # An Auto class that found adapters without a configuration hands on the model below, and this beside it.
    found = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    folder = Path(found or name_or_path or "", kwargs.get("subfolder", ""))
    if not (folder / ADAPTER_CONFIG).is_file() or any((folder / name).is_file() for name in WEIGHT_FILES):
        return None
    kwargs.pop("adapter_kwargs", None)
    kwargs.pop("subfolder", None)
    return folder


def _sparing_vision(quantization_config: Any) -> Any:
    """Return the same configuration, which leaves `VISION` and the head alone if it names no modules."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    sparing = copy(quantization_config)
    for name in _SKIPS:
        if getattr(sparing, name, ()) is None:
            # As `HicoForConditionalGeneration` and as `HicoModel` call them: either may load what the other saved.
            setattr(sparing, name, ["lm_head", *VISION, *(f"model.{part}" for part in VISION)])
    return sparing
