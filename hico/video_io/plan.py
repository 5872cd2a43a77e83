"""From the settings of a call to the frames that must be decoded."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from hico.preprocessing import FITS
from hico.sampling import pad_to_clips, sample_frames
from hico.video_io.base import READERS, Reader, Sink
from hico.video_io.index import VideoIndex
from hico.video_io.pictures import AnimationReader, FolderReader, index_animation, index_folder, is_animation
from hico.video_io.recent import recent_index
from hico.video_io.resize import SCALERS, ExactResizer
from hico.video_io.runs import nearest_keyframes
from hico.video_io.source import Source, VideoError, as_source

logger = logging.getLogger(__name__)

VideoSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO
MAX_THREADS = 8
TICKS_PER_SECOND = 1000
"""Resolution of samples by time in a video of variable rate."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How to sample, decode and resize a video.

    Args:
        mode: sampling mode, see ``hico.sampling.sample_frames``; if omitted, ``middle`` where ``num_frames`` is given
            and ``dual`` where it is not.
        num_frames: frames wanted, evenly spread.
        fps: frames per second wanted, within the bounds.
        min_frames: fewest frames.
        max_frames: most frames.
        bounds: ``max_wins`` or ``published``.
        clip_len: frames per clip; the result is a multiple of it.
        multiple_of: what the number of sampled frames is a multiple of, in ``dual`` and ``dynamic_fps1``.
        pad: ``repeat`` fills the last clip with its last frame; ``error`` refuses an unfilled one.
        start: seconds from the start of the video; frames that appear before are left out.
        end: seconds; frames that appear then or later are left out.
        end_margin: seconds; a part (``start`` or ``end`` is given) ends this long before the video, or earlier. The
            releases of VideoChat-Flash have 0.1.
        size: side of a square, or ``(height, width)``, in pixels; as displayed if omitted.
        fit: ``stretch`` does not keep the aspect ratio; ``crop`` resizes the shorter edge to ``size`` and takes the
            middle of the longer one, as CLIP does.
        scaler: ``fast`` is torch's bicubic filter on bytes; ``exact`` is PIL's, as in the published preprocessing, up
            to seven times slower.
        exact: if False and the samples are a second or more apart, each is moved to the nearest keyframe, which is
            much less work; the times tell the truth, and several samples may be the same frame.
        reader: ``pyav``, or, where installed, ``decord`` or ``torchcodec``. A folder needs none.
        num_threads: decoding threads; if omitted, as many as torch uses (1 in a DataLoader worker), at most 8.
        folder_fps: images per second of a folder.
        timeout: seconds that the server of a URL may take to answer.
        generator: source of chance for the mode ``rand``.
    """

    mode: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    bounds: str = "max_wins"
    clip_len: int = 4
    multiple_of: int | None = None
    pad: str = "repeat"
    start: float | None = None
    end: float | None = None
    end_margin: float = 0.0
    size: int | tuple[int, int] | None = None
    fit: str = "stretch"
    scaler: str = "fast"
    exact: bool = True
    reader: str = "pyav"
    num_threads: int | None = None
    folder_fps: float = 1.0
    timeout: float = 30.0
    generator: torch.Generator | None = None

    @classmethod
    def of(cls, settings: dict[str, object]) -> "ReadSettings":
        """Build from keyword arguments.

        Raises:
            TypeError: if a name is unknown; the message suggests the nearest one.
        """
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                nearest = get_close_matches(name, names, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
                raise TypeError(f"unknown video setting {name!r}{hint} Known: {', '.join(names)}")
        return cls(**settings)


@dataclass(frozen=True)
class Plan:
    """What to decode, and where each frame goes.

    Args:
        source: the video.
        index: its index.
        reader: who decodes it.
        resizer: makes the resizer of one thread.
        num_threads: threads to decode with.
        wanted: the frames to decode, strictly increasing.
        places: for each of them, its places in the result; more than one where a frame is repeated.
        seconds: ``(F,)`` when each frame of the result appears.
        start: seconds, where the chosen part begins.
        duration: seconds, length of the chosen part.
        size: ``(height, width)`` of the result.
    """

    source: Source
    index: VideoIndex
    reader: Reader
    resizer: Callable[[], ExactResizer]
    num_threads: int
    wanted: list[int]
    places: list[list[int]]
    seconds: np.ndarray
    start: float
    duration: float
    size: tuple[int, int]

    def decode(self, sink: Sink, max_ahead: int) -> int:
        """Decode into a sink; returns the number of lost samples, after a warning if there are any."""
        name = self.source.name
        for note in self.index.notes:
            logger.warning("%s: %s", name, note)
        num_lost = self.reader.decode(
            self.source,
            self.index,
            self.wanted,
            sink,
            resizer=self.resizer,
            num_threads=self.num_threads,
            max_ahead=max_ahead,
        )
        if num_lost:
            logger.warning(
                "%s: is damaged; %d of %d sampled frames were lost, the nearest good ones stand in. Fetch it again",
                name,
                num_lost,
                len(self.wanted),
            )
        return num_lost


def index_of(source: Source, folder_fps: float, *, num_threads: int = 1) -> VideoIndex:
    """Read the index of a video or a folder of images."""
    if _is_folder(source):
        return index_folder(source, folder_fps)
    return index_animation(source) if is_animation(source) else recent_index(source, num_threads=num_threads)


def make_plan(source: VideoSource, settings: ReadSettings) -> Plan:
    """Sample a video.

    Raises:
        VideoError: if it cannot be read, or nothing is left between start and end.
        ValueError: if a setting is unknown, contradictory or without effect.
    """
    source = as_source(source, timeout=settings.timeout)
    reader = READERS.get(settings.reader)
    if _is_folder(source) or is_animation(source):
        reader = FolderReader if _is_folder(source) else AnimationReader
    scaler = SCALERS.get(settings.scaler)
    _check_part(source, settings.start, settings.end)
    num_threads = _num_threads(settings.num_threads)
    index = index_of(source, settings.folder_fps, num_threads=num_threads)
    first, last, begin, duration = _part(source, index, settings.start, _end(settings, index))
    sampled = _sample(index.seconds[first:last] - begin, duration, index.info.fps, settings)
    if not sampled:
        raise VideoError(
            f"{source.name}: the sampling mode {settings.mode!r} finds no frame in {duration:.2f} s; sample at a "
            "higher rate, or set bounds='max_wins'"
        )
    frames = [first + position for position in sampled]
    if not settings.exact:
        keyframes = [start.position for start in index.starts if first <= start.position < last]
        frames = nearest_keyframes(frames, keyframes, index.seconds)
    frames = pad_to_clips(frames, settings.clip_len, pad=settings.pad)
    wanted, places = _places(frames)
    size = _size(settings, index)
    return Plan(
        source=source,
        index=index,
        reader=reader(),
        resizer=partial(scaler, size, index.info.rotation, fit=settings.fit, is_mirrored=index.info.is_mirrored),
        num_threads=num_threads,
        wanted=wanted,
        places=places,
        seconds=index.seconds[frames],
        start=begin,
        duration=duration,
        size=size,
    )


def _is_folder(source: Source) -> bool:
    return source.location is not None and Path(source.location).is_dir()


def _check_part(source: Source, start: float | None, end: float | None) -> None:
    for name, value in {"start": start, "end": end}.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise VideoError(
                f"{source.name}: {name} is {value}; it counts seconds from the start of the video, from 0"
            )
    if start is not None and end is not None and start >= end:
        raise VideoError(f"{source.name}: start {start} s is not before end {end} s; swap them, or leave one out")


def _end(settings: ReadSettings, index: VideoIndex) -> float | None:
    if not 0 <= settings.end_margin < math.inf:
        raise ValueError(f"end_margin is {settings.end_margin}; it is a time in seconds, from 0")
    is_part = settings.start is not None or settings.end is not None
    if not (settings.end_margin and is_part):
        return settings.end
    latest = index.info.duration - settings.end_margin
    return latest if settings.end is None else min(settings.end, latest)


def _part(source: Source, index: VideoIndex, start: float | None, end: float | None) -> tuple[int, int, float, float]:
    """Return the first and past-the-last frame between start and end, and where the part begins and how long it is."""
    duration = index.info.duration
    begin, stop = start or 0.0, min(duration, math.inf if end is None else end)
    # Half a microsecond: timestamps are whole ticks, and 1/3 s is not a float.
    first = int(np.searchsorted(index.seconds, begin - 5e-7))
    last = len(index.seconds) if end is None else int(np.searchsorted(index.seconds, end - 5e-7))
    if first >= last:
        raise VideoError(
            f"{source.name}: no frame appears between start {begin} s and end {stop} s; the video lasts "
            f"{duration:.2f} s and has {index.info.fps:.3g} frames per second. Choose a longer part inside it"
        )
    return first, last, begin, stop - begin


def _sample(seconds: np.ndarray, duration: float, fps: float, settings: ReadSettings) -> list[int]:
    """Choose frames of a part, given when each appears; by time where the mode asks for times and they are uneven."""
    choose = partial(
        sample_frames,
        mode=settings.mode,
        num_frames=settings.num_frames,
        rate=settings.fps,
        min_frames=settings.min_frames,
        max_frames=settings.max_frames,
        clip_len=settings.clip_len,
        multiple_of=settings.multiple_of,
        bounds=settings.bounds,
        generator=settings.generator,
    )
    is_by_time = (settings.mode or "").startswith("fps") and settings.bounds != "published"
    is_even = np.abs(seconds - seconds[0] - np.arange(len(seconds)) / fps).max() <= 0.5 / fps
    if is_even or not is_by_time:
        return choose(len(seconds), fps)
    times = np.array(choose(max(1, round(duration * TICKS_PER_SECOND)), TICKS_PER_SECOND)) / TICKS_PER_SECOND
    after = np.searchsorted(seconds, times).clip(1, max(1, len(seconds) - 1))
    is_before = times - seconds[after - 1] <= seconds[after % len(seconds)] - times
    return np.where(is_before, after - 1, after).clip(max=len(seconds) - 1).tolist()


def _places(frames: list[int]) -> tuple[list[int], list[list[int]]]:
    wanted, places = [], []
    for place, position in enumerate(frames):
        if not wanted or wanted[-1] != position:
            wanted.append(position)
            places.append([])
        places[-1].append(place)
    return wanted, places


def _size(settings: ReadSettings, index: VideoIndex) -> tuple[int, int]:
    size = settings.size
    if settings.fit not in FITS:
        raise ValueError(f"unknown fit {settings.fit!r}; use one of {', '.join(FITS)}")
    if settings.fit == "crop" and np.ndim(size or ()):
        raise ValueError(
            f"fit='crop' makes squares, and size is {size!r}; give one number of pixels, or fit='stretch'"
        )
    if size is None:
        return index.info.height, index.info.width
    sides = (size, size) if np.ndim(size) == 0 else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side >= 1 for side in sides):
        raise ValueError(f"size is {size!r}; it must be one number of pixels or (height, width), each at least 1")
    return int(sides[0]), int(sides[1])


def _num_threads(num_threads: int | None) -> int:
    if num_threads is None:
        return min(MAX_THREADS, torch.get_num_threads())
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; decoding needs at least 1")
    return num_threads
