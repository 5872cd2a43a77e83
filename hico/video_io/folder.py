"""A folder of images as a video."""

import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from hico.preprocessing import to_pil
from hico.video_io.base import Reader
from hico.video_io.index import Keyframe, VideoIndex, VideoInfo
from hico.video_io.source import Source, VideoError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder in natural order (2 before 10).

    Raises:
        VideoError: if there is none.
    """
    names = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    files = [path for path in names if not path.is_dir()]
    if not files:
        raise VideoError(f"{folder}: has no images; expected files that end in {', '.join(sorted(SUFFIXES))}")
    return sorted(files, key=_natural)


def index_folder(source: Source, fps: float) -> VideoIndex:
    """Number the images and give them times.

    Raises:
        VideoError: if the folder has no images, or ``fps`` is not positive.
    """
    if not 0 < fps < float("inf"):
        raise VideoError(f"{source.name}: folder_fps is {fps}; it must be a positive number of images per second")
    files = image_files(Path(source.location))
    width, height = _open(source, files[0]).size
    seconds = np.arange(len(files)) / fps
    info = VideoInfo(
        name=source.name,
        num_frames=len(files),
        fps=float(fps),
        duration=len(files) / fps,
        width=width,
        height=height,
        rotation=0,
        codec="images",
    )
    keyframes = tuple(Keyframe(position, position, position) for position in range(len(files)))
    return VideoIndex(
        info=info, start=0.0, tick=1 / fps, seconds=seconds, pts=np.arange(len(files)), keyframes=keyframes
    )


class FolderReader(Reader):
    """Opens the images; a broken one is replaced by the one before it, or the next good one at the start."""

    def decode(self, source, index, wanted, sink, *, resizer, num_threads, max_ahead):
        files = image_files(Path(source.location))
        resize = resizer()
        num_lost, last = 0, None
        for here, position in enumerate(wanted):
            try:
                last = resize.from_image(_open(source, files[position])), float(index.seconds[position])
            except VideoError:
                num_lost += 1
                last = last or self._next_good(source, files, position, resize, index)
            sink.put(here, *last)
        return num_lost

    def _next_good(self, source, files, position, resize, index):
        for later in range(position + 1, len(files)):
            try:
                return resize.from_image(_open(source, files[later])), float(index.seconds[later])
            except VideoError:
                continue
        raise VideoError(f"{source.name}: no image could be opened from {files[position].name} on; check the files")


def _open(source: Source, path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_pil(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise VideoError(f"{source.name}: {path.name} cannot be opened as an image ({error}); replace it") from error


def _natural(path: Path) -> list[tuple[int, str]]:
    """Split a name into texts and numbers, for an order in which numbers count."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", path.name)]
