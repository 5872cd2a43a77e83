"""Rows of training data, of any known form, brought to one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hico.train.rowfiles import RowFile, Shard, ShardMember

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PLACEHOLDER = re.compile(r"(<image>|<video>)")


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
