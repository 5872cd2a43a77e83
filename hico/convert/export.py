"""Our configuration in the words of a published system."""

import inspect
from collections.abc import Sequence
from typing import Any

from hico.configuration_hico import HicoConfig
from hico.llm_dropout import DropSchedule
from hico.processing_hico import IMAGE_GRIDS
from hico.published import LONGVA, SIZE_NAMES, SIZES_KEY, TEXT_KEYS, TOWERS, VIDEOCHAT_FLASH
from hico.registry import COMPRESSORS, ENCODERS

_CLIP_LENS = {"internvideo2": 4}
"""Encoder -> frames per clip, where the published code takes no other number."""
_CONTEXT = {"transformers_version": "4.40.1", "tokenizer_padding_side": "right"}


def export_config(
    config: HicoConfig, *, image_tiling: str | Sequence[tuple[int, int]] | None = None
) -> tuple[str, dict[str, Any]]:
    """Write a configuration as a published system would.

    Args:
        config: of the model.
        image_tiling: of its processor; that of the system if omitted.

    Returns:
        The system and the content of its ``config.json``.

    Raises:
        ValueError: if no published system can run such a model; the message says what stands in the way.
    """
    compressor = config.compressor["name"]
    if compressor not in _WRITERS:
        raise ValueError(f"no published system has the compressor {compressor!r}; they have {', '.join(_WRITERS)}")
    _require("video_compressor", config.video_compressor, None)
    if config.text_config.model_type != "qwen2":
        raise ValueError(f"the published systems run over Qwen2, not {config.text_config.model_type!r}")
    system, settings = _WRITERS[compressor](config)
    settings |= _tiling_keys(config, _TILINGS[system], image_tiling)
    return system, {**_text_keys(config), **settings, **_CONTEXT}


def _text_keys(config: HicoConfig) -> dict[str, Any]:
    text = config.text_config.to_dict()
    rope = dict(text["rope_parameters"])
    keys = {key: text[key] for key in TEXT_KEYS if key in text} | {"rope_theta": rope.pop("rope_theta")}
    if set(keys.get("layer_types", ())) == {"full_attention"}:
        del keys["layer_types"]  # younger than the published code, and says what goes without saying
    kind = rope.pop("rope_type", "default")
    if kind != "default":
        keys["rope_scaling"] = {**rope, "type": kind, "rope_type": kind}
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype else "float32"
    return keys | {"torch_dtype": dtype, "tokenizer_model_max_length": keys["max_position_embeddings"]}


def _require(what: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise ValueError(f"{what} is {value!r}, which no published system has; it must be {wanted!r}")


def _settings(registry, spec: dict[str, Any]) -> dict[str, Any]:
    """Complete the settings of an encoder or compressor with its defaults."""
    parameters = inspect.signature(registry.get(spec["name"])).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {**defaults, **spec}


def _tower_keys(config: HicoConfig) -> dict[str, Any]:
    name = config.encoder["name"]
    if name not in SIZE_NAMES:
        raise ValueError(f"no published system has the encoder {name!r}; they have {', '.join(SIZE_NAMES)}")
    settings, official = _settings(ENCODERS, config.encoder), _settings(ENCODERS, {"name": name})
    main = ("img", "dim", "depth", "heads")
    sizes = {
        theirs: settings[ours]
        for theirs, ours in SIZE_NAMES[name].items()
        if theirs in main or settings[ours] != official[ours]
    }
    free = {*SIZE_NAMES[name].values(), "return_index", "feature_layer", "attn_implementation", "name"}
    for key in settings.keys() - free:
        _require(f"{key} of the encoder", settings[key], official[key])
    fitting = [part for part, ours in TOWERS if ours["name"] == name]
    exact = [part for part, ours in TOWERS if ours == {"name": name, "image_size": settings["image_size"]}]
    keys = {
        "mm_vision_tower": (exact or fitting)[0],
        "mm_hidden_size": settings["hidden_size"],
        "mm_vision_select_layer": settings.get("return_index", settings.get("feature_layer")),
        "mm_vision_select_feature": "patch",
    }
    is_official = exact and all(
        settings[ours] == official[ours] for ours in SIZE_NAMES[name].values() if ours != "image_size"
    )
    return keys if is_official else {**keys, SIZES_KEY: sizes}


def _drop_keys(config: HicoConfig) -> dict[str, Any]:
    stages = DropSchedule.parse(config.drop_schedule).stages
    if not stages:
        return {"mm_llm_compress": False}
    _require("drop_options", config.drop_options, None)
    policies = [stage.policy for stage in stages]
    num_uniform = next((n for n, policy in enumerate(policies) if policy != "uniform"), len(policies))
    kinds = {0: "attention", 1: "uniform0_attention", 2: "uniform1_attention"}
    kind = "uniform" if num_uniform == len(policies) else kinds.get(num_uniform)
    if (
        kind is None
        or set(policies[num_uniform:]) - {"attention"}
        or any(type(stage.keep) is not float or stage.scores_from != "own" for stage in stages)
    ):
        raise ValueError(
            f"no published system can drop by {config.drop_schedule!r}; they drop ratios, up to twice by 'uniform' "
            "and then by 'attention', or by 'uniform' alone"
        )
    return {
        "mm_llm_compress": True,
        "llm_compress_type": kind,
        "llm_compress_layer_list": [stage.layer for stage in stages],
        "llm_image_token_ratio_list": [1.0, *(stage.keep for stage in stages)],
    }


def _videochat_flash(config: HicoConfig) -> tuple[str, dict[str, Any]]:
    merging = _settings(COMPRESSORS, config.compressor)
    for key, wanted in (("tokens_per_frame", 16), ("tokens_per_image", 64), ("order", "similarity")):
        _require(f"{key} of the compressor", merging[key], wanted)
    _require("projector_first", config.projector_first, False)
    _require("image_layout", config.image_layout, "mosaic")
    _require("clip_len", config.clip_len, _CLIP_LENS.get(config.encoder["name"], config.clip_len))
    tower = _tower_keys(config)
    return VIDEOCHAT_FLASH, {
        "model_type": "llava_qwen_flash",
        "architectures": ["LlavaQwenForCausalLM_Flash"],
        **tower,
        **_drop_keys(config),
        "mm_projector_type": "tome16_mlp_hd64",
        "mm_patch_merge_type": "spatial_nopad",
        "mm_newline_position": "nothing",
        "mm_local_num_frames": config.clip_len,
        "mm_pos_num_frames": 8,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "vision_encode_type": "video_image",
        "frame_aspect_ratio": "square",
        "use_mm_proj": True,
    }


def _longva(config: HicoConfig) -> tuple[str, dict[str, Any]]:
    pooling = _settings(COMPRESSORS, config.compressor)
    _require("tokens_per_frame of the compressor", pooling["tokens_per_frame"], None)
    _require("projector_first", config.projector_first, True)
    _require("clip_len", config.clip_len, 1)
    _require("drop_schedule", config.drop_schedule, None)
    layouts = {"tiles": "unires", "flat": "flat"}
    if config.image_layout not in layouts:
        raise ValueError(f"image_layout is {config.image_layout!r}; with pooling, LongVA has {', '.join(layouts)}")
    return LONGVA, {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        **_tower_keys(config),
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": layouts[config.image_layout],
        "mm_spatial_pool_mode": pooling["mode"],
        "mm_spatial_pool_stride": pooling["stride"] or 2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }


def _tiling_keys(
    config: HicoConfig, usual: tuple[str, str], image_tiling: str | Sequence[tuple[int, int]] | None
) -> dict[str, Any]:
    """Write grids ``(columns, rows)`` of tiles as sizes in pixels, or that images are not tiled."""
    aspect_ratio, tiling = usual[0], usual[1] if image_tiling is None else image_tiling
    if tiling == "single":
        return {"image_aspect_ratio": "square"}
    grids = IMAGE_GRIDS[tiling]() if isinstance(tiling, str) else tiling
    side = _settings(ENCODERS, config.encoder)["image_size"]
    pinpoints = [[columns * side, rows * side] for columns, rows in grids]
    return {"image_aspect_ratio": aspect_ratio, "image_grid_pinpoints": pinpoints}


_TILINGS = {VIDEOCHAT_FLASH: ("anyres_nopad", "anyres_nopad"), LONGVA: ("anyres", "unires")}
"""System -> what it calls tiles of any number, and the tiling of its releases."""
_WRITERS = {"token_merge": _videochat_flash, "pooling": _longva}
"""Compressor -> the system that has it."""
