"""Settings held against the dataclass that takes them: their keys, the types of their values, and their ranges."""

import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from reprlib import repr as shown
from typing import Any

RANGES: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "above 0": lambda value: value > 0,
    "0 or above": lambda value: value >= 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
}
"""How an error calls a range -> whether a number is in it."""

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}


def check_keys(settings: Mapping[Any, Any], known: Iterable[str], *, what: str) -> None:
    """Raise ``ValueError`` at a key that is not known, naming the nearest one; ``what`` says what the keys are of."""
    known = list(known)
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown {what} key {key!r}{nearest_hint(key, known)}")


def check_types(settings: Mapping[str, Any], kind: type) -> None:
    """Hold values against the annotations of a dataclass.

    Whole numbers pass as numbers, truth values do not. Words that a library chooses from are left to it.

    Args:
        settings: keyword arguments of ``kind``; keys that it has not are passed over.
        kind: the dataclass.

    Raises:
        ValueError: naming key and value, and what it must be.
    """
    annotations = typing.get_type_hints(kind)
    for key, value in settings.items():
        if key in annotations and not _fits(value, annotations[key]):
            kinds = typing.get_args(annotations[key]) if _is_union(annotations[key]) else [annotations[key]]
            words = " or ".join(_WORDS.get(typing.get_origin(kind) or kind, str(kind)) for kind in kinds)
            raise ValueError(f"{key} is {shown(value)}, a {type(value).__name__}; it must be {words}")


def check_ranges(settings: Mapping[str, Any], ranges: Mapping[str, Iterable[str]]) -> None:
    """Raise ``ValueError`` at a number out of its range; what is absent or null passes.

    Args:
        settings: keys and values.
        ranges: a name of `RANGES` -> the keys of which it is asked.
    """
    for wanted, keys in ranges.items():
        for key in keys:
            value = settings.get(key)
            if value is not None and not RANGES[wanted](value):
                raise ValueError(f"{key} is {value}; it must be {wanted}")


def nearest_hint(word: object, known: Iterable[str]) -> str:
    """Return how an error about an unknown word goes on: the nearest known one, or else all of them."""
    known = list(known)
    nearest = get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"


def _fits(value: Any, annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation):
        return any(_fits(value, arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    kind = origin or annotation
    if kind not in _WORDS:  # an Enum, a Literal, or anything
        return True
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and abs(value) < math.inf
    return isinstance(value, kind)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
