"""A published configuration, read key by key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Keys of the LLM, the same in the published configuration and in that of Qwen2."""

_IGNORED = {
    "names Python code, and a configuration does not choose what is imported": ("architectures", "auto_map"),
    "says how the file was written": (
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "name_or_path",
        "transformers_version",
    ),
    "sets training, not the model": (
        "delay_load",
        "freeze_mm_mlp_adapter",
        "freeze_mm_vision_resampler",
        "gradient_checkpointing",
        "mm_close_init",
        "mm_projector_lr",
        "mm_tunable_parts",
        "mm_vision_tower_lr",
        "pos_skipping_range",
        "pretrain_mm_mlp_adapter",
        "tune_mm_mlp_adapter",
        "tune_mm_vision_resampler",
        "unfreeze_language_model",
        "unfreeze_mm_vision_tower",
        "use_pos_skipping",
    ),
    "the tower's weights stand in the checkpoint": ("vision_tower_pretrained",),
    "the placeholders are tokens of the tokenizer": ("mm_use_im_patch_token",),
    "a prompt is never cut": ("tokenizer_model_max_length",),
    "padding on the left changes no token, and lets a batch generate": ("tokenizer_padding_side",),
    "this projector adds no positions": ("mm_pos_num_frames",),
    "this projector has no latents": ("mm_num_compress_latents", "mm_num_compress_query_type"),
    "this tiling does not crop or split": ("image_crop_resolution", "image_split_resolution"),
    "frames are not tiled": ("frame_grid_pinpoints",),
    "attention is exact at any length": ("dual_chunk_attention_config",),
    "nothing reads it at inference": ("max_num_pixels", "min_slow_num_frames"),
}
REASONS = {key: reason for reason, keys in _IGNORED.items() for key in keys}

_KINDS = {"a number": (int, float), "a text": (str,), "a list": (list, tuple), "a mapping": (Mapping,)}


@dataclass
class Keys:
    """A configuration that is read key by key; what is left at the end was not understood."""

    left: dict[str, Any]
    ignored: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, default: Any = None) -> Any:
        """Take a value, which must be of the kind of its default, if there is one."""
        value = self.left.pop(key, None)
        if value is None or default is None:
            return default if value is None else value
        kind, types = next((kind, types) for kind, types in _KINDS.items() if isinstance(default, types))
        if not isinstance(value, types):
            raise ValueError(f"{key} is {value!r} in this checkpoint, but it must be {kind}, such as {default!r}")
        return value

    def ignore(self, key: str, reason: str) -> None:
        if key in self.left:
            del self.left[key]
            self.ignored[key] = reason

    def choose(self, key: str, choices: Mapping[Any, Any], default: Any = None) -> Any:
        value = self.take(key)
        value = default if value is None else value
        if isinstance(value, (list, dict)) or value not in choices:
            known = ", ".join(map(repr, choices))
            raise ValueError(f"{key} is {value!r} in this checkpoint, which hico cannot run; it knows {known}")
        return choices[value]

    def require(self, key: str, wanted: Any) -> None:
        """Accept a key that can have one value only, which is also what it means to leave it out."""
        self.choose(key, {wanted: None}, default=wanted)
