"""Where rows lie: JSON and JSONL files, read one row at a time, and what rows name: files and bytes."""

import hashlib
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hico.data.cache import cached


@dataclass(frozen=True)
class Blob:
    """Bytes that a row holds itself."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ShardMember:
    """A file inside an uncompressed tar file."""

    shard: str
    name: str
    offset: int | None = None
    """Place of its bytes in the tar file; none if it is not there."""
    size: int = 0

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises:
            FileNotFoundError: if the shard has no such file.
        """
        if self.offset is None:
            raise FileNotFoundError(f"there is no {self}")
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


Source = str | ShardMember | Blob
"""What a row means by a file."""


class RowFiles(Protocol):
    """Numbered rows, whatever holds them."""

    path: str
    sha256: str
    """Of the content."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row as it is written; raises ``ValueError`` if it is none."""

    def where(self, index: int) -> str:
        """Return how messages call a row."""

    def source(self, index: int, name: str, root: str) -> Source:
        """Return what a row means by the name of a file; ``root`` is the folder that names are relative to."""


class RowFile:
    """Rows of a JSON array or a JSONL file, kept as places in the file and parsed one at a time.

    Finding them takes memory for one line of a JSONL file, but for all of a JSON array.

    Args:
        path: the file; anything but ``.jsonl`` is read as one JSON array.

    Raises:
        ValueError: if it is no JSON array; the message gives the line.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.sha256 = file_sha256(self.path)
        if self.path.endswith(".jsonl"):
            self._spans = self._jsonl_spans()
        else:
            self._spans = cached("rows", [self.sha256], lambda: {"spans": self._array_spans()})["spans"]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop, _ = self._spans[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            return parse_json_row(file.read(stop - start), self.where(index))

    def where(self, index: int) -> str:
        """Return file and line of a row."""
        return f"{self.path}:{self._spans[index, 2]}"

    def source(self, index: int, name: str, root: str) -> str:
        """Return the path of a row's file."""
        return os.path.join(root, name)

    def _jsonl_spans(self) -> np.ndarray:
        spans, start = [], 0
        with open(self.path, "rb") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    spans.append((start, start + len(text), line))
                start += len(text)
        return np.array(spans, dtype=np.int64).reshape(-1, 3)

    def _array_spans(self) -> np.ndarray:
        try:
            text = Path(self.path).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from error
        decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
        opening = re.match(r"\s*\[", text)
        if not opening:
            raise ValueError(f"{self.path} is not a JSON array of rows; name it .jsonl if it has one row per line")
        spans, line, offset, position = [], 1, 0, 0
        here = gap.match(text, opening.end()).end()
        while text[here : here + 1] != "]":
            offset += len(text[position:here].encode())
            line += text.count("\n", position, here)
            try:
                _, end = decoder.raw_decode(text, here)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}:{getattr(error, 'lineno', line)} is not JSON: {error}") from error
            size = len(text[here:end].encode())
            spans.append((offset, offset + size, line))
            line += text.count("\n", here, end)
            offset, position = offset + size, end
            here = gap.match(text, end).end()
        if text[here + 1 :].strip():
            raise ValueError(f"{self.path}:{line} is followed by more text after the array of rows; join them in one")
        return np.array(spans, dtype=np.int64).reshape(-1, 3)


class TextFile:
    """A file of plain text, which is one row.

    Args:
        path: the file, in UTF-8.
    """

    source = RowFile.source

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.sha256 = file_sha256(self.path)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"text": Path(self.path).read_bytes().decode()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from error

    def where(self, index: int) -> str:
        """Return the path."""
        return self.path


def parse_json_row(text: bytes, where: str) -> dict[str, Any]:
    """Parse a row.

    Raises:
        ValueError: if it is no JSON object; the message begins with ``where``.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}; a row is a JSON object")
    return row


def file_sha256(*paths: str | Path) -> str:
    """Return the digest of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def exists(source: Source) -> bool:
    """Say whether a file, a folder or a member of a shard is there."""
    if isinstance(source, str):
        return os.path.exists(source)
    return isinstance(source, Blob) or source.offset is not None


def size_of(source: Source) -> int:
    """Return the bytes of a file; -1 for a folder, and for what is not there."""
    if isinstance(source, str):
        return os.path.getsize(source) if os.path.isfile(source) else -1
    return len(source.data) if isinstance(source, Blob) else source.size


def open_source(source: Source) -> str | io.BytesIO:
    """Return what a decoder can open."""
    if isinstance(source, str):
        return source
    return io.BytesIO(source.data if isinstance(source, Blob) else source.read())
