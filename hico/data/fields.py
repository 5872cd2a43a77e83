"""Settings held against the dataclass that takes them: their keys, the types of their values, and their ranges."""

import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from enum import Enum
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

    Whole numbers pass as numbers, truth values do not. Where an annotation names an `Enum`, words must be its.

    Args:
        settings: keyword arguments of ``kind``; keys that it has not are passed over.
        kind: the dataclass.

    Raises:
        ValueError: naming key and value, and what it must be.
    """
    annotations = typing.get_type_hints(kind)
    for key, value in settings.items():
        if key in annotations and not _fits(value, annotations[key]):
            choices = _choices(annotations[key])
            if isinstance(value, str) and choices:
                raise ValueError(f"{key} is {value!r}{nearest_hint(value, choices)}")
            words = " or ".join(dict.fromkeys(_words(annotations[key])))
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
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        # Beside an Enum, `str` stands for its words.
        words = any(map(_is_enum, args))
        return any(_fits(value, arg) for arg in args if not (words and arg is str))
    if origin is typing.Literal:
        # peft writes what is a pattern as `pissa_niter_[number of iters]`.
        return any(type(value) is type(arg) and (value == arg or "[" in str(arg)) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if _is_enum(annotation):
        return isinstance(value, annotation) or value in _choices(annotation)
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, int | float) and abs(value) < math.inf
    return isinstance(value, origin or annotation)


def _choices(annotation: Any) -> list[str]:
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if _is_enum(kind)]
    return [member.value for kind in kinds for member in kind]


def _words(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [word for arg in typing.get_args(annotation) for word in _words(arg)]
    if typing.get_origin(annotation) is typing.Literal:
        return [repr(arg) for arg in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (list, dict):
        inner = " to ".join(_words(arg)[0] for arg in typing.get_args(annotation) if arg is not Any)
        return [_WORDS[typing.get_origin(annotation)] + (f" of {inner}" if inner else "")]
    if _is_enum(annotation):
        return [f"one of {', '.join(_choices(annotation))}"]
    return [_WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))]


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)
