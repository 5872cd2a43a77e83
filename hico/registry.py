"""Names of the exchangeable parts, and where each is found.

A config stores these names and never a dotted path, so a downloaded config cannot choose what Python imports.
"""

import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


class Registry:
    """Map short names to classes that are imported only when asked for.

    Args:
        kind: what the entries are, in the singular, as it should read in an error ("encoder").
        entries: name -> ``"module:Class"``.
    """

    def __init__(self, kind: str, entries: dict[str, str]):
        self.kind = kind
        self._entries: dict[str, str | type] = dict(entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Return the known names, sorted."""
        return sorted(self._entries)

    def register(self, name: str, target: str | type) -> None:
        """Add an entry of your own.

        Args:
            name: what a config will say; lower snake case, never reused.
            target: the class, or ``"module:Class"`` to import it only when needed.

        Raises:
            ValueError: if the name is taken.
        """
        if name in self._entries:
            raise ValueError(
                f"{self.kind} {name!r} is already registered as {self._entries[name]}; choose another name"
            )
        self._entries[name] = target

    def get(self, name: str) -> type:
        """Return the class behind a name.

        Raises:
            ValueError: if the name is unknown; the message lists the known names and the nearest one.
        """
        if name not in self._entries:
            nearest = get_close_matches(str(name), self._entries, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(self.names())}")
        target = self._entries[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
        return target

    @staticmethod
    def settings(spec: str | Mapping[str, Any]) -> dict[str, Any]:
        """Write out a spec as ``name`` and settings; ``"timm:resnet50"`` is the model resnet50 of timm."""
        if not isinstance(spec, str):
            return dict(spec)
        name, _, model = spec.partition(":")
        return {"name": name, "model": model} if model else {"name": name}

    def build(self, spec: str | Mapping[str, Any], **context: Any) -> Any:
        """Build the part that a config describes.

        Args:
            spec: a name, ``"name:model"``, or a mapping with the key ``name`` and keyword arguments of the class.
            context: further keyword arguments, known to the caller and not stored in the spec.

        Raises:
            ValueError: if the name is unknown, or the class does not take one of the settings.
        """
        settings = self.settings(spec)
        if "name" not in settings:
            raise ValueError(f"the {self.kind} {settings} has no 'name'; known: {', '.join(self.names())}")
        name = settings.pop("name")
        try:
            return self.get(name)(**settings, **context)
        except TypeError as error:
            raise ValueError(f"{self.kind} {name!r} cannot be built from {settings}: {error}") from error


def import_plugins(modules: Iterable[str]) -> None:
    """Import modules that register parts of their own; they may lie in the working directory.

    Whoever runs a program names them, never a checkpoint: it must not choose what Python imports.

    Raises:
        ImportError: if there is no such module.
    """
    for name in modules:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"the plugin {name} cannot be imported: {error}") from error


ENCODERS = Registry(
    "encoder",
    {
        "umt": "hico.encoders.umt:UMTEncoder",
        "internvideo2": "hico.encoders.internvideo2:InternVideo2Encoder",
        "clip": "hico.encoders.clip:CLIPEncoder",
        "siglip": "hico.encoders.siglip:SiglipEncoder",
        "timm": "hico.encoders.timm:TimmEncoder",
    },
)
COMPRESSORS = Registry(
    "compressor",
    {
        "token_merge": "hico.compressors.token_merge:TokenMergeCompressor",
        "temporal_merge": "hico.compressors.temporal_merge:TemporalMergeCompressor",
        "pooling": "hico.compressors.pooling:PoolingCompressor",
        "uneven": "hico.compressors.uneven:UnevenCompressor",
        "resampler": "hico.compressors.resampler:ResamplerCompressor",
        "identity": "hico.compressors.identity:IdentityCompressor",
    },
)
VIDEO_COMPRESSORS = Registry(
    "video compressor",
    {
        "uniform": "hico.video_compressors.uniform:UniformVideoCompressor",
        "random": "hico.video_compressors.random:RandomVideoCompressor",
        "evs": "hico.video_compressors.evs:EVSVideoCompressor",
        "vidcom2": "hico.video_compressors.vidcom2:VidCom2VideoCompressor",
        "dycoke": "hico.video_compressors.dycoke:DyCokeVideoCompressor",
        "visionzip": "hico.video_compressors.visionzip:VisionZipVideoCompressor",
        "divprune": "hico.video_compressors.divprune:DivPruneVideoCompressor",
        "dtd": "hico.video_compressors.dtd:DTDVideoCompressor",
        "fastvid": "hico.video_compressors.fastvid:FastVIDVideoCompressor",
        "prunevid": "hico.video_compressors.prunevid:PruneVidVideoCompressor",
        "holitom": "hico.video_compressors.holitom:HoliTomVideoCompressor",
    },
)
DROP_POLICIES = Registry(
    "drop policy",
    {
        "uniform": "hico.llm_dropout.policies:UniformPolicy",
        "attention": "hico.llm_dropout.policies:AttentionPolicy",
        "attention_merge": "hico.llm_dropout.policies:AttentionMergePolicy",
        "random": "hico.llm_dropout.policies:RandomPolicy",
        "none": "hico.llm_dropout.policies:NonePolicy",
    },
)
