"""What batches, checks and splits need to know of every row of a file, found out once for its content."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import current_process, get_all_start_methods, get_context
from typing import Any

import numpy as np

from hico.data.cache import cached, pack_texts, unpack_texts
from hico.data.pairs import parse_pair
from hico.data.records import Record, parse_row
from hico.data.rowfiles import Blob, RowFiles, ShardMember, Source

MODALITIES = ("text", "image", "video")


@dataclass(frozen=True)
class Survey:
    """Facts about all rows of a file; of malformed ones, only the reason."""

    file: RowFiles
    rows: np.ndarray
    """Structured ``(n,)``: see `_ROW`."""
    names: list[str]
    """Of every video and image, in the order of rows; frames that are named one by one are joined by newlines."""
    reasons: dict[int, str]
    """Row -> why it is malformed."""

    @cached_property
    def _ends(self) -> list[int]:
        return [0, *self.rows["names_end"].tolist()]

    def files_of(self, row: int, root: str) -> Iterator[list[Source]]:
        """Yield the file of every video and image of a row; of a video of single frames, its frames."""
        for joined in self.names[self._ends[row] : self._ends[row + 1]]:
            names = joined.split("\n")
            yield [Blob(name, b"") if name.startswith("\1") else self.file.source(row, name, root) for name in names]


_ROW = [("modality", "i1"), ("text_bytes", "<i4"), ("num_images", "<i4"), ("num_videos", "<i4"), ("seconds", "<f4")]
_ROW += [("names_end", "<i8"), ("text_key", "<u8")]
_AT_ONCE = 10_000
"""Rows that a process parses at once; of longer files, all cores do."""


def survey(file: RowFiles, other_keys: Collection[str], *, preferences: bool = False) -> Survey:
    """Parse every row of a file once, or look up what came of it the last time.

    Args:
        file: its rows.
        other_keys: see `hico.data.records.parse_row`.
        preferences: whether they are preference rows, see `hico.data.pairs.parse_pair`.
    """
    content = [file.sha256, json.dumps(sorted(other_keys)), *(["preferences"] if preferences else [])]
    found = cached("survey", content, lambda: _survey(file, other_keys, parse_pair if preferences else parse_row))
    rows, count = found["rows"], int(found["num_names"])
    reasons = unpack_texts(found["reasons"], len(found["malformed"]))
    return Survey(
        file,
        rows,
        unpack_texts(found["names"], count),
        {
            row: f"malformed row at {file.where(row)}: {why}"
            for row, why in zip(found["malformed"].tolist(), reasons, strict=True)
        },
    )


def _survey(file: RowFiles, other_keys: Collection[str], parse: Callable[..., Record]) -> dict[str, np.ndarray]:
    parts = [range(start, min(start + _AT_ONCE, len(file))) for start in range(0, len(file), _AT_ONCE)]
    read = partial(_survey_part, file, other_keys, parse)
    may_fork = "fork" in get_all_start_methods() and not current_process().daemon
    if len(parts) > 1 and may_fork:
        with get_context("fork").Pool(min(len(parts), os.cpu_count() or 1)) as pool:
            found = pool.map(read, parts, chunksize=1)
    else:
        found = map(read, parts)
    rows, names, reasons = [], [], {}
    for some_rows, some_names, some_reasons in found:
        some_rows["names_end"] += len(names)
        rows.append(some_rows)
        names += some_names
        reasons |= some_reasons
    return {
        "rows": np.concatenate(rows) if rows else np.zeros(0, dtype=_ROW),
        "names": pack_texts(names),
        "num_names": np.array(len(names)),
        "malformed": np.array(list(reasons), dtype=np.int64),
        "reasons": pack_texts([why.replace("\0", " ") for why in reasons.values()]),
    }


def _survey_part(
    file: RowFiles, other_keys: Collection[str], parse: Callable[..., Record], indices: range
) -> tuple[np.ndarray, list[str], dict[int, str]]:
    rows, names, reasons = [], [], {}
    for index in indices:
        try:
            record = parse(file[index], file, index, other_keys=other_keys)
        except ValueError as error:
            where = file.where(index)
            reasons[index] = str(error).removeprefix(f"malformed row at {where}: ").removeprefix(f"{where} ")
            rows.append((0, 0, 0, 0, math.nan, len(names), 0))
            continue
        names += [_name(media.source) for media in record.media]
        texts = [part["text"] for turn in record.longest_talk for part in turn["content"] if part["type"] == "text"]
        num_videos = sum(media.kind == "video" for media in record.media)
        rows.append(
            (
                MODALITIES.index(record.modality),
                sum(len(text.encode()) for text in texts),
                len(record.media) - num_videos,
                num_videos,
                _seconds(record),
                len(names),
                key_of("\n".join(texts)),
            )
        )
    return np.array(rows, dtype=_ROW), names, reasons


def key_of(text: str) -> int:
    """Return 64 bits of the digest of a text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def _name(source: Any) -> str:
    if isinstance(source, tuple):
        return "\n".join(map(_name, source))
    if isinstance(source, Blob):
        return "\1" + hashlib.sha256(source.data).hexdigest()
    return source.name if isinstance(source, ShardMember) else source


def _seconds(record: Record) -> float:
    clips = [media.end - media.start for media in record.media if media.start is not None and media.end is not None]
    return sum(clips) if clips else math.nan if record.duration is None else record.duration
