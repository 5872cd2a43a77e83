"""What an ablation compares: the cells of a grid, and for each the random and the uniform choice of its budget."""

import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hico.configuration_hico import HicoConfig, named_part
from hico.data.yaml_files import parse_yaml
from hico.llm_dropout import DropSchedule
from hico.registry import COMPRESSORS, ENCODERS, VIDEO_COMPRESSORS, Registry

BASELINES = ("uniform", "random")
"""Choices that look at nothing, of which every table has both at every budget."""


@dataclass(frozen=True)
class Cell:
    """One setting to measure; what is None is as in the checkpoint, but that it thins out nothing of its own."""

    encoder: dict[str, Any] | None = None
    compressor: dict[str, Any] | None = None
    video_compressor: dict[str, Any] | None = None
    drop_schedule: str | None = None
    frames: int | None = None
    """Frames of every video; as the processor chooses them if None."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing but the frames differs from the checkpoint."""
        return not (self.encoder or self.compressor or self.video_compressor or self.drop_schedule)

    @property
    def whole(self) -> "Cell":
        """The uncompressed model at the same frames."""
        return Cell(frames=self.frames)

    @property
    def method(self) -> str:
        """Names of what it does, without amounts."""
        stages = DropSchedule.parse(self.drop_schedule).stages
        drops = "+".join(f"{stage.policy}@{stage.layer}" for stage in stages)
        parts = [_name(part) for part in (self.encoder, self.compressor, self.video_compressor) if part]
        return " + ".join([*parts, *([drops] if drops else [])]) or "uncompressed"

    @property
    def setting(self) -> str:
        """The amounts."""
        parts = (self.encoder, self.compressor, self.video_compressor)
        words = [f"{key}={value}" for part in parts if part for key, value in part.items() if key != "name"]
        words += [self.drop_schedule] if self.drop_schedule else []
        return ", ".join([*words, *([f"{self.frames} frames"] if self.frames else [])])

    def digest(self, **facts: Any) -> str:
        """Digest the settings with all else that decides the figures."""
        return hashlib.sha256(json.dumps([asdict(self), facts], sort_keys=True, default=str).encode()).hexdigest()

    def changed(self, config: HicoConfig) -> HicoConfig:
        """Return a checkpoint's configuration with the changes of the cell."""
        settings = {**config.to_dict(), "video_compressor": self.video_compressor, "drop_schedule": self.drop_schedule}
        settings |= {"encoder": self.encoder} if self.encoder else {}
        settings |= {"compressor": self.compressor} if self.compressor else {}
        return HicoConfig.from_dict(settings)


def make_grid(
    *,
    encoders: Sequence[Any] = (),
    compressors: Sequence[Any] = (),
    video_compressors: Sequence[Any] = (),
    keep_ratios: Sequence[float] = (),
    drop_schedules: Sequence[str] = (),
    frames: Sequence[int] = (),
    cross: bool = False,
) -> list[Cell]:
    """List cells, the uncompressed model at every number of frames among them.

    Args:
        encoders: as `read_part` takes them.
        compressors: clip compressors, likewise.
        video_compressors: likewise.
        keep_ratios: given to every video compressor that takes one and names none.
        drop_schedules: as `DropSchedule.parse` reads them.
        frames: numbers of frames; the processor's own choice if there are none.
        cross: combine everything with everything; otherwise every cell changes one thing, at every number of frames.

    Raises:
        ValueError: if a part is unknown, a schedule cannot be read, or a number of frames is below 1.
    """
    if few := [number for number in frames if not isinstance(number, int) or number < 1]:
        raise ValueError(f"frames are {few[0]!r}; give whole numbers of at least 1")
    methods = [read_part(spec, VIDEO_COMPRESSORS) for spec in video_compressors]
    choices: dict[str, list[Any]] = {
        "encoder": [read_part(spec, ENCODERS) for spec in encoders],
        "compressor": [read_part(spec, COMPRESSORS) for spec in compressors],
        "video_compressor": [one for spec in methods for one in _at_ratios(spec, keep_ratios)],
        "drop_schedule": [str(DropSchedule.parse(spec)) or None for spec in drop_schedules],
    }
    if cross:
        combined = itertools.product(*([None, *values] for values in choices.values()))
        changes = [dict(zip(choices, values, strict=True)) for values in combined]
    else:
        changes = [{}, *({name: value} for name, values in choices.items() for value in values)]
    cells = [Cell(frames=number, **change) for number in frames or [None] for change in changes]
    return distinct(cells)


def distinct(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells without those that stand there already."""
    return list({cell.digest(): cell for cell in reversed(cells)}.values())[::-1]


def baselines(cell: Cell, *, retained: float, tokens_ratio: float) -> list[Cell]:
    """Return the cells that spend a cell's budget without looking: evenly spaced, and at random.

    A video compressor gives way to one that keeps the same share, to a thousandth; the stages of a drop schedule keep
    their layers and amounts; a clip compressor that leaves fewer tokens than the checkpoint's gives way to the
    checkpoint's own with a video compressor behind it.

    Args:
        cell: what they are compared with.
        retained: share of the tokens that its video compressor kept.
        tokens_ratio: its tokens per frame over those of the uncompressed model.
    """
    found = []
    for name in BASELINES:
        changes: dict[str, Any] = {}
        if cell.video_compressor:
            changes["video_compressor"] = _baseline(name, retained)
        elif cell.compressor and tokens_ratio < 1:
            changes |= {"compressor": None, "video_compressor": _baseline(name, tokens_ratio)}
        if cell.drop_schedule:
            stages = DropSchedule.parse(cell.drop_schedule).stages
            changes["drop_schedule"] = ",".join(f"{name}@{stage.layer}:{stage.keep}" for stage in stages)
        if changes and changes.get("video_compressor", {}) is not None:
            found.append(replace(cell, **changes))
    return found


def read_part(spec: str | Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Read a part with its settings.

    Args:
        spec: a name, ``"name key=value key=value"``, or a mapping with the key ``name``, also as YAML in a text.
        registry: that knows the name.

    Raises:
        ValueError: if the name is unknown, or a setting is not ``key=value``.
    """
    if isinstance(spec, str) and spec.startswith("{"):
        spec = parse_yaml(spec, f"{registry.kind} {spec}")
    if not isinstance(spec, str):
        return named_part(spec, registry)
    name, *words = spec.split()
    pairs = [word.partition("=") for word in words]
    if wrong := ["".join(pair) for pair in pairs if not pair[0] or not pair[1]]:
        raise ValueError(f"{registry.kind} {spec!r} has {wrong[0]!r}; write settings as key=value")
    return named_part(name, registry) | {key: parse_yaml(value, f"{key} of {name}") for key, _, value in pairs}


def _at_ratios(spec: dict[str, Any], ratios: Sequence[float]) -> list[dict[str, Any]]:
    takes = "keep_ratio" in inspect.signature(VIDEO_COMPRESSORS.get(spec["name"])).parameters
    if not takes or not ratios or len(spec) > 1:
        return [spec]
    return [{**spec, "keep_ratio": ratio} for ratio in ratios]


def _baseline(name: str, ratio: float) -> dict[str, Any] | None:
    ratio = max(0.001, math.floor(1000 * ratio + 0.5) / 1000)
    return {"name": name, "keep_ratio": ratio} if ratio < 1 else None


def _name(part: Mapping[str, Any]) -> str:
    return f"{part['name']}:{part['model']}" if "model" in part else part["name"]
