"""All packets of a video stream in the order of the file, as columns; nothing is decoded."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import av
import av.error
import numpy as np

from hico.video_io import bitstream
from hico.video_io.source import TOO_SLOW

NO_TIME = -(2**63)
"""FFmpeg's mark for a timestamp that is not known."""

BROKEN_OFF = (av.error.FFmpegError, IndexError)
"""What demuxing raises where a file breaks off; IndexError where damage looks to FFmpeg like one more stream."""

NEW_HEADER = "new_extradata"
"""PyAV's name of what a packet carries where the decoder's header changes."""

KEY, CLOSED, HIDDEN, BIDIRECTIONAL = 1, 2, 4, 8
GUESSED = frozenset({"avi", "asf"})
"""Containers that store one time per packet, in the order of decoding; FFmpeg guesses when it is shown."""

PROGRAM = frozenset({"mpeg"})
"""Containers that give a time to some packets, and FFmpeg guesses the others."""

JUMPS = frozenset({"mpegts", "mpeg", "hls"})
"""Containers whose clock may jump, by the rules of the container."""

BY_BYTES = frozenset({"mpegts", "mpeg", "h264", "hevc", "m4v", "mpegvideo"})
"""Containers without an index of times: FFmpeg is sent to a byte."""


@dataclass(frozen=True)
class Packets:
    """The packets of a stream.

    Args:
        container: FFmpeg's name of the format, the first of several.
        codec: FFmpeg's name of the codec.
        pts: ``(P,)`` int64 when it is shown, in ticks; ``NO_TIME`` where not given.
        dts: ``(P,)`` int64 when it is decoded.
        duration: ``(P,)`` int64; 0 where not given.
        position: ``(P,)`` int64, its first byte in the file; -1 where not known.
        size: ``(P,)`` int64 bytes.
        flags: ``(P,)`` uint8, sums of ``KEY``, ``CLOSED``, ``HIDDEN`` and ``BIDIRECTIONAL``. Where stamps tell the
            order of display, ``CLOSED`` is known of the first packet only and ``BIDIRECTIONAL`` of none.
        is_cut_off: whether reading ended in an error, or the last packet is not whole.
        num_missing: packets that the header promises and the file does not hold, where that is known.
        is_switched: whether the decoder is given another header on the way, as where FLV files were joined.
    """

    container: str
    codec: str
    pts: np.ndarray
    dts: np.ndarray
    duration: np.ndarray
    position: np.ndarray
    size: np.ndarray
    flags: np.ndarray
    is_cut_off: bool = False
    num_missing: int = 0
    is_switched: bool = False

    def __len__(self) -> int:
        return len(self.pts)

    @cached_property
    def is_key(self) -> np.ndarray:
        return (self.flags & KEY) > 0

    @cached_property
    def is_hidden(self) -> np.ndarray:
        return (self.flags & HIDDEN) > 0

    @property
    def may_reorder(self) -> bool:
        return self.codec in bitstream.REORDERS

    @property
    def is_by_bytes(self) -> bool:
        return self.container in BY_BYTES

    @cached_property
    def seek_stamps(self) -> np.ndarray:
        """What FFmpeg seeks a keyframe by, where not by bytes."""
        return np.where(self.dts == NO_TIME, self.pts, self.dts)

    def seek_target(self, number: int) -> int | None:
        """Return the time, or the byte, to seek to for a keyframe; None if no seek leads there.

        In a program stream only the first frame of each of its packets has a position: one after the keyframe before
        serves, so that the next keyframe that comes is the one.
        """
        if not self.is_by_bytes:
            stamp = int(self.seek_stamps[number])
            return None if stamp == NO_TIME else stamp
        before = self.is_key[:number].nonzero()[0]
        positions = self.position[before[-1] + 1 if len(before) else 0 : number + 1]
        return int(positions.max()) if (positions >= 0).any() else None

    def is_at(self, number: int, packet: av.Packet) -> bool:
        """Tell whether a packet that came after a seek is the one of a number: as long, at the same place and time."""
        pairs = [(packet.pos, self.position.item(number), -1)]
        if self.container in GUESSED:
            pairs.append((packet.dts, self.dts.item(number), NO_TIME))
        elif not self.is_by_bytes:
            pairs.append((packet.pts, self.pts.item(number), NO_TIME))
        is_elsewhere = any(None is not seen != listed != unknown for seen, listed, unknown in pairs)
        return packet.size == self.size.item(number) and not is_elsewhere


def short_name(container: av.container.InputContainer) -> str:
    """Return FFmpeg's first name of a format: ``mov`` of ``mov,mp4,m4a,3gp,3g2,mj2``."""
    return container.format.name.split(",")[0]


def list_packets(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    *,
    take: Callable[[av.Packet], bool],
    shortcut: Callable[["Packets"], "Packets | None"],
) -> Packets:
    """List the packets up to the end, or to where the file breaks off.

    Args:
        container: the open file.
        stream: the stream whose packets count.
        take: is given each packet until it returns True.
        shortcut: is given the first packets, and may return all of them from a table in the file.
    """
    name, codec = short_name(container), stream.codec_context.name
    is_told = name not in GUESSED | BY_BYTES and codec not in bitstream.TELLS_TYPES | {"vp8"}
    columns = [array("q") for _ in range(5)]
    pts, dts, duration, position, size = (column.append for column in columns)
    flags, is_cut_off, is_taken, is_whole, is_switched = bytearray(), False, False, True, False
    look = _Look(codec, stream.codec_context.extradata)

    def listed() -> Packets:
        arrays = [np.array(column, np.int64) for column in columns]
        marks = np.array(flags, np.uint8)
        return Packets(name, codec, *arrays, marks, is_cut_off=is_cut_off or not is_whole, is_switched=is_switched)

    try:
        for packet in container.demux(stream):
            if packet.size:
                pts(NO_TIME if packet.pts is None else packet.pts)
                dts(NO_TIME if packet.dts is None else packet.dts)
                duration(packet.duration or 0)
                position(-1 if packet.pos is None else packet.pos)
                size(packet.size)
                flag = KEY * packet.is_keyframe + HIDDEN * packet.is_discard
                flags.append(flag if is_told and flags else look.at(packet, flag))
                is_whole = not packet.is_corrupt
                is_switched |= name == "flv" and packet.has_sidedata(NEW_HEADER)
            if not is_taken:
                is_taken = take(packet)
                if is_taken and (short := shortcut(listed())):
                    return short
    except TOO_SLOW:
        raise
    except BROKEN_OFF:
        is_cut_off = True
    if look.saw_packed:  # A decoder that has not seen the beginning takes no second picture from a packet.
        flags[1:] = bytes(flag & ~KEY for flag in flags[1:])
    if not is_whole:
        # A packet marked corrupt is decoded like any other (it may only stand before a joint), but not a last half.
        flags[-1] |= HIDDEN
    return listed()


class _Look:
    """Looks into packets where the container's stamps do not tell the order of display."""

    def __init__(self, codec: str, extradata: bytes | None):
        self._codec, self._extradata = codec, extradata
        self._is_packed = self.saw_packed = False

    def at(self, packet: av.Packet, flag: int) -> int:
        if packet.is_keyframe and bitstream.is_closed(bytes(packet), self._codec, self._extradata):
            flag |= CLOSED
        if self._codec in bitstream.TELLS_TYPES:
            # Packed: a packet ends with a B-frame that comes out with the next one, and so on up to a placeholder.
            types = bitstream.picture_types(bytes(packet), self._codec)
            if self._is_packed or types[:1] == "B":
                flag = flag & ~KEY | BIDIRECTIONAL
            self._is_packed = types[1:2] == "B" or (self._is_packed and types[:1] == "B")
            self.saw_packed |= self._is_packed
        if self._codec == "vp8":
            flag |= HIDDEN * (not memoryview(packet)[0] >> 4 & 1)
        return flag
