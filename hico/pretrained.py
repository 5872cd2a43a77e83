"""What models share with transformers: how they are loaded, checked and initialised."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from hico.configuration_hico import HicoConfig
from hico.published import KEY_MAPPING, to_hico_on_load
from hico.shards import WEIGHT_FILES, check_shards


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

        Checkpoints of VideoChat-Flash and LongVA are loaded as they are; saved again, they are in our layout.

        Args:
            strict: refuse a checkpoint that lacks weights, or has others or some of another shape; if False, missing
                weights are random, and weights that differ although the config ties them stay apart.

        Raises:
            ValueError: if ``strict`` and the weights are not the model's; the message counts and names them.
            CheckpointError: if a file of weights is missing, damaged, or holds code, or a tensor under two names.
        """
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
        model._weight_conversions = None  # otherwise transformers 5 saves under the names that were loaded
        return (model, info) if wants_info else model
