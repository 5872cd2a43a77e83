"""Rows of training data, of any known form, brought to one."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hico.data.forms import Media, check_row_keys, read_media, read_turns, seconds
from hico.data.rowfiles import RowFiles

_PLACEHOLDER = re.compile(r"(<image>|<video>)")


@dataclass(frozen=True)
class Record:
    """One conversation with its videos and images."""

    messages: list[dict[str, Any]]
    """Turns ``{"role", "content": [parts]}``; the media parts stand in the order of ``media``. A turn with ``loss``
    False is not learned."""
    media: list[Media]
    where: str
    """File and line, for messages."""
    duration: float | None = None
    """Seconds that the row says its videos last together, if it does."""
    rejected: list[dict[str, Any]] | None = None
    """Of a preference row, whose ``messages`` end with the chosen answer: the same with the other one."""

    @property
    def modality(self) -> str:
        """``video`` if there is one, else ``image`` or ``text``."""
        kinds = {media.kind for media in self.media}
        return "video" if "video" in kinds else "image" if kinds else "text"

    @property
    def talks(self) -> list[list[dict[str, Any]]]:
        """The conversation; of a preference row both, with the chosen answer and with the other."""
        return [self.messages] if self.rejected is None else [self.messages, self.rejected]

    @property
    def longest_talk(self) -> list[dict[str, Any]]:
        """The conversation, with the longer of two answers."""
        return max(self.talks, key=_num_bytes)


def parse_row(
    row: Mapping[str, Any], rows: RowFiles, index: int, *, root: str = "", other_keys: Collection[str] = ()
) -> Record:
    """Bring a row to one form.

    `docs/data.md` shows the forms. Files that a row names under ``video``, ``videos``, ``image`` or ``images`` take
    the places of ``<video>`` and ``<image>`` in order; where a row has media of one kind only, both words stand for
    it. Without any such word the media open the first user turn, and a single one moves there.

    Whether the files exist is not asked.

    Args:
        row: the parsed row.
        rows: where it comes from.
        index: its number there.
        root: folder that its file names are relative to.
        other_keys: keys of the row that are known to mean nothing here.

    Raises:
        ValueError: if the row is malformed; the message gives file and line.
    """
    try:
        check_row_keys(row, other_keys)
        turns, media = read_turns(row), read_media(row)
        inside = [part.pop("media") for turn in turns for part in turn["content"] if "media" in part]
        if media and inside:
            raise ValueError("it names files both in its parts and under 'video' or 'image'; keep one way")
        media += inside
        _place_media(turns, [item.kind for item in media])
        media = [replace(item, source=_found(item.source, rows, index, root)) for item in _in_order(media, turns)]
        return Record(turns, media, rows.where(index), duration=seconds(row, "duration"))
    except (ValueError, KeyError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"malformed row at {rows.where(index)}: {reason}") from error


def _num_bytes(messages: list[dict[str, Any]]) -> int:
    parts = [part for message in messages for part in message["content"] if part["type"] == "text"]
    return sum(len(part["text"].encode()) for part in parts)


def _found(source: Any, rows: RowFiles, index: int, root: str) -> Any:
    if isinstance(source, tuple):
        return tuple(_found(frame, rows, index, root) for frame in source)
    return rows.source(index, source, root) if isinstance(source, str) else source


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
