"""Hierarchical compression of long video for multimodal LLMs.

Importing hico is cheap: its classes, and torch with them, are loaded when first used. The Auto classes of transformers
know them all the same, see `hico._auto`.
"""

import importlib

from hico import _auto

__version__ = "0.1.0"

_LAZY = {
    "HicoConfig": "hico.configuration_hico",
    "HicoModel": "hico.modeling_hico",
    "HicoForConditionalGeneration": "hico.modeling_hico",
    "HicoProcessor": "hico.processing_hico",
    "Session": "hico.session",
    "answer": "hico.session",
    "VideoError": "hico.video_io",
    "read_video": "hico.video_io",
    "ENCODERS": "hico.registry",
    "COMPRESSORS": "hico.registry",
    "VIDEO_COMPRESSORS": "hico.registry",
    "DROP_POLICIES": "hico.registry",
    "llm_dropout": None,
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'hico' has no attribute {name!r}")
    module = _LAZY[name]
    value = (
        importlib.import_module(f"hico.{name}") if module is None else getattr(importlib.import_module(module), name)
    )
    globals()[name] = value
    return value


def __dir__():
    return __all__


_auto.register_when_loaded()
