"""Rows of training data: found in JSON, JSONL and tar files, and brought to one form."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PLACEHOLDER = re.compile(r"(<image>|<video>)")


@dataclass(frozen=True)
class ShardMember:
    """A file inside an uncompressed tar file."""

    shard: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the file's bytes."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


@dataclass(frozen=True)
class Media:
    """One video or image of a row."""

    kind: str
    """``video`` or ``image``."""
    source: str | ShardMember
    """A file, a folder of frames, or a member of a shard."""
    start: float | None = None
    """Seconds at which a video begins; its own beginning if omitted."""
    end: float | None = None
    """Seconds at which it ends."""


@dataclass(frozen=True)
class Record:
    """One conversation with its videos and images."""

    messages: list[dict[str, Any]]
    """Turns ``{"role", "content": [parts]}``; the media parts stand in the order of ``media``."""
    media: list[Media]
    where: str
    """File and line, for messages."""
    duration: float | None = None
    """Seconds that the row says its videos last together, if it does."""

    @property
    def modality(self) -> str:
        """``video`` if there is one, else ``image`` or ``text``."""
        kinds = {media.kind for media in self.media}
        return "video" if "video" in kinds else "image" if kinds else "text"

    @property
    def num_text_bytes(self) -> int:
        """Length of all text in bytes of UTF-8."""
        parts = [part for message in self.messages for part in message["content"] if part["type"] == "text"]
        return sum(len(part["text"].encode()) for part in parts)


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
                    except ValueError as error:
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
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path}:{error.lineno} is not JSON: {error}") from error
            self._check(row, line)
            size = len(text[here:end].encode())
            spans.append((offset, offset + size, line))
            line += text.count("\n", here, end)
            offset, position = offset + size, end
            here = gap.match(text, end).end()
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
        except ValueError as error:
            raise ValueError(f"{self.where(index)} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.where(index)} is {type(row).__name__}; a row is a JSON object")
        return row

    def where(self, index: int) -> str:
        """Return shard and member of a row."""
        return str(self._rows[index])

    def source(self, index: int, name: str, root: str) -> ShardMember:
        """Return a member by its name, or by its extension beside the row (``mp4`` or ``.mp4``).

        Raises:
            FileNotFoundError: if the shard has no such member.
        """
        key = self._rows[index].name.removesuffix(".json")
        folder = key.rpartition("/")[0]
        for candidate in (name, f"{folder}/{name}", f"{key}.{name.lstrip('.')}"):
            if candidate in self._members:
                return self._members[candidate]
        raise FileNotFoundError(f"{self.path}:{name}")


def parse_row(row: Mapping[str, Any], rows: RowFile | Shard, index: int, *, root: str = "") -> Record:
    """Bring a row to one form.

    LLaVA rows have ``conversations`` of ``from`` and ``value``; OpenAI rows have ``messages`` of ``role`` and
    ``content``, a text or a list of parts. Either kind may name files under ``video``, ``videos``, ``image`` or
    ``images``, which take the places of ``<video>`` and ``<image>`` in order; where a row has media of one kind only,
    both words stand for it. Without any such word the media open the first user turn, and a single one moves there.

    Args:
        row: the parsed row.
        rows: where it comes from.
        index: its number there.
        root: folder that its file names are relative to.

    Raises:
        ValueError: if the row is malformed; the message gives file and line.
        FileNotFoundError: if a shard lacks a file that the row names.
    """
    try:
        turns = _turns(row)
        media = _media(row)
        for message in turns:
            media += [part.pop("media") for part in message["content"] if "media" in part]
        _place_media(turns, [item.kind for item in media])
        media = [
            Media(item.kind, rows.source(index, str(item.source), root), item.start, item.end)
            for item in _in_order(media, turns)
        ]
        return Record(turns, media, rows.where(index), duration=_duration(row))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"malformed row at {rows.where(index)}: {reason}") from error


def _turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "conversations" in row:
        turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    elif "messages" in row:
        turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
    else:
        raise ValueError(f"it has neither 'conversations' nor 'messages', but {', '.join(map(str, row)) or 'nothing'}")
    messages = []
    for role, content in turns:
        if role not in ROLES:
            raise ValueError(f"unknown speaker {role!r}; use one of {', '.join(ROLES)}")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content]
        messages.append({"role": ROLES[role], "content": parts})
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles:
        raise ValueError(f"speakers are {', '.join(roles) or 'missing'}; a row needs a user and an assistant turn")
    if "system" in roles[1:]:
        raise ValueError("the system turn is not the first")
    return messages


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part["type"].removesuffix("_url")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in ("video", "image"):
        raise ValueError(f"unknown content type {part['type']!r}; use text, image or video")
    source = part.get("path") or part.get("url") or part[part["type"]]
    source = source["url"] if isinstance(source, Mapping) else source
    return {"type": kind, "media": Media(kind, source.removeprefix("file://"), part.get("start"), part.get("end"))}


def _media(row: Mapping[str, Any]) -> list[Media]:
    media = []
    for kind in ("video", "image"):
        for key in (kind, kind + "s"):
            paths = row.get(key) or []
            paths = paths if isinstance(paths, list) else [paths]
            if not all(isinstance(path, str) for path in paths):
                raise ValueError(f"{key!r} is {row[key]!r}; it must be a path or a list of paths")
            if kind == "image" or not paths:
                media += [Media(kind, path) for path in paths]
                continue
            starts, ends = (_per_item(row.get(name), len(paths), name) for name in ("start", "end"))
            for path, start, end in zip(paths, starts, ends, strict=True):
                if start is not None and end is not None and not 0 <= start < end:
                    raise ValueError(
                        f"start {start} and end {end} do not bound a clip; use 0 <= start < end (seconds)"
                    )
                media.append(Media(kind, path, start, end))
    return media


def _per_item(value: Any, count: int, name: str) -> Sequence[float | None]:
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name!r} has {len(values)} entries for {count} files")
    return [None if item is None else float(item) for item in values]


def _place_media(turns: list[dict[str, Any]], kinds: list[str]) -> None:
    """Turn the placeholders in user texts into media parts; see `parse_row`."""
    mixed = len(set(kinds)) > 1
    for message in (turn for turn in turns if turn["role"] == "user"):
        parts = []
        for part in message["content"]:
            pieces = _PLACEHOLDER.split(part["text"]) if part["type"] == "text" and kinds else [None]
            if len(pieces) == 1:
                parts.append(part)
                continue
            for piece in pieces:
                if _PLACEHOLDER.fullmatch(piece):
                    parts.append({"type": piece[1:-1] if mixed else kinds[0]})
                elif piece.strip():
                    # The chat template puts the newline that follows a placeholder.
                    after_media = parts and parts[-1]["type"] != "text"
                    parts.append({"type": "text", "text": piece.removeprefix("\n") if after_media else piece})
        message["content"] = parts
    placed = [part["type"] for turn in turns for part in turn["content"] if part["type"] != "text"]
    first = next(turn for turn in turns if turn["role"] == "user")
    if not placed:
        first["content"] = [{"type": kind} for kind in kinds] + first["content"]
    elif sorted(placed) != sorted(kinds):
        raise ValueError(f"there are {len(placed)} placeholders ({', '.join(placed)}) for {len(kinds)} files")
    elif len(placed) == 1:
        turn = next(turn for turn in turns if any(part["type"] != "text" for part in turn["content"]))
        texts = [part["text"] for part in turn["content"] if part["type"] == "text"]
        if turn["content"][0]["type"] == "text":
            texts = ["".join(texts).strip()]
        turn["content"] = [{"type": placed[0]}] + [{"type": "text", "text": text} for text in texts]


def _in_order(media: list[Media], turns: list[dict[str, Any]]) -> list[Media]:
    queues = {kind: iter([item for item in media if item.kind == kind]) for kind in ("video", "image")}
    return [next(queues[p["type"]]) for turn in turns for p in turn["content"] if p["type"] != "text"]


def _duration(row: Mapping[str, Any]) -> float | None:
    value = row.get("duration")
    return float(value) if isinstance(value, int | float) else None


def open_source(source: str | ShardMember) -> str | io.BytesIO:
    """Return what a decoder can open."""
    return io.BytesIO(source.read()) if isinstance(source, ShardMember) else source
