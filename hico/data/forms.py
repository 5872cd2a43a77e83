"""The forms of rows that LLaVA, OpenAI and ms-swift write: their keys, turns, parts and files.

A key that is not known here is an error, for what it means would be lost without a word; empty values mean nothing.
"""

import base64
import binascii
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from reprlib import repr as shown
from typing import Any

from hico.data.rowfiles import Blob, Source

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TALKS = {"conversations": ("from", "value"), "messages": ("role", "content")}
SYSTEM = ("system", "system_prompt")
STARTS, ENDS = ("start", "video_start", "start_time"), ("end", "video_end", "end_time")
FRAMES = ("fps", "num_frames", "nframes")
VIDEO = (*STARTS, *ENDS, "clip", *FRAMES)
"""Keys of a row or a part that say something about its videos."""
NOTES = (
    *("id", "idx", "index", "uid", "source", "data_source", "dataset", "task", "type", "category", "model"),
    *("meta", "metadata", "width", "height", "length"),
)
"""Keys of a row that datasets keep for themselves."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
_MARKS = re.compile(r"<\|(im_start|im_end|image_pad|video_pad)\|>")
_ONE_LINE = re.compile(r"[^\0\1\n]+")
_NAMES = {str: "text", list: "a list", Mapping: "a mapping"}


@dataclass(frozen=True)
class Media:
    """One video or image of a row."""

    kind: str
    """``video`` or ``image``."""
    source: Source | tuple[Source, ...]
    """A file, a folder of frames, a member of a shard, or bytes; several are the frames of one video."""
    start: float | None = None
    """Seconds at which a video begins; its own beginning if omitted."""
    end: float | None = None
    """Seconds at which it ends."""
    num_frames: int | None = None
    """Frames to take of a video, however long it is; as for all videos if omitted."""
    fps: float | None = None
    """Frames per second to take of a video, within the bounds for all."""


def read_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the turns ``{"role", "content": [parts], "loss"}`` of a row, with media parts that hold their `Media`.

    Raises:
        ValueError, KeyError: if they are malformed.
    """
    key = next((key for key in TALKS if key in row), None)
    if key is None:
        raise ValueError(f"it has neither 'conversations' nor 'messages', but {', '.join(map(str, row)) or 'nothing'}")
    turns = [_turn(_typed(turn, Mapping, "a turn"), *TALKS[key]) for turn in _typed(row[key], list, repr(key))]
    for key in SYSTEM:
        if row.get(key):
            text = _typed(row[key], str, repr(key))
            turns.insert(0, {"role": "system", "content": [_part({"type": "text", "text": text})]})
    roles = [turn["role"] for turn in turns]
    if "user" not in roles or "assistant" not in roles:
        raise ValueError(f"speakers are {', '.join(roles) or 'missing'}; a row needs a user and an assistant turn")
    if "system" in roles[1:]:
        raise ValueError("the system turn is not the first, or there are two")
    if roles.index("assistant") < roles.index("user"):
        raise ValueError("the assistant speaks before the user; begin with a user turn")
    if not any(turn.get("loss", True) for turn in turns if turn["role"] == "assistant"):
        raise ValueError("'loss' is false for every answer, so nothing can be learned from it")
    return turns


def read_media(row: Mapping[str, Any]) -> list[Media]:
    """Return the videos and images that a row names beside its turns.

    Raises:
        ValueError: if they are malformed.
    """
    media, about = [], {name: row[name] for name in row if name in VIDEO and not _is_empty(row[name])}
    for key in ("video", "videos", "image", "images"):
        files, kind = row.get(key), key.removesuffix("s")
        if _is_empty(files):
            continue
        files = files if isinstance(files, list) else [files]
        if kind == "video" and all(map(_is_picture, files)):
            files = [files]
        said = {name: _per_item(value, len(files), name) for name, value in about.items() if kind == "video"}
        for number, file in enumerate(files):
            source = _source(file, kind, repr(key))
            media.append(_medium(kind, source, {name: values[number] for name, values in said.items()}))
    if about and not any(item.kind == "video" for item in media):
        name, value = next(iter(about.items()))
        raise ValueError(f"{name} is {shown(value)}, but it names no 'video' that this could bound")
    return media


def check_row_keys(row: Mapping[str, Any], others: Collection[str]) -> None:
    """Raise ``ValueError`` at a key of a row that is neither known nor among ``others``, nor empty."""
    known = (*TALKS, *SYSTEM, "video", "videos", "image", "images", "duration", *VIDEO)
    said = {key: value for key, value in row.items() if key not in (*NOTES, *others)}
    if "rejected" in said or "chosen" in said or "rejected_response" in said:
        raise ValueError("it has two answers, which only preference rows have; see objective: preference")
    _check_keys(said, known, "a row", "; if it is a note, name it in other_keys of the dataset")


def seconds(values: Mapping[str, Any], name: str) -> float | None:
    """Return a time of a row in seconds, or ``None`` if it has none.

    Raises:
        ValueError: if it is no number of 0 or more.
    """
    return None if values.get(name) is None else _number(values[name], name, "seconds, 0 or more")


def _turn(turn: Mapping[str, Any], speaker: str, content: str) -> dict[str, Any]:
    _check_keys(turn, (speaker, content, "loss", "weight"), "a turn")
    role, said = ROLES.get(_typed(turn[speaker], str, "the speaker")), turn[content]
    if role is None:
        raise ValueError(f"unknown speaker {shown(turn[speaker])}; use one of {', '.join(ROLES)}")
    if not isinstance(said, str | list):
        raise ValueError(f"the content is {shown(said)}; it must be text or a list of parts")
    parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
    parts = [_part(_typed(part, Mapping, "a content part")) for part in parts]
    if role == "assistant" and not any(part["type"] == "text" and part["text"].strip() for part in parts):
        raise ValueError("an answer is empty, so nothing can be learned from it; write it or remove the turn")
    result = {"role": role, "content": parts}
    for key in ("loss", "weight"):
        if turn.get(key) is not None:
            if turn[key] not in (0, 1) or (turn[key] and role != "assistant"):
                raise ValueError(f"{key!r} of a {role} turn is {shown(turn[key])}; answers take 0 or 1, others 0")
            result["loss"] = bool(turn[key])
    return result


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = _typed(part["type"], str, "'type'").removesuffix("_url")
    if kind == "text":
        _check_keys(part, ("type", "text"), "a text part")
        text = _typed(part["text"], str, "'text'")
        text.encode()  # raises for half a surrogate pair, which JSON can write
        if mark := _MARKS.search(text):
            raise ValueError(f"the text holds {mark[0]}, which would be read as the border of a turn or as pixels")
        return {"type": "text", "text": text}
    if kind not in ("video", "image"):
        raise ValueError(f"unknown content type {shown(part['type'])}; use text, image or video")
    own = part["type"]
    _check_keys(part, ("type", "path", "url", own, *VIDEO), f"a part of type {own!r}")
    file = part.get("path") or part.get("url") or part[own]
    if isinstance(file, Mapping) and "url" in file:
        _check_keys(file, ("url", *(["detail"] if file.get("detail") == "auto" else [])), f"an {own!r}")
        file = file["url"]
    source = _source(file, kind, f"the file of {'an image' if kind == 'image' else 'a video'}")
    return {"type": kind, "media": _medium(kind, source, part)}


def _source(file: Any, kind: str, what: str) -> str | Blob | tuple:
    """Return a file as a row names it: a path, bytes as tables and data URLs hold them, or the frames of a video."""
    if kind == "video" and isinstance(file, list) and file:
        return tuple(_source(frame, "image", what) for frame in file)
    if isinstance(file, Mapping) and set(file) == {"bytes", "path"}:
        if isinstance(file["bytes"], bytes):
            return Blob(file["path"] or "bytes", file["bytes"])
        file = file["path"]
    if not isinstance(file, str) or not file:
        raise ValueError(
            f"{what} is {shown(file)}; it must be a path" + (" or a list of paths" if "'" in what else "")
        )
    if file.startswith("data:"):
        try:
            return Blob(file[:30], base64.b64decode(file.partition("base64,")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(f"{what} is {shown(file)}, which is not base64: {error}") from error
    if not _ONE_LINE.fullmatch(file):
        raise ValueError(f"{what} is {shown(file)}, which holds a control character")
    return file.removeprefix("file://")


def _medium(kind: str, source: Any, said: Mapping[str, Any]) -> Media:
    given = {name: value for name, value in said.items() if name in VIDEO and not _is_empty(value)}
    if not given:
        return Media(kind, source)
    if kind == "image":
        for name in given:
            raise ValueError(f"{name} is {shown(given[name])}, but an image has no time")
    if "clip" in given:
        if not isinstance(given["clip"], list) or len(given["clip"]) != 2:
            raise ValueError(f"clip is {shown(given['clip'])}; give [start, end] in seconds")
        given |= dict(zip(("start", "end"), given.pop("clip"), strict=True))
    start, end = (_only({name: seconds(given, name) for name in names if name in given}) for names in (STARTS, ENDS))
    if end is not None and end <= (start or 0):
        raise ValueError(f"start {start} and end {end} do not bound a clip; use 0 <= start < end (seconds)")
    counts = {name: _number(given[name], name, "a whole number, 1 or more") for name in FRAMES[1:] if name in given}
    count, fps = _only(counts), _number(given["fps"], "fps", "frames per second") if "fps" in given else None
    if (count is not None and (count < 1 or count % 1)) or fps == 0 or (count and fps):
        raise ValueError(f"num_frames {count} and fps {fps} say nothing; give a whole number, or a rate above 0")
    return Media(kind, source, start, end, None if count is None else int(count), fps)


def _only(values: Mapping[str, Any]) -> Any:
    if len(set(values.values())) > 1:
        raise ValueError(f"{' and '.join(values)} contradict each other; keep one")
    return next(iter(values.values()), None)


def _per_item(value: Any, count: int, name: str) -> list[Any]:
    is_one = not isinstance(value, list) or (name == "clip" and not any(isinstance(item, list) for item in value))
    values = [value] * count if is_one else value
    if count and len(values) != count:
        raise ValueError(f"{name!r} has {len(values)} entries for {count} files")
    return values


def _number(value: Any, name: str, wanted: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {shown(value)}; give {wanted}")
    return number


def _check_keys(values: Mapping[str, Any], known: Collection[str], what: str, hint: str = "") -> None:
    for key, value in values.items():
        if key not in known and not _is_empty(value):
            nearest = get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{what} has the key {shown(key)}, which means nothing here"
                + (f"; did you mean {nearest[0]!r}?" if nearest else hint)
            )


def _is_empty(value: Any) -> bool:
    return value is None or (not value and isinstance(value, str | list | Mapping))


def _is_picture(file: Any) -> bool:
    return isinstance(file, str) and file.lower().endswith(PICTURES)


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {shown(value)}; it must be {_NAMES[kind]}")
    return value
