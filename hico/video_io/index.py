"""The table of contents of a video: when each frame is shown and where decoding can start.

It is read from the packets without decoding (0.03 s for a minute of 720p), and it is the same for every reader, so
frame numbers and timestamps never depend on the decoder.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import av
import av.error
import numpy as np

from hico.video_io.source import Source, VideoError

RATE_TOLERANCE = 0.05
"""A declared frame rate is believed if the timestamps agree with it to this ratio; otherwise they are counted."""

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
    seconds: np.ndarray
    pts: np.ndarray
    keyframes: tuple[Keyframe, ...]
    timed: bool = True
    is_broadcast: bool = False
    has_leading: bool = False
    num_missing: int = 0


@dataclass(frozen=True)
class _Packet:
    pts: int | None
    dts: int | None
    duration: int
    is_keyframe: bool
    is_hidden: bool


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
        if first is None:
            raise VideoError(
                f"{source.name}: none of its {len(packets)} frames could be decoded; the file is damaged or its codec "
                f"({stream.codec_context.name}) is not supported. Fetch it again, or convert it with ffmpeg"
            )
        is_quarter_turned = round(first.rotation / 90) % 2
        # AVI stores no presentation times, and FFmpeg's guess is out of order where frames are reordered.
        guessed = "avi" in container.format.name and stream.codec_context.name in {"h264", "hevc"}
        timed = not guessed and all(packet.pts is not None for packet in packets)
        shown = [packet for packet in packets if not packet.is_hidden]
        is_broadcast = "mpeg" in container.format.name
        times = _display_times(packets, is_broadcast=is_broadcast) if timed else np.arange(len(shown))
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        seconds = (times - times[0]) * float(stream.time_base if timed else 1 / rate)
        duration = float(seconds[-1]) + _last_duration(shown, stream, seconds, rate, timed)
        counted = len(times) / duration
        is_believable = abs(float(rate) - counted) <= RATE_TOLERANCE * counted
        info = VideoInfo(
            name=source.name,
            num_frames=len(times),
            fps=float(rate) if is_believable else counted,
            duration=duration,
            width=first.height if is_quarter_turned else first.width,
            height=first.width if is_quarter_turned else first.height,
            rotation=round(first.rotation / 90) % 4 * 90,
            codec=stream.codec_context.name,
        )
        promised = stream.frames if "mp4" in container.format.name else 0
        return VideoIndex(
            info=info,
            start=float(times[0] * stream.time_base) if timed else 0.0,
            seconds=seconds,
            pts=times,
            keyframes=_keyframes(packets, times) if timed else (Keyframe(0, None, None),),
            timed=timed,
            is_broadcast=is_broadcast,
            has_leading=timed and _has_leading(packets),
            num_missing=max(0, promised - len(packets)),
        )


def _read_packets(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[list[_Packet], av.VideoFrame | None]:
    """List the packets up to the end, or to where the file breaks off, and decode the first frame on the way."""
    packets, first = [], None
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_corrupt:
                packets.append(
                    _Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard)
                )
            if first is None:
                first = _first_frame(packet)
    except BROKEN_OFF:
        pass  # Broken off; the header's promise tells how much is missing.
    return packets, first


def _first_frame(packet: av.Packet) -> av.VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.error.FFmpegError:
        return None


def _display_times(packets: list[_Packet], *, is_broadcast: bool) -> np.ndarray:
    """Sort the shown packets' timestamps, without the frames before the first keyframe of a recorded broadcast."""
    shown = {packet.pts for packet in packets if not packet.is_hidden}
    start = min((packet.pts for packet in packets if packet.is_keyframe and is_broadcast), default=min(shown))
    return np.array(sorted(pts for pts in shown if pts >= start), dtype=np.int64)


def _keyframes(packets: list[_Packet], times: np.ndarray) -> tuple[Keyframe, ...]:
    """Number the keyframes by the frame that they lead to; an edit list may hide the first one itself."""
    marked = [packet for number, packet in enumerate(packets) if packet.is_keyframe or number == 0]
    found = [Keyframe(int(np.searchsorted(times, packet.pts)), packet.pts, packet.dts) for packet in marked]
    found = sorted((start for start in found if start.position < len(times)), key=lambda start: start.pts)
    last_of_position = [a for a, b in pairwise(found) if a.position != b.position]
    return (*last_of_position, found[-1])


def _has_leading(packets: list[_Packet]) -> bool:
    keyframe = None
    for packet in packets:
        if packet.is_keyframe:
            keyframe = packet
        elif keyframe is not None and packet.pts < keyframe.pts:
            return True
    return False


def _last_duration(
    shown: list[_Packet], stream: av.VideoStream, seconds: np.ndarray, rate: Fraction, timed: bool
) -> float:
    last = max(shown, key=lambda packet: packet.pts) if timed else shown[-1]
    if timed and last.duration:
        return float(last.duration * stream.time_base)
    return float(np.median(np.diff(seconds))) if len(seconds) > 1 else float(1 / rate)
