"""Read a video whole or as a stream, or only its facts."""

from dataclasses import dataclass

import numpy as np
import torch

from hico.video_io.base import Sink
from hico.video_io.index import VideoInfo
from hico.video_io.plan import Plan, ReadSettings, VideoSource, index_of, make_plan
from hico.video_io.source import as_source
from hico.video_io.stream import VideoStream


@dataclass(frozen=True)
class Video:
    """The sampled frames of a video.

    Args:
        frames: ``(F, 3, h, w)`` uint8.
        seconds: ``(F,)`` float64, when each frame appears, from the start of the video (not of the chosen part).
        info: the facts about the whole video.
        start: seconds, where the chosen part begins.
        duration: seconds, length of the chosen part.
        num_lost: frames that could not be decoded, each replaced by the nearest good one.
    """

    frames: torch.Tensor
    seconds: torch.Tensor
    info: VideoInfo
    start: float
    duration: float
    num_lost: int = 0

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def fps(self) -> float:
        """Frames per second of the source."""
        return self.info.fps

    @property
    def name(self) -> str:
        return self.info.name


def probe(source: VideoSource, *, folder_fps: float = 1.0, timeout: float = 30.0) -> VideoInfo:
    """Return the facts about a video; only its first frame is decoded.

    Args:
        source: path, URL, folder of images, bytes or binary file object.
        folder_fps: images per second of a folder.
        timeout: seconds that the server of a URL may take to answer.

    Raises:
        VideoError: if it cannot be read.
    """
    return index_of(as_source(source, timeout=timeout), folder_fps).info


def read_video(source: VideoSource, **settings: object) -> Video:
    """Sample, decode and resize a video.

    Samples that could not be decoded are replaced by the nearest good frame, with one warning that counts them.

    Args:
        source: path, URL, folder of images, bytes or binary file object.
        settings: the fields of ``ReadSettings``, such as ``num_frames=512, size=224, num_threads=4``.

    Raises:
        VideoError: if the video cannot be read, or nothing is left between ``start`` and ``end``.
        ValueError: if a setting is out of range, contradictory or without effect.
        TypeError: if a setting is unknown.
        ImportError: if the reader is not installed.
    """
    plan = make_plan(source, ReadSettings.of(settings))
    whole = _Whole(plan)
    num_lost = plan.decode(whole, max_ahead=len(plan.wanted))
    return Video(
        frames=torch.from_numpy(whole.frames),
        seconds=torch.from_numpy(whole.seconds),
        info=plan.index.info,
        start=plan.start,
        duration=plan.duration,
        num_lost=num_lost,
    )


def stream_video(source: VideoSource, *, chunk_frames: int = 32, **settings: object) -> VideoStream:
    """Open a video to be read in chunks, decoded in the background while the consumer works.

    Args:
        source: path, URL, folder of images, bytes or binary file object.
        chunk_frames: frames per chunk; a multiple of ``clip_len`` keeps clips whole.
        settings: the fields of ``ReadSettings``.

    Returns:
        The stream. The number of its frames and their times are known before anything is decoded.

    Raises:
        VideoError, ValueError, TypeError, ImportError: as ``read_video``; errors of decoding come while iterating.
    """
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames is {chunk_frames}; a chunk holds at least 1 frame")
    return VideoStream(make_plan(source, ReadSettings.of(settings)), chunk_frames=chunk_frames)


class _Whole(Sink):
    """All frames at once."""

    def __init__(self, plan: Plan):
        self.frames = np.empty((len(plan.seconds), 3, *plan.size), np.uint8)
        self.seconds = plan.seconds.copy()
        self._places = plan.places

    def put(self, here: int, picture: np.ndarray, second: float) -> None:
        places = self._places[here]
        self.frames[places] = picture.transpose(2, 0, 1)
        self.seconds[places] = second
