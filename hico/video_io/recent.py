"""Indexes of files that had to be read through, kept for the next read of the same file.

Rows of a training set often are windows of one long recording, and containers other than mp4 have no table of frames.
"""

import os
from dataclasses import replace

from hico.video_io.index import VideoIndex, build_index
from hico.video_io.source import Source

LISTS = frozenset({"hls", "dash", "concat"})
"""Containers that are lists of other files, which change on their own."""

MIN_PACKETS = 1000
"""Shorter files are indexed as fast as they are looked up."""

MAX_PACKETS = 1 << 18
"""Packets of all kept indexes, about 75 bytes each: 2.4 hours at 30 frames per second."""

_KEPT: dict[tuple, VideoIndex] = {}


def recent_index(source: Source, *, num_threads: int) -> VideoIndex:
    """Return the index of a video, kept from an earlier read if its file has the same time and length since.

    Raises:
        VideoError: if nothing can be shown.
    """
    key = _key(source)
    # Single steps on a dict need no lock, which a process forked meanwhile would find taken.
    index = _KEPT.pop(key, None) or build_index(source, num_threads=num_threads)
    is_worth_it = not index.is_from_table and len(index.packets) >= MIN_PACKETS
    if key is not None and is_worth_it and index.packets.container not in LISTS:
        _KEPT[key] = replace(index, opened=[])
        room = MAX_PACKETS
        for each, kept in reversed(list(_KEPT.items())):
            room -= len(kept.packets)
            if room < 0:
                _KEPT.pop(each, None)
    return index


def _key(source: Source) -> tuple | None:
    """Return what tells a file from others and from itself before a change; None for what is no file."""
    if source.location is None or source.is_remote:
        return None
    found = os.stat(source.location)
    return source.location, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
