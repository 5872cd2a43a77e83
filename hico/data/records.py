"""Rows of training data, of any known form, brought to one."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from hico.data.rowfiles import RowFile, Shard, ShardMember

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PLACEHOLDER = re.compile(r"(<image>|<video>)")
_MARKS = re.compile(r"<\|(im_start|im_end|image_pad|video_pad)\|>")
_NAMES = {str: "text", list: "a list", Mapping: "a mapping"}


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

    Whether the files exist is not asked.

    Args:
        row: the parsed row.
        rows: where it comes from.
        index: its number there.
        root: folder that its file names are relative to.

    Raises:
        ValueError: if the row is malformed; the message gives file and line.
    """
    try:
        turns = _turns(row)
        media = _media(row)
        inside = [part.pop("media") for turn in turns for part in turn["content"] if "media" in part]
        if media and inside:
            raise ValueError("it names files both in its parts and under 'video' or 'image'; keep one way")
        media += inside
        _place_media(turns, [item.kind for item in media])
        media = [
            Media(item.kind, rows.source(index, str(item.source), root), item.start, item.end)
            for item in _in_order(media, turns)
        ]
        return Record(turns, media, rows.where(index), duration=_seconds(row, "duration"))
    except (ValueError, KeyError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"malformed row at {rows.where(index)}: {reason}") from error


def _turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    for key, speaker, content in (("conversations", "from", "value"), ("messages", "role", "content")):
        if key in row:
            turns = [_typed(turn, Mapping, "a turn") for turn in _typed(row[key], list, repr(key))]
            messages = [_message(turn[speaker], turn[content]) for turn in turns]
            break
    else:
        raise ValueError(f"it has neither 'conversations' nor 'messages', but {', '.join(map(str, row)) or 'nothing'}")
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles:
        raise ValueError(f"speakers are {', '.join(roles) or 'missing'}; a row needs a user and an assistant turn")
    if "system" in roles[1:]:
        raise ValueError("the system turn is not the first")
    if roles.index("assistant") < roles.index("user"):
        raise ValueError("the assistant speaks before the user; begin with a user turn")
    return messages


def _message(speaker: Any, content: Any) -> dict[str, Any]:
    role = ROLES.get(_typed(speaker, str, "the speaker"))
    if role is None:
        raise ValueError(f"unknown speaker {shown(speaker)}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str | list):
        raise ValueError(f"the content is {shown(content)}; it must be text or a list of parts")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [_part(_typed(part, Mapping, "a content part")) for part in parts]
    if role == "assistant" and not any(part["type"] == "text" and part["text"].strip() for part in parts):
        raise ValueError("an answer is empty, so nothing can be learned from it; write it or remove the turn")
    return {"role": role, "content": parts}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = _typed(part["type"], str, "'type'").removesuffix("_url")
    if kind == "text":
        text = _typed(part["text"], str, "'text'")
        text.encode()  # raises for half a surrogate pair, which JSON can write
        if mark := _MARKS.search(text):
            raise ValueError(f"the text holds {mark[0]}, which would be read as the border of a turn or as pixels")
        return {"type": "text", "text": text}
    if kind not in ("video", "image"):
        raise ValueError(f"unknown content type {shown(part['type'])}; use text, image or video")
    source = part.get("path") or part.get("url") or part[part["type"]]
    source = source["url"] if isinstance(source, Mapping) else source
    path = _typed(source, str, f"the file of {'an image' if kind == 'image' else 'a video'}")
    return {"type": kind, "media": _medium(kind, path.removeprefix("file://"), part)}


def _media(row: Mapping[str, Any]) -> list[Media]:
    media = []
    for kind in ("video", "image"):
        for key in (kind, kind + "s"):
            paths = row.get(key)
            paths = paths if isinstance(paths, list) else [] if paths in (None, "") else [paths]
            if not all(isinstance(path, str) and path for path in paths):
                raise ValueError(f"{key!r} is {shown(row[key])}; it must be a path or a list of paths")
            times = {name: _per_item(row.get(name), len(paths), name) for name in ("start", "end") if kind == "video"}
            media += [
                _medium(kind, path, {name: values[number] for name, values in times.items()})
                for number, path in enumerate(paths)
            ]
    if not any(item.kind == "video" for item in media):
        for name in ("start", "end"):
            if row.get(name) is not None:
                raise ValueError(f"{name} is {shown(row[name])}, but it names no 'video' that this could bound")
    return media


def _per_item(value: Any, count: int, name: str) -> Sequence[Any]:
    values = value if isinstance(value, list) else [value] * count
    if count and len(values) != count:
        raise ValueError(f"{name!r} has {len(values)} entries for {count} files")
    return values


def _medium(kind: str, path: str, times: Mapping[str, Any]) -> Media:
    start, end = _seconds(times, "start"), _seconds(times, "end")
    for name, value in (("start", start), ("end", end)):
        if kind == "image" and value is not None:
            raise ValueError(f"{name} is {value:g}, but an image has no time")
    if end is not None and end <= (start or 0):
        raise ValueError(f"start {start} and end {end} do not bound a clip; use 0 <= start < end (seconds)")
    return Media(kind, path, start, end)


def _seconds(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} is {shown(value)}; give seconds, 0 or more")
    return seconds


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {shown(value)}; it must be {_NAMES[kind]}")
    return value


def _place_media(turns: list[dict[str, Any]], kinds: list[str]) -> None:
    """Turn the placeholders in user texts into media parts; see `parse_row`."""
    only_one_kind = len(set(kinds)) == 1
    for message in (turn for turn in turns if turn["role"] == "user"):
        parts = []
        for part in message["content"]:
            pieces = _PLACEHOLDER.split(part["text"]) if part["type"] == "text" else [None]
            if len(pieces) == 1:
                parts.append(part)
                continue
            for piece in pieces:
                if _PLACEHOLDER.fullmatch(piece):
                    parts.append({"type": kinds[0] if only_one_kind else piece[1:-1]})
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
        raise ValueError(f"there are {len(placed)} placeholder(s) ({', '.join(placed)}) for {len(kinds)} file(s)")
    elif len(placed) == 1:
        turn = next(turn for turn in turns if any(part["type"] != "text" for part in turn["content"]))
        texts = [part["text"] for part in turn["content"] if part["type"] == "text"]
        if turn["content"][0]["type"] == "text":
            texts = ["".join(texts).strip()]
        turn["content"] = [{"type": placed[0]}] + [{"type": "text", "text": text} for text in texts]


def _in_order(media: list[Media], turns: list[dict[str, Any]]) -> list[Media]:
    queues = {kind: iter([item for item in media if item.kind == kind]) for kind in ("video", "image")}
    return [next(queues[p["type"]]) for turn in turns for p in turn["content"] if p["type"] != "text"]
