"""Settings held against the dataclass that takes them: their keys, and the types of their values."""

import types
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from reprlib import repr as shown
from typing import Any, Literal

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
    """Hold values against the annotations of a dataclass; whole numbers pass as numbers, truth values do not.

    Args:
        settings: keyword arguments of ``kind``; keys that it has not are passed over.
        kind: the dataclass.

    Raises:
        ValueError: naming key and value, and what it must be.
    """
    annotations = typing.get_type_hints(kind)
    for key, value in settings.items():
        if key in annotations and not _fits(value, annotations[key]):
            raise ValueError(f"{key} is {shown(value)}; it must be {_in_words(annotations[key])}")


def nearest_hint(word: object, known: Iterable[str]) -> str:
    """Return how an error about an unknown word goes on: the nearest known one, or else all of them."""
    known = list(known)
    nearest = get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"


def _fits(value: Any, annotation: Any) -> bool:
    kind, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if kind is Literal:
        return value in args
    if kind is Any:
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False
    items = value.items() if kind is dict and args else [(item,) for item in value] if kind is list and args else []
    return all(all(map(_fits, item, args)) for item in items)


def _in_words(annotation: Any) -> str:
    kind, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, args))
    if kind is Literal:
        return " or ".join(map(repr, args))
    of = f" of {_in_words(args[-1])}" if args and args[-1] is not Any else ""
    return _WORDS[kind] + of
