"""What a folder is whose ``config.json`` hico cannot read: said in an error, with what to do."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING

_INTERNVL = (
    "of the family of InternVL, as InternVideo2.5 is, with another tower and projector. Run it with its own code"
)
_LLAVA = (
    "of the family of LLaVA-OneVision and LLaVA-Video, which lay their tokens out otherwise. Run it with LLaVA-NeXT, "
    "or its conversion to 'llava_onevision' with transformers"
)
_FLASH = "in the layout of VideoChat-Flash but for the above"
_LONGVA = "in the layout of LongVA but for the above"
_STOCK = (
    "which transformers runs by itself, as it does VideoChat-R1 (a 'qwen2_5_vl'). Load it with AutoProcessor and "
    "AutoModelForImageTextToText"
)
_LLM = "an LLM alone. `hico convert DIR NEW --encoder FILE` makes a model of it and of an encoder"
_TOWER = "a vision tower alone. `hico convert LLM NEW --encoder DIR` makes a model of it and of an LLM"
_UNKNOWN = "in no layout that hico reads, which are its own ('hico') and those of VideoChat-Flash and LongVA"


def what_it_is(config: Mapping[str, Any]) -> str:
    """Say in a sentence or two what a ``config.json`` describes, and what to do with it."""
    names = _architectures(config)
    written = f" ({', '.join(names)})" if names else ""
    return f"By its config.json it is a {config.get('model_type')!r}{written}, {_family(config, names)}"


@contextmanager
def saying_what_it_is(config: Mapping[str, Any]) -> Iterator[None]:
    """Add `what_it_is` to a ValueError about a configuration."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}. {what_it_is(config)}") from error


def _family(config: Mapping[str, Any], architectures: list[str]) -> str:
    model_type, projector = str(config.get("model_type")), config.get("mm_projector_type")
    if model_type.startswith("internvl"):
        return _INTERNVL
    if "mm_vision_tower" in config:
        has_newlines = "unpad" in str(config.get("mm_patch_merge_type"))
        known = {"tome16_mlp_hd64": _FLASH, "mlp2x_gelu": _LLAVA if has_newlines else _LONGVA}
        return known.get(str(projector), _UNKNOWN)
    if model_type in CONFIG_MAPPING:
        if any(name.endswith("ForConditionalGeneration") for name in architectures):
            return _STOCK
        if any(name.endswith("ForCausalLM") for name in architectures):
            return _LLM
        if "clip" in model_type or "siglip" in model_type:
            return _TOWER
    return _UNKNOWN


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []
