"""Where a video comes from: a path, a URL, bytes or a file object, opened as often as the decoding threads like."""

import io
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error


class VideoError(ValueError):
    """A video that cannot be read as asked. The message names the file and says what to do."""


class _View(io.RawIOBase):
    """A reader of a shared file object with a position of its own."""

    def __init__(self, file: BinaryIO, lock: threading.Lock):
        self._file, self._lock, self._position = file, lock, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            self._position = offset
        elif whence == os.SEEK_CUR:
            self._position += offset
        else:
            with self._lock:
                self._position = self._file.seek(offset, whence)
        return self._position

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            self._file.seek(self._position)
            data = self._file.read(size)
        self._position += len(data)
        return data


@dataclass(frozen=True)
class Source:
    """A video that can be opened several times at once.

    Args:
        name: how messages call it.
        location: path or URL; None for bytes and file objects.
        file: the seekable file object, where there is no location.
        lock: guards the position of ``file``.
    """

    name: str
    location: str | None = None
    file: BinaryIO | None = None
    lock: Any = None

    def fresh_file(self) -> BinaryIO:
        """Return a file object over the same bytes, at its start, with a position of its own."""
        return _View(self.file, self.lock)

    def open(self) -> av.container.InputContainer:
        """Open the container.

        Raises:
            VideoError: if FFmpeg does not recognise it.
        """
        try:
            return av.open(self.location if self.file is None else self.fresh_file(), metadata_errors="ignore")
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(
                f"{self.name}: cannot be opened as a video ({_reason(error)}); the file is damaged, cut off, or not "
                "a video. Fetch it again, or check it with ffprobe"
            ) from error


def as_source(source: str | os.PathLike | bytes | bytearray | memoryview | BinaryIO) -> Source:
    """Accept what users call a video.

    Raises:
        VideoError: if the file does not exist, is empty, a pipe or closed.
        TypeError: if it is none of the known kinds, or open as text.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise VideoError("<bytes>: is empty (0 bytes); was it read to its end before?")
        return _of_file(io.BytesIO(source), f"<{len(source)} bytes>")
    if isinstance(source, (str, os.PathLike)):
        return _of_path(os.fspath(source))
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        if getattr(source, "closed", False):
            raise VideoError(f"{name or '<file object>'}: is closed; open it again")
        if isinstance(source, io.TextIOBase):
            raise TypeError(f"{name or '<file object>'} is open as text; open it with mode 'rb'")
        seekable = getattr(source, "seekable", None)
        if not (seekable and seekable()):
            source = io.BytesIO(source.read())
        if not source.seek(0, os.SEEK_END):
            raise VideoError(f"{name or '<file object>'}: is empty (0 bytes); was it written and flushed?")
        return _of_file(source, str(name or "<file object>"))
    raise TypeError(f"a video is a path, a URL, bytes or a binary file object, not {type(source).__name__}")


def _of_file(file: BinaryIO, name: str) -> Source:
    return Source(name=name, file=file, lock=threading.Lock())


def _of_path(location: str) -> Source:
    if "://" in location:
        return Source(name=location, location=location)
    path = Path(location).expanduser()
    if not location or not path.exists():
        raise VideoError(f"{location or repr('')}: no such file; check the path, or the folder that it is relative to")
    if not (path.is_file() or path.is_dir()):
        raise VideoError(f"{location}: is neither a file nor a folder; save it to a file, or give its bytes")
    if path.is_file() and not path.stat().st_size:
        raise VideoError(f"{location}: is empty (0 bytes); fetch it again")
    return Source(name=location, location=str(path))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
