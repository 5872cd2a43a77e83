"""A published configuration in our words."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from hico.grids import anyres_grids, unires_grids
from hico.llm_dropout.schedule import DropSchedule
from hico.published.keys import REASONS, TEXT_KEYS, Keys
from hico.published.names import LONGVA, VIDEOCHAT_FLASH
from hico.published.others import saying_what_it_is

SIZES_KEY = "_tiny_tower_sizes_not_in_official_config"
"""The published code fixes the sizes of its towers. A checkpoint with another tower says here how it was made:
``img``, ``dim``, ``depth``, ``heads``, and where needed ``patch``, ``mlp`` (the inner width), ``frames`` and ``side``
(the grid of its position table)."""

TOWERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("clip-vit-large-patch14-336", {"name": "clip", "image_size": 336}),
    ("clip-vit-large-patch14", {"name": "clip", "image_size": 224}),
    ("siglip-so400m-patch14-384", {"name": "siglip", "image_size": 384}),
    ("internvideo2", {"name": "internvideo2", "image_size": 224}),
    ("umt-hd", {"name": "umt", "image_size": 448}),
    ("umt", {"name": "umt", "image_size": 224}),
)
"""Part of a tower's name -> our encoder. Tried in this order."""

SIZE_NAMES = {
    "umt": {"img": "image_size", "dim": "hidden_size", "depth": "depth", "heads": "num_heads", "patch": "patch_size"},
    "clip": {
        "img": "image_size",
        "dim": "hidden_size",
        "depth": "depth",
        "heads": "num_heads",
        "patch": "patch_size",
        "mlp": "intermediate_size",
    },
}
SIZE_NAMES["siglip"] = SIZE_NAMES["clip"]
SIZE_NAMES["internvideo2"] = SIZE_NAMES["clip"] | {"frames": "pretrained_frames", "side": "pretrained_side"}


@dataclass(frozen=True)
class Translation:
    """A published configuration in our words."""

    system: str
    """``VIDEOCHAT_FLASH`` or ``LONGVA``."""
    config: dict[str, Any]
    """Arguments of `HicoConfig`, without the ids of placeholders."""
    processor: dict[str, Any]
    """Arguments of `HicoProcessor.from_config`."""
    ignored: dict[str, str]
    """Keys that change nothing here, and why."""
    unknown: dict[str, Any]
    """Keys that nobody knows, with their values."""


def is_published(config: Mapping[str, Any]) -> bool:
    """Say whether a ``config.json`` is in the published layout."""
    return "mm_vision_tower" in config


def system_of(config: Mapping[str, Any]) -> str:
    """Say which system a published ``config.json`` belongs to.

    Raises:
        ValueError: if neither has such a projector.
    """
    with saying_what_it_is(config):
        return Keys(dict(config)).choose("mm_projector_type", _READERS)[0]


def translate(config: Mapping[str, Any]) -> Translation:
    """Read a published ``config.json``.

    Every key is used, or ignored for a reason, or reported as unknown.

    Raises:
        ValueError: if a key asks for what hico has not; the message names the key, its value and what is known, and
            says what the folder is.
    """
    with saying_what_it_is(config):
        return _translate(config)


def _translate(config: Mapping[str, Any]) -> Translation:
    keys = Keys(dict(config))
    system, read = keys.choose("mm_projector_type", _READERS)
    text = _text_config(keys)
    settings, processor = read(keys)
    dtype = keys.take("torch_dtype", keys.take("dtype"))
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"the dtype is {dtype!r}, which torch has not; write one such as 'bfloat16'")
    settings |= {"text_config": text} | ({"dtype": dtype} if dtype else {})
    for key in [key for key in keys.left if key in REASONS]:
        keys.ignore(key, REASONS[key])
    return Translation(system, settings, processor, keys.ignored, keys.left)


def _text_config(keys: Keys) -> dict[str, Any]:
    model_type = keys.take("model_type", "qwen2")
    if "qwen" not in model_type.lower():
        raise ValueError(f"model_type is {model_type!r}; of the published systems, hico knows those over Qwen2")
    text = {"model_type": "qwen2"} | {key: keys.left.pop(key) for key in TEXT_KEYS if key in keys.left}
    scaling = dict(keys.take("rope_scaling", {}))
    kind = scaling.pop("type", None)
    rope = {"rope_type": kind or "default", **scaling, "rope_theta": keys.take("rope_theta", 10000.0)}
    text["rope_parameters"] = {**rope, **keys.take("rope_parameters", {})}
    return text


def _encoder(keys: Keys) -> dict[str, Any]:
    name = str(keys.take("mm_vision_tower"))
    known = next((settings for part, settings in TOWERS if part in name.lower()), None)
    if known is None:
        parts = ", ".join(part for part, _ in TOWERS)
        raise ValueError(f"mm_vision_tower is {name!r}, which hico cannot run; it knows names with {parts}")
    encoder = dict(known)
    sizes = dict(keys.take(SIZES_KEY, {}))
    names = SIZE_NAMES[encoder["name"]]
    if unknown := sorted(set(sizes) - set(names)):
        raise ValueError(f"{SIZES_KEY} has {unknown}; it may have {', '.join(names)}")
    encoder |= {names[key]: value for key, value in sizes.items()}
    encoder[_LAYER_SETTING[encoder["name"]]] = keys.take("mm_vision_select_layer", -2)
    keys.require("mm_vision_select_feature", "patch")
    width = keys.take("mm_hidden_size")
    if width is not None and "hidden_size" in encoder and width != encoder["hidden_size"]:
        raise ValueError(f"mm_hidden_size is {width}, but {SIZES_KEY} says the tower is {encoder['hidden_size']} wide")
    return encoder


_LAYER_SETTING = {
    "umt": "return_index",
    "internvideo2": "return_index",
    "clip": "feature_layer",
    "siglip": "feature_layer",
}


ANSWERED_MULTIPLE = 8
"""The releases answer from so many frames, or a multiple; they were trained on multiples of a clip, which has 4."""
LONGVA_FRAMES = 32
"""LongVA's demo and its evaluation with lmms-eval take so many frames of a video, its README 16."""


def _videochat_flash(keys: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
    encoder = _encoder(keys)
    keys.require("mm_patch_merge_type", "spatial_nopad")
    keys.require("mm_newline_position", "nothing")
    keys.require("vision_encode_type", "video_image")
    keys.require("frame_aspect_ratio", "square")
    keys.require("use_mm_proj", True)
    keys.require("mm_use_im_start_end", False)
    keys.require("mm_resampler_type", None)
    for key in ("mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_spatial_pool_out_channels"):
        keys.ignore(key, "this projector merges and does not pool")
    config = {
        "encoder": encoder,
        "compressor": {"name": "token_merge", "tokens_per_frame": 16, "tokens_per_image": 64},
        "clip_len": _clip_len(keys),
        "projector_first": False,
        "image_layout": "mosaic",
        "drop_schedule": _drop_schedule(keys),
    }
    tilings = {"anyres_nopad": "anyres_nopad", "square": "single", None: "single"}
    multiple_of = math.lcm(ANSWERED_MULTIPLE, config["clip_len"])
    processor = {
        "time_message": "chat",
        "video": {
            "mode": "dynamic_fps1",
            "min_frames": 64,
            "max_frames": 512,
            "multiple_of": multiple_of,
            "end_margin": 0.1,
            "scaler": "exact",
        },
        "image_tiling": _tiling(keys, tilings, tile=encoder["image_size"]),
    }
    return config, processor


def _longva(keys: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
    encoder = _encoder(keys)
    keys.require("mm_use_im_start_end", False)
    keys.require("use_mm_proj", True)
    keys.require("mm_llm_compress", False)
    # LongVA-7B-DPO names a resampler that has no weights and stands outside the path of images and videos.
    keys.choose("mm_resampler_type", {None: None, "spatial_pool": None})
    keys.ignore("mm_newline_position", "this merge type has no newlines")
    keys.ignore("mm_spatial_pool_out_channels", "pooling keeps the channels")
    pooling = {
        "name": "pooling",
        "stride": keys.take("mm_spatial_pool_stride", 2),
        "mode": keys.choose("mm_spatial_pool_mode", {"average": "average", "max": "max"}, default="average"),
    }
    config = {
        "encoder": encoder,
        "compressor": pooling,
        "clip_len": 1,
        "projector_first": True,
        "image_layout": keys.choose("mm_patch_merge_type", {"unires": "tiles", "flat": "flat"}, default="flat"),
    }
    tilings = {"anyres": "unires", "square": "single", None: "single"}
    processor = {
        "time_message": None,
        "video": {
            "mode": "linspace",
            "num_frames": LONGVA_FRAMES,
            "bounds": "published",
            "fit": "crop",
            "scaler": "exact",
        },
        "image_tiling": _tiling(keys, tilings, tile=encoder["image_size"]),
    }
    return config, processor


_READERS: dict[str, tuple[str, Callable]] = {
    "tome16_mlp_hd64": (VIDEOCHAT_FLASH, _videochat_flash),
    "mlp2x_gelu": (LONGVA, _longva),
}
"""Type of projector -> system, and how the rest of its configuration is read."""


def _clip_len(keys: Keys) -> int:
    clip_len = keys.take("mm_local_num_frames", 4)
    if clip_len < 1:
        raise ValueError(
            f"mm_local_num_frames is {clip_len}, which merges all frames of a video together; hico merges clip by "
            "clip, so set it to the frames per clip, which is 4 in every release"
        )
    return clip_len


def _drop_schedule(keys: Keys) -> str | None:
    names = ("llm_compress_type", "llm_compress_layer_list", "llm_image_token_ratio_list")
    if not keys.take("mm_llm_compress", False):
        for name in names:
            keys.ignore(name, "mm_llm_compress is off")
        return None
    defaults = ("attention", [8, 16, 24], [1.0, 0.5, 0.25, 0.125])
    values = [keys.take(name, default) for name, default in zip(names, defaults, strict=True)]
    return str(DropSchedule.from_published(*values))


def _tiling(keys: Keys, tilings: Mapping[str | None, str], *, tile: int) -> str | list[tuple[int, int]]:
    """Read how images are tiled; what is not understood of it is reported, and the system's own tiling taken."""
    aspect_ratio = keys.left.get("image_aspect_ratio")
    is_known = not isinstance(aspect_ratio, (list, dict)) and aspect_ratio in tilings
    name = tilings[aspect_ratio] if is_known else next(iter(tilings.values()))
    if is_known:
        keys.take("image_aspect_ratio")
    if name == "single":
        keys.ignore("image_grid_pinpoints", "images are not tiled")
        return name
    pinpoints = keys.take("image_grid_pinpoints")
    grids = _parse_pinpoints(pinpoints, tile=tile)
    if grids is None:
        keys.left |= {"image_grid_pinpoints": pinpoints} if pinpoints else {}
        return name
    named = {"anyres_nopad": anyres_grids(), "unires": unires_grids()}
    return next((known for known, its_grids in named.items() if sorted(grids) == sorted(its_grids)), grids)


def _parse_pinpoints(pinpoints: Any, *, tile: int) -> list[tuple[int, int]] | None:
    """Return ``(columns, rows)`` from sizes in pixels, or from a range of grids such as ``(1x1),...,(6x6)``.

    None if they are neither.
    """
    if isinstance(pinpoints, str):
        corners = [(int(columns), int(rows)) for columns, rows in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if len(corners) == 2:
            (first_column, first_row), (last_column, last_row) = corners
            grids = list(product(range(first_column, last_column + 1), range(first_row, last_row + 1)))
            return grids if min(first_column, first_row) >= 1 else None
        pinpoints = re.findall(r"\((\d+)\s*,\s*(\d+)\)", pinpoints)
    try:
        sizes = [(int(width), int(height)) for width, height in pinpoints or ()]
    except (TypeError, ValueError):
        return None
    if not sizes or any(side < 1 or side % tile for size in sizes for side in size):
        return None
    return [(width // tile, height // tile) for width, height in sizes]
