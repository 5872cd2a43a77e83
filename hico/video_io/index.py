"""The table of contents of a video: when each frame is shown, which packet holds it, where decoding can start.

It is made from the packets without decoding, and is the same for every reader. Frames are known by the number of their
packet, never by a stamp: stamps may be shared, start anew, and differ after a seek.
"""

import os
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction

import av
import av.error
import av.stream
import numpy as np
from av.stream import Disposition

from hico.video_io.bitstream import TELLS_TYPES
from hico.video_io.clock import Start, Timeline, arrange
from hico.video_io.mp4 import Boxes, claimed_samples, list_samples, read_tables
from hico.video_io.packets import NO_TIME, Packets, list_packets, short_name
from hico.video_io.source import MAX_PIXELS, TOO_SLOW, Source, VideoError, refuse_large
from hico.video_io.wholeness import is_cut_off

RATE_TOLERANCE = 0.05
"""A declared frame rate is believed if the timestamps agree with it to this ratio; otherwise they are counted."""

TURNS = {(False, False): 0, (False, True): 180, (True, False): 90, (True, True): 270}
"""Degrees counter-clockwise by whether rows become columns, and whether the columns are then reversed."""

STRAY = frozenset({"asf"})
"""Containers after a seek in which FFmpeg's packets have other stamps, and no places to know them by."""

MANY_SAMPLES = 1_000_000
"""Samples from which on an mp4 must have a byte for each."""


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
        is_mirrored: whether the picture is mirrored left to right after it is turned.
    """

    name: str
    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    codec: str
    is_mirrored: bool = False


@dataclass(frozen=True)
class Opened:
    """The container that an index was read from, for whoever decodes first.

    Args:
        container: open; its decoder may have taken packets.
        num_packets: packets that the decoder has taken without a fault, where the container goes on behind them; -1
            where it does not.
        frames: those that came out, with the numbers of their packets for stamps.
    """

    container: av.container.InputContainer
    num_packets: int = -1
    frames: tuple[av.VideoFrame, ...] = ()


@dataclass(frozen=True)
class VideoIndex:
    """Frames in display order.

    Args:
        info: the facts for users.
        seconds: ``(F,)`` float64, when each frame appears; the first one at 0.
        starts: where decoding can start, in display order; the first one leads to frame 0.
        start: seconds of the first frame on the container's own clock.
        packets: the packets of the stream; None for a folder.
        timeline: their order; None for a folder.
        has_leading: whether frames come after a keyframe in the file and are shown before it (open GOPs).
        opened: the container, at most one, that the index was read from; the first who decodes may take it.
        notes: what is wrong with the file and was mended, each to be said once.
        is_from_table: whether the file told its packets in a table; it was read through otherwise.
    """

    info: VideoInfo
    seconds: np.ndarray
    starts: tuple[Start, ...]
    start: float = 0.0
    packets: Packets | None = None
    timeline: Timeline | None = None
    has_leading: bool = False
    opened: list[Opened] = field(default_factory=list, compare=False, repr=False)
    notes: tuple[str, ...] = ()
    is_from_table: bool = False

    def take_opened(self) -> Opened | None:
        """Return the open container to the first who asks, from any thread."""
        try:
            return self.opened.pop()
        except IndexError:
            return None

    @property
    def can_seek(self) -> bool:
        """Whether a seek can be trusted to lead where it should; otherwise packets are read from the beginning."""
        stamps = self.packets.seek_stamps[self.packets.is_key]
        is_sound = self.packets.container not in STRAY and bool((np.diff(stamps) > 0).all())
        return self.packets.is_by_bytes or (is_sound and not self.packets.is_switched)


def best_video_stream(container: av.container.InputContainer, source: Source) -> av.VideoStream:
    """Return the stream that a player would show.

    Raises:
        VideoError: if there is none, it is in an unknown format, or its pictures are too large.
    """
    stream = container.streams.best("video")
    if stream is not None and stream.disposition & Disposition.attached_pic:
        stream = next(
            (each for each in container.streams.video if not each.disposition & Disposition.attached_pic), None
        )
    if stream is None:
        kinds = sorted({_kind(stream) for stream in container.streams}) or ["nothing"]
        raise VideoError(f"{source.name}: has no video stream, only {', '.join(kinds)}; give a file with pictures")
    if stream.codec_context is None:
        raise VideoError(
            f"{source.name}: its video stream is in a format that FFmpeg does not know; the file is damaged or newer "
            "than the installed PyAV. Fetch it again, convert it with ffmpeg, or upgrade av"
        )
    refuse_large(source.name, stream.width, stream.height)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # A stream may change its size.
    return stream


def _kind(stream: av.stream.Stream) -> str:
    return "a cover picture" if stream.type == "video" else stream.type


def build_index(source: Source, *, num_threads: int = 1) -> VideoIndex:
    """Read the index of a video, and its first frame for the size and rotation.

    Args:
        source: the video.
        num_threads: threads of the decoder that is left open for whoever decodes.

    Raises:
        VideoError: if nothing can be shown.
    """
    with source.local_file() or nullcontext() as file:
        length = file.seek(0, os.SEEK_END) if file else 0
        tables = read_tables(file, length) if file else []
        _refuse_claims(source, tables, length)
        with ExitStack() as stack:
            container = stack.enter_context(source.open())
            name = short_name(container)
            is_short = bool(file) and is_cut_off(file, length, name)
            stream = best_video_stream(container, source)
            set_threads(stream, num_threads)
            beginning = _Beginning()

            def shortcut(first: Packets) -> Packets | None:
                is_told = name == "mov" and first.codec not in TELLS_TYPES
                found = list_samples(tables, length, stream.id, first) if is_told else None
                beginning.is_all_read = found is None
                return found

            try:
                packets = list_packets(container, stream, take=beginning.take, shortcut=shortcut)
            except TOO_SLOW as error:
                raise source.too_slow() from error
            tick = float(stream.time_base)
            declared = stream.average_rate or stream.guessed_rate or Fraction(25)
            exact_rate = stream.codec_context.framerate or declared
            timeline = arrange(packets, tick=tick, frame_ticks=float(1 / exact_rate) / tick)
            if timeline is None or not beginning.frames:
                raise VideoError(
                    f"{source.name}: none of its {len(packets)} frames could be decoded; the file is damaged or "
                    f"its codec ({packets.codec}) is not supported. Fetch it again, or convert it with ffmpeg"
                )
            seconds = (timeline.ticks - timeline.ticks[0]) * tick
            stack.pop_all()  # Left open for whoever decodes; it closes with the index otherwise.
            return VideoIndex(
                info=_info(
                    source, packets, beginning.frames[0], seconds, declared, _last_duration(packets, timeline, tick)
                ),
                seconds=seconds,
                starts=timeline.starts,
                start=float(timeline.ticks[0] * tick),
                packets=packets,
                timeline=timeline,
                has_leading=_has_leading(packets, timeline),
                opened=[beginning.opened(container)],
                notes=tuple(_notes(packets, timeline, seconds, is_short=is_short)),
                is_from_table=not beginning.is_all_read,
            )


def _refuse_claims(source: Source, tables: list[Boxes], length: int) -> None:
    """Refuse an mp4 that claims more samples than it has bytes: FFmpeg makes a list of them all, 40 bytes each."""
    most = max(map(claimed_samples, tables), default=0)
    if most > max(length, MANY_SAMPLES):
        raise VideoError(
            f"{source.name}: claims {most} samples in {length} bytes; the file is damaged or made to exhaust memory. "
            "Fetch it again"
        )


def set_threads(stream: av.VideoStream, num_threads: int) -> None:
    """Set the threads of a decoder that has taken nothing yet."""
    stream.codec_context.thread_count = num_threads
    stream.codec_context.thread_type = "AUTO" if num_threads > 1 else "SLICE"


class _Beginning:
    """Decodes up to the first frame that comes out.

    Attributes:
        frames: what came out, with the numbers of their packets for stamps.
        is_all_read: whether the container was then read to its end.
    """

    def __init__(self) -> None:
        self.frames: list[av.VideoFrame] = []
        self.is_all_read = True
        self._num_packets, self._is_sound = 0, True

    def take(self, packet: av.Packet) -> bool:
        packet.pts, packet.dts = self._num_packets, None
        self._num_packets += 1
        try:
            self.frames += packet.decode()
        except av.error.FFmpegError:
            self._is_sound = False
        self._is_sound &= packet.size > 0  # An empty one drains the decoder.
        return bool(self.frames)

    def opened(self, container: av.container.InputContainer) -> Opened:
        """Hand the container on, with what was decoded if that can be continued."""
        if self.is_all_read or not self._is_sound:
            return Opened(container)
        return Opened(container, self._num_packets, tuple(self.frames))


def _info(
    source: Source,
    packets: Packets,
    first: av.VideoFrame,
    seconds: np.ndarray,
    declared: Fraction,
    last_duration: float,
) -> VideoInfo:
    duration = float(seconds[-1]) + (last_duration or float(1 / declared))
    counted = len(seconds) / duration
    is_believable = abs(float(declared) - counted) <= RATE_TOLERANCE * counted
    rotation, is_mirrored = orientation(first)
    width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    return VideoInfo(
        name=source.name,
        num_frames=len(seconds),
        fps=float(declared) if is_believable else counted,
        duration=duration,
        width=width,
        height=height,
        rotation=rotation,
        codec=packets.codec,
        is_mirrored=is_mirrored,
    )


def orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """Return how a frame is turned for display, by its display matrix.

    Returns:
        Degrees counter-clockwise, and whether it is mirrored left to right afterwards.
    """
    try:
        matrix = bytes(frame.side_data["DISPLAYMATRIX"])
    except (KeyError, ValueError):  # ValueError: beside it stand data that PyAV does not know.
        return round(frame.rotation / 90) % 4 * 90, False
    # x' = ax + cy and y' = bx + dy; y points down.
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    is_transposed = abs(b) + abs(c) > abs(a) + abs(d)
    flips = (c < 0, b < 0) if is_transposed else (a < 0, d < 0)
    is_mirrored = is_transposed == (flips[0] == flips[1])
    return TURNS[is_transposed, flips[0] != is_mirrored], is_mirrored


def _last_duration(packets: Packets, timeline: Timeline, tick: float) -> float:
    """Return the seconds for which the last frame is shown; 0 if nothing tells."""
    declared = 0.0 if timeline.is_counted else packets.duration[timeline.places.argmax()] * tick
    steps = np.diff(timeline.ticks)
    return float(declared or (np.median(steps) * tick if len(steps) else 0.0))


def _has_leading(packets: Packets, timeline: Timeline) -> bool:
    numbers = np.where(packets.is_key, np.arange(len(packets)), -1)
    keyframes = np.maximum.accumulate(numbers)
    is_before = (packets.pts < packets.pts[keyframes]) & (packets.pts != NO_TIME)
    return bool(((keyframes >= 0) & is_before & (timeline.places >= 0)).any())


def _notes(packets: Packets, timeline: Timeline, seconds: np.ndarray, *, is_short: bool) -> list[str]:
    notes = []
    if packets.num_missing:
        notes.append(
            f"is cut off; {packets.num_missing} of {packets.num_missing + len(packets)} frames are missing at the "
            "end, and the others are used. Fetch it again"
        )
    elif packets.is_cut_off or is_short:
        notes.append(
            f"is cut off; the {len(seconds)} frames that are there, {seconds[-1]:.2f} s, are used. Fetch it again"
        )
    if timeline.num_jumps:
        notes.append(
            f"its clock starts anew {timeline.num_jumps} times, as where files were joined; "
            "the times of the frames go on from one part to the next"
        )
    if timeline.num_shared:
        notes.append(
            f"{timeline.num_shared} of {len(seconds)} frames have the time of the frame before; "
            "they are spread evenly up to the next one"
        )
    return notes
