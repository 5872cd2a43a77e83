"""A folder of images, or an animation that Pillow reads and FFmpeg does not (webp), as a video."""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from hico.preprocessing import to_pil
from hico.video_io.base import Reader
from hico.video_io.clock import Start
from hico.video_io.index import VideoIndex, VideoInfo
from hico.video_io.source import Source, VideoError, refuse_large

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})

SHORTEST_MILLISECONDS = 10
"""Up to it, browsers show a frame of an animation for 100 ms."""


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
    size = _open(source, files[0]).size
    return _index(source, np.arange(len(files) + 1) / fps, size, fps=float(fps), codec="images")


def is_animation(source: Source) -> bool:
    """Tell whether a source is a webp."""
    if source.is_remote:
        return False
    with source.local_file() as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def index_animation(source: Source) -> VideoIndex:
    """List the frames of a webp from its chunks.

    Raises:
        VideoError: if it cannot be opened.
    """
    with source.local_file() as file:
        lengths = list(_webp_milliseconds(file.read)) or [100]
    with _image(source, source.name, source.local_file()) as image:
        size = image.size
    edges = np.cumsum([0, *(length if length > SHORTEST_MILLISECONDS else 100 for length in lengths)]) / 1000
    return _index(source, edges, size, fps=len(lengths) / edges[-1], codec="webp")


def _webp_milliseconds(read: Callable[[int], bytes]) -> Iterator[int]:
    read(12)
    while len(head := read(8)) == 8:
        size = int.from_bytes(head[4:], "little")
        content = read(size + size % 2)
        if head[:4] == b"ANMF" and len(content) >= 16:
            yield int.from_bytes(content[12:15], "little")


def _index(source: Source, edges: np.ndarray, size: tuple[int, int], *, fps: float, codec: str) -> VideoIndex:
    info = VideoInfo(
        name=source.name,
        num_frames=len(edges) - 1,
        fps=float(fps),
        duration=float(edges[-1]),
        width=size[0],
        height=size[1],
        rotation=0,
        codec=codec,
    )
    starts = tuple(Start(position, position) for position in range(info.num_frames))
    return VideoIndex(info=info, seconds=edges[:-1], starts=starts)


class _PictureReader(Reader):
    """Opens pictures one by one; a broken one is replaced by the one before it, or the next good one at the start."""

    def decode(self, source, index, wanted, sink, *, resizer, num_threads, max_ahead):
        resize = resizer()
        num_lost, last = 0, None
        with self._opened(source) as picture:

            def read(position: int) -> tuple[np.ndarray, float]:
                return resize.from_image(picture(position)), float(index.seconds[position])

            for here, position in enumerate(wanted):
                try:
                    last = read(position)
                except VideoError:
                    num_lost += 1
                    last = last or self._next_good(source, index, position, read)
                sink.put(here, *last)
        return num_lost

    @abstractmethod
    def _opened(self, source: Source) -> AbstractContextManager[Callable[[int], Image.Image]]:
        """Return what gives an upright picture by its number, or raises VideoError."""

    def _next_good(self, source, index, position, read):
        for later in range(position + 1, len(index.seconds)):
            try:
                return read(later)
            except VideoError:
                continue
        raise VideoError(f"{source.name}: no image could be opened from number {position} on; check the files")


class FolderReader(_PictureReader):
    """Opens the images of a folder."""

    @contextmanager
    def _opened(self, source):
        files = image_files(Path(source.location))
        yield lambda position: _open(source, files[position])


class AnimationReader(_PictureReader):
    """Opens the frames of an animation."""

    @contextmanager
    def _opened(self, source):
        with _image(source, source.name, source.local_file()) as image:

            def picture(position: int) -> Image.Image:
                with _named(source, f"frame {position}"):
                    image.seek(position)
                    return to_pil(image)

            yield picture


def _open(source: Source, path: Path) -> Image.Image:
    with _named(source, path.name), Image.open(path) as image:
        refuse_large(source.name, *image.size)
        return to_pil(image)


@contextmanager
def _image(source: Source, name: str, file: BinaryIO) -> Iterator[Image.Image]:
    with file, ExitStack() as stack:
        with _named(source, name):
            image = stack.enter_context(Image.open(file))
            refuse_large(source.name, *image.size)
        yield image


@contextmanager
def _named(source: Source, name: str) -> Iterator[None]:
    try:
        yield
    except VideoError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise VideoError(f"{source.name}: {name} cannot be opened as an image ({error}); replace it") from error


def _natural(path: Path) -> list[tuple[int, str]]:
    """Split a name into texts and numbers, for an order in which numbers count."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", path.name)]
