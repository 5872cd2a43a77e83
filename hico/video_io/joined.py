"""FLV and Matroska files joined byte by byte: FFmpeg stops at later headers, so it is given the file without them."""

import io
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from hico.video_io.ebml import later_heads

FLV, MATROSKA = b"FLV\x01", b"\x1a\x45\xdf\xa3"

HEADER = re.compile(rb"FLV\x01[\x00-\x05]\x00\x00\x00\x09\x00{4}(?=[\x08\x09\x12])")
"""The header of FLV and the length, 0, of the tag before; a tag of sound, pictures or script follows."""

CHUNK = 1 << 20


def without_headers(file: BinaryIO) -> "Spliced | None":
    """Return a file object that leaves the second and later headers of a file out; None if it has but one."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    mark = file.read(len(FLV))
    later = list(_later_headers(file)) if mark == FLV else later_heads(file, end) if mark == MATROSKA else []
    return Spliced(file, later) if later else None


def _later_headers(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the first and past-the-last byte of the headers of FLV behind the first one."""
    file.seek(1)
    at, data = 1, b""
    while more := file.read(CHUNK):
        data += more
        yield from ((at + found.start(), at + found.end()) for found in HEADER.finditer(data))
        kept = data[-13:]  # One byte less than a match, so that none is found twice.
        at, data = at + len(data) - len(kept), kept


class Spliced(io.RawIOBase):
    """A file without some of its bytes.

    Args:
        file: seekable.
        gaps: first and past-the-last byte of what is left out, in order.
    """

    def __init__(self, file: BinaryIO, gaps: list[tuple[int, int]]):
        begins = [0, *(past for _, past in gaps)]
        ends = [*(first for first, _ in gaps), file.seek(0, os.SEEK_END)]
        self._file, self._parts, self._position = file, list(zip(begins, ends, strict=True)), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (sum(past - first for first, past in self._parts) if base is None else base)
        return self._position

    def read(self, size: int = -1) -> bytes:
        pieces, skipped = [], self._position
        for first, past in self._parts:
            length = past - first
            if skipped < length and size:
                self._file.seek(first + skipped)
                pieces.append(self._file.read(length - skipped if size < 0 else min(size, length - skipped)))
                size -= len(pieces[-1]) if size > 0 else 0
            skipped = max(0, skipped - length)
        data = b"".join(pieces)
        self._position += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()
