"""The packets of an mp4, from its own tables: no need to read two hours of video to know when its frames are shown."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO

import numpy as np

from hico.video_io.packets import CLOSED, KEY, Packets

MAX_TABLE = 1 << 28
"""Bytes of tables that are read at most."""

MAX_BOXES = 1 << 20
"""Outermost boxes that are looked at; two hours in fragments of a second have 14,400."""

BEGINNINGS = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"pnot"})
"""The first box of an mp4 or QuickTime file."""

CONTAINERS = frozenset({b"trak", b"mdia", b"minf", b"stbl", b"edts"})

Boxes = dict[bytes, bytes]


def boxes(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, first byte of the content and past-the-last byte of the outermost boxes; a last one may go on."""
    at = 0
    for _ in range(MAX_BOXES):
        if at + 8 > end:
            return
        file.seek(at)
        head = file.read(16)
        size, kind, begin = int.from_bytes(head[:4], "big"), head[4:8], at + 8
        if size == 1 and len(head) == 16:
            size, begin = int.from_bytes(head[8:], "big"), at + 16
        past = end if size == 0 else at + size
        if past < begin:
            return
        yield kind, begin, past
        at = past


def read_tables(file: BinaryIO, end: int) -> list[Boxes]:
    """Return the tables of each track of an mp4, as far as they are there; nothing for any other file."""
    file.seek(4)
    if file.read(4) not in BEGINNINGS:
        return []
    for kind, begin, past in boxes(file, end):
        if kind == b"moov" and past <= end and past - begin <= MAX_TABLE:
            file.seek(begin)
            parts = list(_inside(file.read(past - begin)))
            common = {kind: inner for kind, inner in parts if kind in {b"mvhd", b"mvex"}}
            return [{**common, **_flat(inner)} for kind, inner in parts if kind == b"trak"]
    return []


def claimed_samples(tables: Boxes) -> int:
    """Return how many samples a track claims to have."""
    sizes = tables.get(b"stsz", b"")
    return int.from_bytes(sizes[8:12], "big") if len(sizes) >= 12 else 0


def list_samples(tracks: list[Boxes], end: int, track: int, first: Packets) -> Packets | None:
    """List the packets of a track as FFmpeg gives them.

    Args:
        tracks: the tables of all tracks.
        end: the length of the file in bytes.
        track: the track's own number.
        first: the first packets, as FFmpeg gave them; from them follows where its clock begins.

    Returns:
        The packets; None where the tables do not tell: fragments, edit lists that hide or repeat frames, or tables
        that FFmpeg read otherwise.
    """
    for tables in tracks:
        header = tables.get(b"tkhd", b"")
        at = 20 if header[:1] == b"\1" else 12
        if int.from_bytes(header[at : at + 4], "big") == track:
            try:
                return _like(_samples(tables, end, first), first)
            except (KeyError, ValueError, IndexError, struct.error):
                return None
    return None


def _samples(tables: Boxes, end: int, first: Packets) -> Packets | None:
    count = claimed_samples(tables)
    same = int.from_bytes(tables[b"stsz"][4:8], "big")
    if b"mvex" in tables or not count or int.from_bytes(tables[b"stsd"][4:8], "big") != 1:
        return None
    size = np.full(count, same) if same else _column(tables[b"stsz"][12:], ">u4", count)
    durations = _runs(tables[b"stts"], ">u4", count)
    dts = np.cumsum(durations) - durations
    pts = dts + _runs(tables[b"ctts"], ">i4", count) if b"ctts" in tables else dts
    if not _shows_all(tables, pts, durations):
        return None
    is_key = np.ones(count, bool)
    if b"stss" in tables:
        is_key[:] = False
        is_key[_column(tables[b"stss"][8:], ">u4", int.from_bytes(tables[b"stss"][4:8], "big")) - 1] = True
    position = _positions(tables, size)
    is_there = position + size <= end
    past = count if is_there.all() else int(is_there.argmin())
    flags = np.where(is_key, KEY, 0).astype(np.uint8)
    flags[0] |= first.flags[0] & CLOSED
    columns = (column[:past] for column in (pts, dts, durations, position, size, flags))
    return Packets(first.container, first.codec, *columns, num_missing=count - past)


def _like(packets: Packets | None, first: Packets) -> Packets | None:
    """Move the stamps to FFmpeg's clock; None if its first packets are not the same."""
    num = len(first)
    if packets is None or not 0 < num <= len(packets):
        return None
    shift = int(first.pts[0] - packets.pts[0])
    moved = replace(packets, pts=packets.pts + shift, dts=packets.dts + int(first.dts[0] - packets.dts[0]))
    names = ("pts", "dts", "position", "size", "flags")
    return moved if all((getattr(moved, name)[:num] == getattr(first, name)).all() for name in names) else None


def _shows_all(tables: Boxes, pts: np.ndarray, durations: np.ndarray) -> bool:
    """Tell whether the edit list, after an empty beginning, shows the whole track once."""
    edits = tables.get(b"elst")
    if edits is None:
        return True
    form = ">QqHH" if edits[0] == 1 else ">IiHH"
    entries = [entry for entry in struct.iter_unpack(form, edits[8:]) if entry[1] != -1]
    if len(entries) != 1:
        return not entries
    length, begin, *rate = entries[0]
    seconds = length / _scale(tables[b"mvhd"])
    last = pts.argmax()
    needed = (pts[last] + durations[last] // 2 - begin) / _scale(tables[b"mdhd"])
    return rate == [1, 0] and begin <= pts.min() and (not length or seconds >= needed)


def _scale(header: bytes) -> int:
    at = 20 if header[:1] == b"\1" else 12
    return int.from_bytes(header[at : at + 4], "big") or 1


def _positions(tables: Boxes, size: np.ndarray) -> np.ndarray:
    """Return where each sample lies, from the chunks that hold them."""
    name, kind = (b"co64", ">u8") if b"co64" in tables else (b"stco", ">u4")
    chunks = _column(tables[name][8:], kind, int.from_bytes(tables[name][4:8], "big"))
    runs = _column(tables[b"stsc"][8:], ">u4", 3 * int.from_bytes(tables[b"stsc"][4:8], "big")).reshape(-1, 3)
    num_samples = np.repeat(runs[:, 1], np.diff(np.append(runs[:, 0], len(chunks) + 1)))
    if num_samples.sum() < len(size) or len(num_samples) != len(chunks):
        raise ValueError("the chunks hold fewer samples than there are")
    chunk = np.repeat(np.arange(len(chunks)), num_samples)[: len(size)]
    before = np.cumsum(size) - size
    firsts = np.minimum(np.cumsum(num_samples) - num_samples, len(size) - 1)
    return chunks[chunk] + before - before[firsts][chunk]


def _runs(table: bytes, kind: str, count: int) -> np.ndarray:
    """Expand a table of (count, value)."""
    entries = int.from_bytes(table[4:8], "big")
    counts = _column(table[8:], ">u4", 2 * entries)[::2]
    values = _column(table[8:], kind, 2 * entries)[1::2]
    if counts.sum() != count:
        raise ValueError("a table describes another number of samples")
    return np.repeat(values, counts)


def _column(data: bytes, kind: str, count: int) -> np.ndarray:
    return np.frombuffer(data, kind, count).astype(np.int64)


def _flat(content: bytes) -> Boxes:
    found: Boxes = {}
    for kind, inner in _inside(content):
        found.update(_flat(inner) if kind in CONTAINERS else {kind: inner})
    return found


def _inside(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        if size < 8:
            return
        yield content[at + 4 : at + 8], content[at + 8 : at + size]
        at += size
