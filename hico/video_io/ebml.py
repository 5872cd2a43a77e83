"""Elements of Matroska and webm files, and where a second file begins in files that were joined byte by byte."""

from collections.abc import Iterator
from typing import BinaryIO

HEADER, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675

MAX_HEADS = 1 << 10
"""Elements that may stand before the first cluster of a segment."""


def number_at(file: BinaryIO, at: int, *, keeps_mark: bool) -> tuple[int | None, int]:
    """Read a number whose leading zeros count its bytes, and return it with the place behind it.

    Args:
        file: the file.
        at: its first byte.
        keeps_mark: whether the bit that ends the zeros belongs to it, as in the kind of an element.

    Returns:
        The number, None where all its bits are set, which stands for unknown; and the byte that follows.
    """
    file.seek(at)
    data = file.read(8)
    width = 9 - data[0].bit_length() if data else 1
    value = int.from_bytes(data[:width], "big")
    if not keeps_mark:
        value &= (1 << 7 * width) - 1
        value = None if value == (1 << 7 * width) - 1 else value
    return value, at + width


def elements(file: BinaryIO, at: int, end: int) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield kind, first byte, first byte of the content and end of elements that follow each other.

    The end is None where an element does not tell its length; it is the last one then.
    """
    while at is not None and at < end:
        first = at
        kind, at = number_at(file, at, keeps_mark=True)
        size, content = number_at(file, at, keeps_mark=False)
        at = None if size is None else content + size
        yield kind, first, content, at


def later_heads(file: BinaryIO, end: int) -> list[tuple[int, int]]:
    """Return the first and past-the-last byte of what later files begin with, up to their first cluster."""
    found, header = [], None
    for kind, first, content, past in elements(file, 0, end):
        if kind == HEADER:
            header = first
        elif kind != SEGMENT:
            break
        elif header:
            inside = zip(range(MAX_HEADS), elements(file, content, min(past or end, end)), strict=False)
            cluster = next((at for _, (kind, at, *_) in inside if kind == CLUSTER), None)
            if cluster is None:
                break
            found.append((header, cluster))
    return found
