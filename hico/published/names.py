"""The names of tensors in published files, and ours."""

import re
from collections.abc import Iterable

SYSTEMS = VIDEOCHAT_FLASH, LONGVA = "videochat-flash", "longva"

_TOWER = "model.vision_tower.vision_tower."
_TOWER_PREFIXES = {
    "umt": (_TOWER + "encoder.", "model.encoder."),
    "clip": (_TOWER + "vision_model.", "model.encoder.vision_model."),
    "siglip": (_TOWER + "vision_model.", "model.encoder.vision_model."),
    "internvideo2": (_TOWER, "model.encoder."),
}
"""Encoder -> prefix of its tensors, published and ours."""
_PROJECTOR_PREFIXES = {
    VIDEOCHAT_FLASH: ("model.mm_projector.mlp.", "model.projector.mlp."),
    LONGVA: ("model.mm_projector.", "model.projector.mlp."),
}
_TEXT_PREFIXES = (("lm_head.", "lm_head."), ("model.", "model.language_model."))

LAYER_SCALE = r"(?<=\.ls[12]\.)gamma$", "weight"
"""InternVideo2's scales have either name in published files; the first is a pattern."""

KEY_MAPPING = {
    r"^model\.vision_tower\.vision_tower\.encoder\.": "model.encoder.",
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.encoder.vision_model.",
    r"^model\.vision_tower\.vision_tower\.": "model.encoder.",
    LAYER_SCALE[0]: LAYER_SCALE[1],
    r"^model\.mm_projector\.mlp\.": "model.projector.mlp.",
    r"^model\.mm_projector\.(?=\d)": "model.projector.mlp.",
    r"^model\.(?=(?:embed_tokens|layers|norm)\.)": "model.language_model.",
}
"""`to_hico` for ``transformers.PreTrainedModel.from_pretrained``, which applies all of them in order; leaves our own
names as they are."""


def to_hico(name: str, system: str) -> str | None:
    """Return our name of a published tensor, or None if it is none of that system."""
    towers = sorted(_TOWER_PREFIXES.values(), reverse=True)  # a prefix of another one comes after it
    ours = _rename(name, [_PROJECTOR_PREFIXES[system], *towers, *_TEXT_PREFIXES])
    return ours and re.sub(*LAYER_SCALE, ours)


def to_hico_on_load(name: str) -> str:
    """Return our name of a tensor by `KEY_MAPPING`, as transformers does."""
    for pattern, ours in KEY_MAPPING.items():
        name = re.sub(pattern, ours, name, count=1)
    return name


def to_published(name: str, system: str, encoder: str) -> str | None:
    """Return the published name of one of our tensors, or None if that system has no such part.

    Args:
        name: such as ``model.encoder.blocks.0.norm1.weight``.
        system: ``VIDEOCHAT_FLASH`` or ``LONGVA``.
        encoder: name of the encoder; each has its own place.
    """
    prefixes = [_PROJECTOR_PREFIXES[system], _TOWER_PREFIXES[encoder], *_TEXT_PREFIXES]
    return _rename(name, [(ours, published) for published, ours in prefixes])


def _rename(name: str, prefixes: Iterable[tuple[str, str]]) -> str | None:
    """Change the first prefix that fits."""
    return next((new + name[len(old) :] for old, new in prefixes if name.startswith(old)), None)
