"""At which layers how many visual tokens are dropped, and by which policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from hico.registry import DROP_POLICIES

SCORES_FROM = ("own", "previous")
PUBLISHED_TYPES = {
    "uniform": ("uniform", 0),
    "attention": ("attention", 0),
    "uniform0_attention": ("attention", 1),
    "uniform1_attention": ("attention", 2),
}
"""Published type -> policy, and how many stages are uniform before it takes over."""


NAMED_SCHEDULES = {
    "fastv": "attention@2:0.5:previous",
    "pyramiddrop": "attention@8:0.5,attention@16:0.25,attention@24:0.125",
    "videochat_flash": "uniform@4:0.75,attention@18:0.25",
}
"""Name of a published method -> its schedule, with the layers and ratios of its paper.

Source: Chen et al., "FastV", arXiv:2403.06764; Xing et al., "PyramidDrop", arXiv:2410.17247; Li et al.,
"VideoChat-Flash", arXiv:2501.00574, Table 7.
"""


@dataclass(frozen=True)
class DropStage:
    """One drop.

    Args:
        layer: index of the first decoder layer that sees fewer tokens; that many layers run before the drop.
        policy: name of a drop policy.
        keep: float, ratio of the original visual tokens in (0, 1], rounded down but to no less than one token of each
            video or image; or int, tokens per row that all its videos and images share.
        scores_from: whose attention ranks, if the policy asks for scores: "own" (of ``layer``, on what enters it) or
            "previous" (of the layer before, on what entered that one).

    Raises:
        ValueError: if one of them cannot be; the message names it.
    """

    layer: int
    policy: str
    keep: float | int
    scores_from: str = "own"

    def __post_init__(self):
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"layer {self.layer!r} of {self} is not a layer index; give a whole number from 1 on")
        if self.layer == 0:
            raise ValueError(
                f"{self} drops before layer 0, which builds the masks and positions of all others; start at layer 1"
            )
        policy = DROP_POLICIES.get(self.policy if isinstance(self.policy, str) else repr(self.policy))
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float):
            raise ValueError(f"keep {self.keep!r} of {self} is neither a ratio like 0.25 nor a whole number of tokens")
        if isinstance(self.keep, float) and not 0 < self.keep <= 1:
            raise ValueError(f"{self} keeps the ratio {self.keep}; give one above 0 and at most 1")
        if isinstance(self.keep, int) and self.keep < 1:
            raise ValueError(f"{self} keeps {self.keep} tokens; give at least 1, or a ratio above 0")
        if self.scores_from not in SCORES_FROM:
            raise ValueError(f"{self} takes scores from {self.scores_from!r}; choose one of {', '.join(SCORES_FROM)}")
        if self.scores_from != "own" and not policy.needs_scores:
            raise ValueError(f"{self} takes scores from another layer, and {self.policy!r} asks for none")

    @property
    def scoring_layer(self) -> int:
        """The layer whose attention ranks."""
        return self.layer - 1 if self.scores_from == "previous" else self.layer

    def __str__(self) -> str:
        scores_from = "" if self.scores_from == "own" else f":{self.scores_from}"
        return f"{self.policy}@{self.layer}:{self.keep}{scores_from}"


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
    def parse(cls, spec: str | Sequence[str | Mapping[str, Any]] | DropSchedule | None) -> DropSchedule:
        """Read a schedule.

        Args:
            spec: ``"uniform@4:0.75,attention@18:0.25"``, where ``0.25`` is a ratio and ``64`` a number of tokens, and
                ``attention@2:0.5:previous`` takes its scores from the layer before; or a list of the same stages, as
                text or as ``{"layer": 4, "policy": "uniform", "keep": 0.75}``; or a schedule, returned as it is. In
                place of a stage stands the name of a published method (`NAMED_SCHEDULES`), alone or with layers and
                amounts of its own, divided by slashes: ``"fastv"``, ``"fastv@3:0.25"``,
                ``"pyramiddrop@7/14/21:0.5/0.25/0.125"``. ``None``, ``"none"``, an empty string and an empty list are
                the empty schedule.

        Raises:
            ValueError: naming the part that cannot be read, or what `DropStage` and `DropSchedule` object to.
        """
        if isinstance(spec, cls):
            return spec
        if spec is None or spec in ("", "none"):
            return cls()
        if not isinstance(spec, Sequence):
            raise ValueError(
                f"cannot read schedule {spec!r}; write it as 'uniform@4:0.75', or as a list of layer, policy and keep"
            )
        parts = spec.split(",") if isinstance(spec, str) else spec
        return cls(tuple(stage for part in parts for stage in _read_stages(part)))

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
        return [
            {name: value for name, value in asdict(stage).items() if (name, value) != ("scores_from", "own")}
            for stage in self.stages
        ]

    def __str__(self) -> str:
        return ",".join(map(str, self.stages)) or "none"

    def __bool__(self) -> bool:
        return bool(self.stages)


def _numbers(name: str, values: Any) -> list[float]:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise ValueError(f"{name} is {values!r}; it must be a list of numbers")
    return list(values)


def _read_stages(part: str | Mapping[str, Any] | DropStage) -> Iterable[DropStage]:
    """Read one part of a schedule: a stage, or all those of a named one."""
    if isinstance(part, DropStage):
        return [part]
    settings = _read_text(part.strip()) if isinstance(part, str) else part
    names = {field.name for field in fields(DropStage)}
    if isinstance(settings, Mapping) and str(settings.get("policy")) in NAMED_SCHEDULES:
        if set(settings) <= names - {"scores_from"}:
            return _expand(**settings)
    elif isinstance(settings, Mapping) and names - {"scores_from"} <= set(settings) <= names:
        return [DropStage(**settings)]
    raise ValueError(
        f"cannot read {part!r}; write policy@layer:keep, as in 'uniform@4:0.75', give exactly layer, policy and keep "
        f"(and scores_from), or name one of {', '.join(NAMED_SCHEDULES)}"
    )


def _expand(policy: str, **given: Any) -> Iterable[DropStage]:
    """List the stages of a named schedule, with other layers and amounts where they are given."""
    stages = DropSchedule.parse(NAMED_SCHEDULES[policy]).stages
    for name, values in given.items():
        values = values if isinstance(values, list) else [values]
        if len(values) != len(stages):
            raise ValueError(f"{policy} drops {len(stages)} times, and {name} is {values}; give one for each, or none")
        stages = [replace(stage, **{name: value}) for stage, value in zip(stages, values, strict=True)]
    return stages


def _read_text(text: str) -> dict[str, Any]:
    """Take ``policy@layer:keep:scores_from`` apart; what is not there is left out."""
    policy, *rest = (part.strip() for part in text.replace("@", ":", 1).split(":"))
    settings: dict[str, Any] = {"policy": policy}
    for name, part in zip(("layer", "keep", "scores_from", "too many colons"), rest, strict=False):
        if name in ("layer", "keep"):
            values = [_read_number(name, value.strip(), text) for value in part.split("/")]
            settings[name] = values if len(values) > 1 else values[0]
        else:
            settings[name] = part
    return settings


def _read_number(name: str, value: str, text: str) -> float | int:
    if value.isdecimal():
        return int(value)
    if name == "layer":
        raise ValueError(f"layer {value!r} of {text!r} is not a whole number")
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(
            f"keep {value!r} of {text!r} is neither a ratio like 0.25 nor a whole number of tokens"
        ) from error
