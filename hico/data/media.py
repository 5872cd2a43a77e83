"""The videos and images of a row: decoded, or only measured."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from hico.data.forms import Media
from hico.data.rowfiles import open_source
from hico.video_io import ReadSettings, Video, VideoError, read_video
from hico.video_io.plan import make_plan


def read_media(
    media: Sequence[Media], seed: int, own: dict[str, Any], *, settings: dict[str, Any]
) -> list[Video | Image.Image]:
    """Decode the videos and images of a row; runs in the child process of `hico.data.decoding.TimedReader`.

    Args:
        media: of the row, in order.
        seed: of random sampling.
        own: settings of `hico.video_io.read_video` for the row's dataset.
        settings: those for all.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        _read_video(item, {**settings, **own, "generator": generator}) if item.kind == "video" else _read_image(item)
        for item in media
    ]


def measure(item: Media, settings: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Return the times of the frames that a video will give, and how long it lasts, or width and height of an image.

    Nothing but a video's index and an image's header is read.
    """
    if item.kind == "image":
        with Image.open(open_source(item.source)) as image:
            return np.array(image.size, dtype=np.float64), 0.0
    with _opened(item) as source:
        plan = make_plan(source, ReadSettings.of({**settings_of(item, settings), "generator": torch.Generator()}))
    return plan.seconds, plan.duration


def settings_of(item: Media, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `hico.video_io.read_video` for one video, where what its row says comes first."""
    settings = {**settings, "start": item.start, "end": item.end}
    if item.num_frames is not None:
        asked, idle = {"num_frames": item.num_frames}, ("mode", "min_frames", "max_frames")
    elif item.fps is not None:
        most = settings.get("max_frames", settings.get("num_frames"))
        asked, idle = {"fps": item.fps, "max_frames": most}, ("mode", "num_frames")
    else:
        return settings
    return {name: value for name, value in settings.items() if name not in idle} | asked


def _read_video(item: Media, settings: Mapping[str, Any]) -> Video:
    with _opened(item) as source:
        video = read_video(source, **settings_of(item, settings))
    # As an array, the frames go through the pipe in one piece.
    return replace(video, frames=video.frames.numpy())


def _read_image(item: Media) -> Image.Image:
    with Image.open(open_source(item.source)) as image:
        return image.convert("RGB")


@contextmanager
def _opened(item: Media) -> Iterator[str | io.BytesIO]:
    """Yield what `hico.video_io` opens; frames that are named one by one become a folder while they are read."""
    if not isinstance(item.source, tuple):
        yield open_source(item.source)
        return
    with TemporaryDirectory(prefix="frames-") as folder:
        for number, frame in enumerate(item.source):
            there, frame_file = Path(folder) / f"{number}{PurePath(str(frame)).suffix}", open_source(frame)
            if isinstance(frame_file, str):
                there.symlink_to(os.path.abspath(frame_file))
            else:
                there.write_bytes(frame_file.read())
        try:
            yield folder
        except VideoError as error:
            raise VideoError(str(error).replace(folder, f"{item.source[0]} and others")) from error
