"""Where rows lie: JSON, JSONL and tar files, read one row at a time."""

import hashlib
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


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


class RowFile:
    """Rows of a JSON array or a JSONL file, kept as places in the file and parsed one at a time.

    Finding them takes memory for one line of a JSONL file, but for all of a JSON array.

    Args:
        path: the file; anything but ``.jsonl`` is read as one JSON array.

    Raises:
        ValueError: if the file does not parse; the message gives the line.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        digest = hashlib.sha256()
        spans = self._jsonl_spans(digest) if self.path.endswith(".jsonl") else self._array_spans(digest)
        self.sha256 = digest.hexdigest()
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop, _ = self._spans[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(stop - start))

    def where(self, index: int) -> str:
        """Return file and line of a row."""
        return f"{self.path}:{self._spans[index, 2]}"

    def source(self, index: int, name: str, root: str) -> str:
        """Return the path of a row's file."""
        return str(Path(root) / name) if root else name

    def _jsonl_spans(self, digest) -> list[tuple[int, int, int]]:
        spans, start = [], 0
        with open(self.path, "rb") as file:
            for line, text in enumerate(file, 1):
                digest.update(text)
                if text.strip():
                    try:
                        row = json.loads(text)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"{self.path}:{line} is not JSON: {error}") from error
                    self._check(row, line)
                    spans.append((start, start + len(text), line))
                start += len(text)
        return spans

    def _array_spans(self, digest) -> list[tuple[int, int, int]]:
        data = Path(self.path).read_bytes()
        digest.update(data)
        try:
            text = data.decode()
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
                row, end = decoder.raw_decode(text, here)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}:{getattr(error, 'lineno', line)} is not JSON: {error}") from error
            self._check(row, line)
            size = len(text[here:end].encode())
            spans.append((offset, offset + size, line))
            line += text.count("\n", here, end)
            offset, position = offset + size, end
            here = gap.match(text, end).end()
        if text[here + 1 :].strip():
            raise ValueError(f"{self.path}:{line} is followed by more text after the array of rows; join them in one")
        return spans

    def _check(self, row: Any, line: int) -> None:
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}:{line} is {type(row).__name__}; a row is a JSON object")


class Shard:
    """Rows of a tar file: per key a ``.json`` with the row, and the files that it names or that share its key.

    The digest covers names, places and sizes of the members and all rows, but not the media, which would have to be
    read in full.

    Args:
        path: an uncompressed tar file.

    Raises:
        ValueError: if it is not one.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._members: dict[str, ShardMember] = {}
        try:
            with tarfile.open(self.path, "r:") as tar:
                for info in tar:
                    if info.isfile():
                        self._members[info.name] = ShardMember(self.path, info.name, info.offset_data, info.size)
        except tarfile.TarError as error:
            raise ValueError(f"{self.path} is not an uncompressed tar file: {error}") from error
        self._rows = [member for name, member in self._members.items() if name.endswith(".json")]
        digest = hashlib.sha256(repr([(m.name, m.offset, m.size) for m in self._members.values()]).encode())
        for member in self._rows:
            digest.update(member.read())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = json.loads(self._rows[index].read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where(index)} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.where(index)} is {type(row).__name__}; a row is a JSON object")
        return row

    def where(self, index: int) -> str:
        """Return shard and member of a row."""
        return str(self._rows[index])

    def source(self, index: int, name: str, root: str) -> ShardMember:
        """Return a member by its name, or by its extension beside the row (``mp4`` or ``.mp4``).

        One that is not there is returned too, without a place.
        """
        key = self._rows[index].name.removesuffix(".json")
        folder = key.rpartition("/")[0]
        for candidate in (name, f"{folder}/{name}", f"{key}.{name.lstrip('.')}"):
            if candidate in self._members:
                return self._members[candidate]
        return ShardMember(self.path, name)


def exists(source: str | ShardMember) -> bool:
    """Say whether a file, a folder or a member of a shard is there."""
    return source.offset is not None if isinstance(source, ShardMember) else os.path.exists(source)


def open_source(source: str | ShardMember) -> str | io.BytesIO:
    """Return what a decoder can open."""
    return io.BytesIO(source.read()) if isinstance(source, ShardMember) else source
