"""The table of contents of a video: when each frame is shown and where decoding can start.

It is read from the packets without decoding (0.03 s for a minute of 720p), and it is the same for every reader, so
frame numbers and timestamps never depend on the decoder.
"""

from array import array
from dataclasses import dataclass
from fractions import Fraction

import av
import av.error
import numpy as np

from hico.video_io.source import Source, VideoError

RATE_TOLERANCE = 0.05
"""A declared frame rate is believed if the timestamps agree with it to this ratio; otherwise they are counted."""

NO_TIME = -(2**63)
"""FFmpeg's mark for a timestamp that is not known."""

BROKEN_OFF = (av.error.FFmpegError, IndexError)
"""What demuxing raises where a file breaks off; IndexError where damage looks to FFmpeg like one more stream."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before its frames are decoded.

    Args:
        name: the path, URL, or a stand-in for bytes and file objects.
        num_frames: frames that are shown.
        fps: mean frames per second.
        duration: seconds from the first frame's appearance to the last one's end.
        width: pixels, as displayed, that is, after rotation.
        height: pixels, as displayed.
        rotation: degrees counter-clockwise that the stored picture is turned for display: 0, 90, 180 or 270.
        codec: FFmpeg's name of the codec; ``images`` for a folder.
    """

    name: str
    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    codec: str


@dataclass(frozen=True)
class Keyframe:
    """A packet that needs no other: its timestamps, and the first frame, in display order, that it leads to."""

    position: int
    pts: int | None
    dts: int | None


@dataclass(frozen=True)
class VideoIndex:
    """Frames in display order.

    Args:
        info: the facts for users.
        start: seconds of the first frame on the container's own clock.
        tick: seconds per unit of ``pts``.
        seconds: ``(F,)`` float64, when each frame appears; the first one at 0.
        pts: ``(F,)`` int64 presentation timestamps; the frame's number where the file has none (``timed`` is False).
        keyframes: where decoding can start, in display order; the first one leads to frame 0.
        timed: False for a file whose packets carry no usable timestamps; it is decoded in sequence and counted.
        is_broadcast: whether the container is an MPEG transport or program stream, which has no index to seek by.
        has_leading: whether frames come after a keyframe in the file and are shown before it (open GOPs).
        num_missing: frames that the header promises and the file does not hold.
    """

    info: VideoInfo
    start: float
    tick: float
    seconds: np.ndarray
    pts: np.ndarray
    keyframes: tuple[Keyframe, ...]
    timed: bool = True
    is_broadcast: bool = False
    has_leading: bool = False
    num_missing: int = 0

    def seconds_of(self, pts: int) -> float:
        """Return when the frame with a timestamp appears."""
        return (pts - int(self.pts[0])) * self.tick


@dataclass(frozen=True)
class _Packets:
    """All packets in the order of the file, as columns; ``NO_TIME`` where a timestamp is not given."""

    pts: np.ndarray
    dts: np.ndarray
    duration: np.ndarray
    is_keyframe: np.ndarray
    is_hidden: np.ndarray

    def __len__(self) -> int:
        return len(self.pts)


def best_video_stream(container: av.container.InputContainer, source: Source) -> av.VideoStream:
    """Return the stream that a player would show.

    Raises:
        VideoError: if there is none, or it is in an unknown format.
    """
    stream = container.streams.best("video")
    if stream is None:
        kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
        raise VideoError(f"{source.name}: has no video stream, only {', '.join(kinds)}; give a file with pictures")
    if stream.codec_context is None:
        raise VideoError(
            f"{source.name}: its video stream is in a format that FFmpeg does not know; the file is damaged or newer "
            "than the installed PyAV. Fetch it again, convert it with ffmpeg, or upgrade av"
        )
    return stream


def build_index(source: Source) -> VideoIndex:
    """Read the index of a video, and its first frame for the size and rotation.

    Raises:
        VideoError: if nothing can be shown.
    """
    with source.open() as container:
        stream = best_video_stream(container, source)
        stream.codec_context.thread_count = 1
        packets, first = _read_packets(container, stream)
        codec = stream.codec_context.name
        if first is None or packets.is_hidden.all():
            raise VideoError(
                f"{source.name}: none of its {len(packets)} frames could be decoded; the file is damaged or its codec "
                f"({codec}) is not supported. Fetch it again, or convert it with ffmpeg"
            )
        # AVI stores no presentation times, and FFmpeg's guess is out of order where frames are reordered.
        is_guess = "avi" in container.format.name and codec in {"h264", "hevc"}
        is_broadcast = "mpeg" in container.format.name
        timed = not is_guess and bool((packets.pts != NO_TIME).all())
        declared = stream.average_rate or stream.guessed_rate or Fraction(25)
        if timed:
            times, tick = _display_times(packets, is_broadcast=is_broadcast), float(stream.time_base)
        else:
            times, tick = np.arange(int((~packets.is_hidden).sum())), float(1 / declared)
        seconds = (times - times[0]) * tick
        promised = stream.frames if "mp4" in container.format.name else 0
        return VideoIndex(
            info=_info(source, codec, first, seconds, declared, _last_duration(packets, seconds, tick, timed=timed)),
            start=float(times[0] * tick) if timed else 0.0,
            tick=tick,
            seconds=seconds,
            pts=times,
            keyframes=_keyframes(packets, times) if timed else (Keyframe(0, None, None),),
            timed=timed,
            is_broadcast=is_broadcast,
            has_leading=timed and _has_leading(packets),
            num_missing=max(0, promised - len(packets)),
        )


def _info(
    source: Source, codec: str, first: av.VideoFrame, seconds: np.ndarray, declared: Fraction, last_duration: float
) -> VideoInfo:
    duration = float(seconds[-1]) + (last_duration or float(1 / declared))
    counted = len(seconds) / duration
    is_believable = abs(float(declared) - counted) <= RATE_TOLERANCE * counted
    quarters = round(first.rotation / 90) % 4
    width, height = (first.height, first.width) if quarters % 2 else (first.width, first.height)
    return VideoInfo(
        name=source.name,
        num_frames=len(seconds),
        fps=float(declared) if is_believable else counted,
        duration=duration,
        width=width,
        height=height,
        rotation=quarters * 90,
        codec=codec,
    )


def _read_packets(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[_Packets, av.VideoFrame | None]:
    """List the packets up to the end, or to where the file breaks off, and decode the first frame on the way."""
    pts, dts, duration, flags, first = array("q"), array("q"), array("q"), bytearray(), None
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_corrupt:
                pts.append(NO_TIME if packet.pts is None else packet.pts)
                dts.append(NO_TIME if packet.dts is None else packet.dts)
                duration.append(packet.duration or 0)
                flags.append(packet.is_keyframe + 2 * packet.is_discard)
            if first is None:
                first = _first_frame(packet)
    except BROKEN_OFF:
        pass  # The header's promise tells how much is missing.
    flags = np.frombuffer(flags, np.uint8)
    columns = (np.frombuffer(column, np.int64) for column in (pts, dts, duration))
    return _Packets(*columns, is_keyframe=flags % 2 == 1, is_hidden=flags >= 2), first


def _first_frame(packet: av.Packet) -> av.VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.error.FFmpegError:
        return None


def _display_times(packets: _Packets, *, is_broadcast: bool) -> np.ndarray:
    """Sort the shown packets' timestamps, without the frames before the first keyframe of a recorded broadcast."""
    times = np.unique(packets.pts[~packets.is_hidden])
    keyframes = packets.pts[packets.is_keyframe]
    return times[times >= keyframes.min()] if is_broadcast and len(keyframes) else times


def _keyframes(packets: _Packets, times: np.ndarray) -> tuple[Keyframe, ...]:
    """Number the keyframes by the frame that they lead to; an edit list may hide the first one itself."""
    is_start = packets.is_keyframe.copy()
    is_start[0] = True
    found = np.flatnonzero(is_start)
    found = found[np.argsort(packets.pts[found], kind="stable")]
    positions = np.searchsorted(times, packets.pts[found])
    is_last_of_position = np.append(positions[1:] != positions[:-1], True) & (positions < len(times))
    return tuple(
        Keyframe(int(position), int(pts), None if dts == NO_TIME else int(dts))
        for position, pts, dts in zip(
            positions[is_last_of_position],
            packets.pts[found][is_last_of_position],
            packets.dts[found][is_last_of_position],
            strict=True,
        )
    )


def _has_leading(packets: _Packets) -> bool:
    numbers = np.where(packets.is_keyframe, np.arange(len(packets)), -1)
    keyframes = np.maximum.accumulate(numbers)
    return bool(((keyframes >= 0) & (packets.pts < packets.pts[keyframes])).any())


def _last_duration(packets: _Packets, seconds: np.ndarray, tick: float, *, timed: bool) -> float:
    """Return the seconds for which the last frame is shown; 0 if nothing tells."""
    declared = packets.duration[packets.pts.argmax()] * tick if timed else 0.0
    return float(declared or (np.median(np.diff(seconds)) if len(seconds) > 1 else 0.0))
