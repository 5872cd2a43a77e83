"""Images and frames from wherever they come."""

import base64
import binascii
import io
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata

from hico.preprocessing import resize_frames, to_pil
from hico.sampling import sample_frames
from hico.video_io import Video, VideoInfo

logger = logging.getLogger(__name__)

USUAL_FPS = 24.0
"""Frames per second that transformers' video processors assume of frames without a clock."""
FETCH_SECONDS = 60.0
"""Longest wait for an image from the network."""
_SAMPLING = ("mode", "num_frames", "fps", "min_frames", "max_frames", "multiple_of", "bounds", "generator")
"""Settings of `hico.video_io.read_video` that choose among frames."""


def open_image(image: Any) -> Any:
    """Load an image as transformers' processors do.

    Args:
        image: a path, a URL (``http``, ``https``, ``file``, ``data``), base64 text, encoded bytes, or pixels, which
            are passed on.

    Returns:
        An upright RGB image, or the pixels.

    Raises:
        ValueError: if there is no such image, or it cannot be read.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(image), f"<{len(image)} bytes>")
    if not isinstance(image, (str, os.PathLike)):
        return image
    address = os.fspath(image)
    scheme = re.match(r"(https?|file|data):", address)
    if scheme is None:
        return _decode(address, address) if os.path.exists(address) else _from_base64(address)
    if scheme[1] == "data":
        return _from_base64(address.partition(",")[2])
    if scheme[1] == "file":
        return open_image(Path(unquote(urlsplit(address).path)))
    try:
        return load_image(address, timeout=FETCH_SECONDS)
    except Exception as error:  # of the network, in any way; of the image, when a page came instead
        raise ValueError(f"{address}: no image could be fetched ({error!r}); check the address") from error


def _from_base64(text: str) -> Image.Image:
    name = text if len(text) < 200 else f"{text[:60]}..."
    try:
        return _decode(io.BytesIO(base64.b64decode(re.sub(r"\s", "", text), validate=True)), name)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: no such image file; check the path, or give whole base64 text") from error


def _decode(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as opened:
            return to_pil(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not an image that Pillow can read ({error}); convert it to png or jpeg") from error


def flat_images(images: Any) -> list[Any]:
    """Return images in order, however they are nested."""
    return _flat(images, is_leaf=lambda image, depth: not isinstance(image, (list, tuple)))


def flat_videos(videos: Any) -> list[Any]:
    """Return videos in order, however they are nested; see `HicoProcessor.__call__` for lists that are one video."""
    return _flat(videos, is_leaf=_is_video)


def metadata_of_each(metadata: Any, num_videos: int) -> list[Any]:
    """Return one entry of metadata per video, of one alone, a list, or a list per prompt."""
    if metadata is None:
        return [None] * num_videos
    if isinstance(metadata, Mapping):
        metadata = [metadata]
    entries = [one for part in metadata for one in (part if isinstance(part, (list, tuple)) else [part])]
    if len(entries) != num_videos:
        raise ValueError(f"{len(entries)} video_metadata were given for {num_videos} videos; give one for each")
    return entries


def _is_video(value: Any, depth: int) -> bool:
    """A list of pictures is one video, and so is one of names inside the lists for batch and prompt."""
    if not isinstance(value, (list, tuple)) or is_with_metadata(value):
        return True
    first = value[0] if value else None
    is_picture = isinstance(first, Image.Image) or (isinstance(first, (np.ndarray, Tensor)) and first.ndim == 3)
    return is_picture or (depth >= 2 and isinstance(first, (str, Path)))


def _flat(values: Any, *, is_leaf: Callable[[Any, int], bool], depth: int = 0) -> list[Any]:
    if values is None:
        return []
    if is_leaf(values, depth):
        return [values]
    return [item for value in values for item in _flat(value, is_leaf=is_leaf, depth=depth + 1)]


def is_frames(video: Any) -> bool:
    """Say whether a video is given as its frames: pixels, a list of pictures, or either with its metadata."""
    return isinstance(video, (Tensor, np.ndarray, list, tuple))


def is_with_metadata(video: Any) -> bool:
    """Say whether a video is a pair of frames and metadata, as transformers' ``load_video`` returns it."""
    return isinstance(video, tuple) and len(video) == 2 and isinstance(video[1], Mapping)


def video_of_frames(
    video: Any,
    metadata: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    *,
    size: int,
    clip_len: int,
    fit: str = "stretch",
) -> Video:
    """Make a video of frames that are there already.

    Args:
        video: uint8 pixels ``(F, 3, H, W)`` or ``(F, H, W, 3)``, a list of pictures or of image files, or a pair of
            one of these and metadata.
        metadata: transformers' ``VideoMetadata`` or its fields: which frames of which video these are, and its clock.
            Frames without a clock count as 24 per second, as in transformers, with one warning.
        settings: those of `hico.video_io.read_video` that choose among the frames; all are taken if there are none.
        size: pixels per side.
        clip_len: frames per clip.
        fit: one of `hico.preprocessing.FITS`.

    Raises:
        ValueError: if the frames have another shape, the metadata describe others, or a setting has no effect.
        TypeError: if a setting or a key of the metadata is unknown.
    """
    if is_with_metadata(video):
        if metadata is not None:
            raise ValueError("video_metadata is given for frames that come with their own; leave one out")
        video, metadata = video
    frames = _pictures(video)
    metadata = _completed(metadata, len(frames))
    chosen = list(range(len(frames)))
    if settings:
        chosen = _choose(metadata, settings, clip_len=clip_len)
        frames = frames[chosen] if isinstance(frames, (Tensor, np.ndarray)) else [frames[index] for index in chosen]
    if metadata.fps is None:
        _warn_once(
            "frames without a clock are taken for %g per second; give video_metadata with their fps, which the prompt "
            "tells the model",
            USUAL_FPS,
        )
    fps = metadata.fps or USUAL_FPS
    seconds = torch.tensor([metadata.frames_indices[index] / fps for index in chosen], dtype=torch.float64)
    pixels = resize_frames(frames, size, fit=fit)
    duration = metadata.duration or metadata.total_num_frames / fps
    info = VideoInfo("frames", metadata.total_num_frames, fps, duration, *to_pil(frames[0]).size, 0, "frames")
    return Video(pixels, seconds, info, start=0.0, duration=duration)


def _pictures(video: Any) -> Tensor | Sequence[Any]:
    if isinstance(video, (list, tuple)):
        if not video:
            raise ValueError("a video is an empty list; give it at least one frame")
        return [open_image(frame) for frame in video]
    if video.ndim != 4 or not len(video):
        raise ValueError(f"frames of shape {tuple(video.shape)} are not (F, 3, H, W) with at least one frame")
    return torch.as_tensor(video)


def _completed(metadata: Mapping[str, Any] | None, num_frames: int) -> VideoMetadata:
    """Fill in which frames these are, and the clock, as far as it is known; checks both."""
    known = VideoMetadata(**(metadata or {"total_num_frames": num_frames}))
    indices, total = known.frames_indices, known.total_num_frames
    if indices is None:
        indices = range(num_frames)
        if total != num_frames:
            raise ValueError(
                f"video_metadata is of a video of {total} frames, of which {num_frames} are given; say which they are "
                "in frames_indices"
            )
    indices = [int(index) for index in indices]
    if len(indices) != num_frames:
        raise ValueError(f"frames_indices of video_metadata names {len(indices)} frames, but {num_frames} are given")
    fps = known.fps or (total / known.duration if known.duration else None)
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"video_metadata has fps {fps}; it must be a positive number of frames per second")
    return VideoMetadata(total, fps=fps, duration=known.duration, frames_indices=indices)


def _choose(metadata: VideoMetadata, settings: Mapping[str, Any], *, clip_len: int) -> list[int]:
    if without := [name for name in settings if name not in _SAMPLING]:
        raise ValueError(f"{', '.join(without)} have no effect on frames that are given; choose among them yourself")
    if metadata.fps is None and "num_frames" not in settings:
        raise ValueError(
            f"{', '.join(settings)} choose frames by their times, but these have no clock; give video_metadata with "
            "fps, or ask for num_frames"
        )
    indices, fps = metadata.frames_indices, metadata.fps or USUAL_FPS
    num_steps, span = len(indices) - 1, indices[-1] - indices[0]
    if span > 0 and span != num_steps:
        fps = fps * num_steps / span  # of the frames that are given
    settings = {"rate" if name == "fps" else name: value for name, value in settings.items()}
    return sample_frames(len(indices), fps, clip_len=clip_len, **settings)


@lru_cache(maxsize=8)
def _warn_once(message: str, *values: Any) -> None:
    logger.warning(message, *values)
