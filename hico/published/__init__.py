"""How VideoChat-Flash and LongVA write a model down: the keys of their configuration, the names of their tensors.

A configuration is only read: what it names is looked up in tables here, and never imported.

Source: the layouts of the releases of Li et al., "VideoChat-Flash", arXiv:2501.00574, and Zhang et al., "LongVA",
arXiv:2406.16852.
"""

from hico.published.keys import TEXT_KEYS
from hico.published.names import (
    KEY_MAPPING,
    LAYER_SCALE,
    LONGVA,
    SYSTEMS,
    VIDEOCHAT_FLASH,
    to_hico,
    to_hico_on_load,
    to_published,
)
from hico.published.others import saying_what_it_is, what_it_is
from hico.published.translation import SIZE_NAMES, SIZES_KEY, TOWERS, Translation, is_published, system_of, translate

__all__ = [
    "KEY_MAPPING",
    "LAYER_SCALE",
    "LONGVA",
    "SIZES_KEY",
    "SIZE_NAMES",
    "SYSTEMS",
    "TEXT_KEYS",
    "TOWERS",
    "VIDEOCHAT_FLASH",
    "Translation",
    "is_published",
    "saying_what_it_is",
    "system_of",
    "to_hico",
    "to_hico_on_load",
    "to_published",
    "translate",
    "what_it_is",
]
