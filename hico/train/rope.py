"""Rotary positions of an LLM changed by a recipe, so that longer text fits: checked by what they do."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig

from hico.compat import takes_layer_type
from hico.data.fields import nearest_hint
from hico.llm_dropout.patch import find_decoder

_STRETCHED = ("linear", "yarn")
"""Types of scaling that reach ``factor`` times as far as before, and no further."""


def extend_positions(config: PreTrainedConfig, changes: Mapping[str, Any] | None, *, length: int) -> PreTrainedConfig:
    """Give an LLM's configuration other rotary positions, and room for ``length`` tokens.

    Args:
        config: of the LLM.
        changes: settings of ``config.rope_parameters``, such as ``{"rope_theta": 1e9}`` or
            ``{"rope_type": "yarn", "factor": 4.0}``; under the types of layers where that has them. None changes none.
        length: tokens of the longest sequence.

    Returns:
        A new configuration. With ``changes``, its ``max_position_embeddings`` is at least ``length``.

    Raises:
        ValueError: if the LLM has no rotary positions, a setting is unknown, has no effect or makes no numbers, or
            ``length`` is beyond what its positions allow.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not changes:
        if limit is not None and length > limit:
            hint = (
                "set rope_parameters, such as {rope_theta: 1.0e9}, or lower max_length"
                if getattr(config, "rope_parameters", None)
                else "its positions are learned, so lower max_length"
            )
            raise ValueError(f"max_length {length:,} is beyond the {limit:,} positions of {config.model_type}; {hint}")
        return config
    before = getattr(config, "rope_parameters", None)
    if not before:
        raise ValueError(f"rope_parameters change rotary positions, and {config.model_type} has none; leave them out")
    extended = _with(config, _merged(before, changes))
    rotary = _rotary_type(config)
    angles = _angles(rotary, extended, length)
    if not all(angle.isfinite().all() for angle in angles):
        raise ValueError(f"rope_parameters {dict(changes)} make positions that are no numbers; rope_theta is above 0")
    if _same(_angles(rotary, config, length), angles):
        raise ValueError(f"rope_parameters {dict(changes)} change nothing: the model has {dict(before)}")
    for path in _paths(changes):
        if not _matters(rotary, extended, path, length):
            raise ValueError(
                f"rope_parameters sets {'.'.join(path)}, which has no effect beside {extended.rope_parameters}; leave "
                "it out, or set the rope_type that reads it"
            )
    for kind, rope in _ropes(extended.rope_parameters):
        reach = (rope.get("original_max_position_embeddings") or limit or 0) * (rope.get("factor") or 1)
        if rope.get("rope_type") in _STRETCHED and length > reach > 0:
            raise ValueError(
                f"max_length {length:,} is beyond the {reach:,.0f} positions that {kind}rope_type {rope['rope_type']} "
                f"with factor {rope['factor']:g} reaches; raise factor, or lower max_length"
            )
    reads_limit = any(rope.get("rope_type") == "dynamic" for _, rope in _ropes(extended.rope_parameters))
    if limit is not None and length > limit and not reads_limit:
        extended.max_position_embeddings = length
    return extended


def _merged(before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    kinds = [key for key, value in before.items() if isinstance(value, Mapping)]
    for key, value in changes.items():
        if kinds and (key not in kinds or not isinstance(value, Mapping)):
            raise ValueError(
                f"rope_parameters sets {key!r}, but this model has such settings per type of layer: give "
                f"{{{kinds[0]}: {{{key if key not in kinds else 'rope_theta'}: ...}}}}{nearest_hint(key, kinds)}"
            )
    return {
        **copy.deepcopy(dict(before)),
        **{key: {**before[key], **value} if key in kinds else value for key, value in changes.items()},
    }


def _with(config: PreTrainedConfig, rope: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a configuration with other rotary settings, completed as transformers does."""
    settings = {**config.to_dict(), "rope_parameters": copy.deepcopy(dict(rope))}
    try:
        return type(config).from_dict(settings)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"rope_parameters {dict(rope)} do not describe rotary positions: {error!r}") from error


def _rotary_type(config: PreTrainedConfig) -> type[nn.Module]:
    # The bare class: under ZeRO-3 `from_config` would shard a model that is only asked for its parts.
    with torch.device("meta"):
        return type(find_decoder(MODEL_MAPPING[type(config)](config))[0].rotary_emb)


def _angles(rotary_type: type[nn.Module], config: PreTrainedConfig, length: int) -> list[Tensor]:
    """Return what queries and keys are multiplied by at the second and the last position, per type of layer."""
    try:
        rotary = rotary_type(config)
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"rope_parameters {config.rope_parameters} cannot be used: {error!r}") from error
    kinds = dict.fromkeys(config.layer_types) if takes_layer_type(rotary) else [None]
    positions = torch.tensor([[1, length - 1]])
    found = []
    for kind in kinds:
        named = {} if kind is None else {"layer_type": kind}
        found += rotary(torch.zeros(1, 2, 1), position_ids=positions, **named)
    return found


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _matters(rotary: type[nn.Module], config: PreTrainedConfig, path: tuple[str, ...], length: int) -> bool:
    """Say whether another value of a setting would make other positions, or none."""
    rope = copy.deepcopy(config.rope_parameters)
    below = rope
    for key in path[:-1]:
        below = below[key]
    value = below.get(path[-1])
    if path[-1] == "rope_type" or value is None:
        return True  # the others tell
    as_asked = _angles(rotary, config, length)
    for factor in (2, 1000):  # few frequencies hardly feel some settings
        below[path[-1]] = _other(value, factor)
        try:
            if not _same(as_asked, _angles(rotary, _with(config, rope), length)):
                return True
        except Exception:  # a value that cannot be used was read
            return True
    return False


def _other(value: Any, factor: int) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return not value
    return [_other(item, factor) for item in value] if isinstance(value, list) else value * factor + 1


def _paths(changes: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, key))
        else:
            yield (*above, key)


def _ropes(rope: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the settings of every type of layer, each with the type for messages."""
    nested = [(f"{key}'s ", value) for key, value in rope.items() if isinstance(value, Mapping)]
    return nested or [("", rope)]
