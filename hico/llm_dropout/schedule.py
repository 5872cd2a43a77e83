"""At which layers how many visual tokens are dropped, and by which policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from hico.registry import DROP_POLICIES

PUBLISHED_TYPES = {
    "uniform": ("uniform", 0),
    "attention": ("attention", 0),
    "uniform0_attention": ("attention", 1),
    "uniform1_attention": ("attention", 2),
}
"""Published type -> policy, and how many stages are uniform before it takes over."""


@dataclass(frozen=True)
class DropStage:
    """One drop.

    Args:
        layer: index of the first decoder layer that sees fewer tokens; that many layers run before the drop.
        policy: name of a drop policy.
        keep: float, ratio of the original visual tokens in (0, 1], rounded down but to no less than one token of each
            video or image; or int, tokens per row that all its videos and images share.

    Raises:
        ValueError: if one of them cannot be; the message names it.
    """

    layer: int
    policy: str
    keep: float | int

    def __post_init__(self):
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"layer {self.layer!r} of {self} is not a layer index; give a whole number from 1 on")
        if self.layer == 0:
            raise ValueError(
                f"{self} drops before layer 0, which builds the masks and positions of all others; start at layer 1"
            )
        if not isinstance(self.policy, str) or self.policy not in DROP_POLICIES:
            DROP_POLICIES.get(self.policy if isinstance(self.policy, str) else repr(self.policy))
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float):
            raise ValueError(f"keep {self.keep!r} of {self} is neither a ratio like 0.25 nor a whole number of tokens")
        if isinstance(self.keep, float) and not 0 < self.keep <= 1:
            raise ValueError(f"{self} keeps the ratio {self.keep}; give one above 0 and at most 1")
        if isinstance(self.keep, int) and self.keep < 1:
            raise ValueError(f"{self} keeps {self.keep} tokens; give at least 1, or a ratio above 0")

    def __str__(self) -> str:
        return f"{self.policy}@{self.layer}:{self.keep}"


@dataclass(frozen=True)
class DropSchedule:
    """Drops from shallow to deep layers; an empty schedule drops nothing.

    Args:
        stages: in the order of their layers.

    Raises:
        ValueError: if the layers do not ascend, or a later stage would keep more than an earlier one.
    """

    stages: tuple[DropStage, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        for before, after in pairwise(self.stages):
            if after.layer <= before.layer:
                raise ValueError(f"{after} follows {before}, but layers must ascend; sort them, one stage per layer")
            if type(after.keep) is type(before.keep) and after.keep > before.keep:
                raise ValueError(
                    f"{after} follows {before}, but dropped tokens do not come back; keep at most {before.keep}"
                )

    @classmethod
    def parse(cls, spec: str | Sequence[Mapping[str, Any]] | DropSchedule | None) -> DropSchedule:
        """Read a schedule.

        Args:
            spec: ``"uniform@4:0.75,attention@18:0.25"``, where ``0.25`` is a ratio and ``64`` a number of tokens; or
                a list of ``{"layer": 4, "policy": "uniform", "keep": 0.75}``; or a schedule, returned as it is.
                ``None``, ``"none"``, an empty string and an empty list are the empty schedule.

        Raises:
            ValueError: naming the part that cannot be read, or what `DropStage` and `DropSchedule` object to.
        """
        if isinstance(spec, cls):
            return spec
        if spec is None or spec in ("", "none"):
            return cls()
        if isinstance(spec, str):
            return cls(tuple(_parse_stage(part.strip()) for part in spec.split(",")))
        if not isinstance(spec, Sequence):
            raise ValueError(
                f"cannot read schedule {spec!r}; write it as 'uniform@4:0.75', or as a list of layer, policy and keep"
            )
        return cls(tuple(_build_stage(part) for part in spec))

    @classmethod
    def from_published(
        cls,
        llm_compress_type: str,
        llm_compress_layer_list: Sequence[int],
        llm_image_token_ratio_list: Sequence[float],
    ) -> DropSchedule:
        """Read the published settings.

        Args:
            llm_compress_type: ``uniform``, ``attention``, ``uniform0_attention`` (the first stage uniform) or
                ``uniform1_attention`` (the first two).
            llm_compress_layer_list: layers that run before each drop.
            llm_image_token_ratio_list: ratio of the original tokens before the first drop, which must be 1, and
                after each; empty if the layer list is.

        Raises:
            ValueError: if the type is unknown, a list holds anything but numbers, the lengths do not fit, or the
                first ratio is not 1.

        Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, released configuration.
        """
        if not isinstance(llm_compress_type, str) or llm_compress_type not in PUBLISHED_TYPES:
            nearest = get_close_matches(str(llm_compress_type), PUBLISHED_TYPES, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(
                f"unknown llm_compress_type {llm_compress_type!r}{hint} Known: {', '.join(PUBLISHED_TYPES)}"
            )
        layers = _numbers("llm_compress_layer_list", llm_compress_layer_list)
        ratios = _numbers("llm_image_token_ratio_list", llm_image_token_ratio_list)
        if not layers and len(ratios) <= 1:
            return cls()
        if len(ratios) != len(layers) + 1:
            raise ValueError(
                f"llm_image_token_ratio_list {ratios} has {len(ratios)} entries for {len(layers)} layers; "
                f"give {len(layers) + 1}: 1.0, then the ratio after each drop"
            )
        if ratios[0] != 1:
            raise ValueError(f"llm_image_token_ratio_list {ratios} starts with {ratios[0]}; it must start with 1.0")
        policy, num_uniform = PUBLISHED_TYPES[llm_compress_type]
        policies = ["uniform"] * num_uniform + [policy] * len(layers)
        return cls(
            tuple(
                DropStage(layer, name, float(ratio))
                for layer, name, ratio in zip(layers, policies, ratios[1:], strict=False)
            )
        )

    def check_depth(self, num_layers: int) -> None:
        """Raise ``ValueError`` if a stage lies beyond the last layer of a decoder of ``num_layers``."""
        for stage in self.stages:
            if stage.layer >= num_layers:
                raise ValueError(
                    f"{stage} lies beyond the decoder, whose {num_layers} layers are 0 to {num_layers - 1}; "
                    f"drop at layer {num_layers - 1} at the latest"
                )

    def to_list(self) -> list[dict[str, Any]]:
        """Return the stages as a config stores them; `parse` reads them back."""
        return [asdict(stage) for stage in self.stages]

    def __str__(self) -> str:
        return ",".join(map(str, self.stages)) or "none"

    def __bool__(self) -> bool:
        return bool(self.stages)


def _numbers(name: str, values: Any) -> list[float]:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise ValueError(f"{name} is {values!r}; it must be a list of numbers")
    return list(values)


def _parse_stage(text: str) -> DropStage:
    policy, at, rest = text.partition("@")
    layer, colon, keep = rest.partition(":")
    if not (at and colon):
        raise ValueError(f"cannot read {text!r}; write policy@layer:keep, as in 'uniform@4:0.75'")
    if not layer.strip().isdecimal():
        raise ValueError(f"layer {layer!r} of {text!r} is not a whole number")
    return DropStage(int(layer), policy.strip(), _parse_keep(keep.strip(), text))


def _parse_keep(keep: str, text: str) -> float | int:
    if keep.isdecimal():
        return int(keep)
    try:
        return float(keep)
    except ValueError as error:
        raise ValueError(
            f"keep {keep!r} of {text!r} is neither a ratio like 0.25 nor a whole number of tokens"
        ) from error


def _build_stage(settings: Mapping[str, Any] | DropStage) -> DropStage:
    if isinstance(settings, DropStage):
        return settings
    if not isinstance(settings, Mapping) or set(settings) != {"layer", "policy", "keep"}:
        raise ValueError(f"cannot read stage {settings!r}; give exactly layer, policy and keep")
    return DropStage(**settings)
