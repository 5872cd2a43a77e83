"""Where a video comes from: a path, a URL, bytes or a file object, opened as often as the decoding threads like."""

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error

from hico.video_io.joined import without_headers

MAX_PIXELS = 1 << 26
"""Pixels of a picture, 8192 x 8192; larger ones are refused, whoever decodes them."""

TOO_SLOW = (av.error.ExitError, av.error.TimeoutError)
"""What FFmpeg raises where a server does not answer in time."""

TEXT = frozenset({"tty"})
"""FFmpeg's formats that draw a text file."""


class VideoError(ValueError):
    """A video that cannot be read as asked. The message names the file and says what to do."""


def refuse_large(name: str, width: int, height: int) -> None:
    """Refuse a picture that would take gigabytes.

    Raises:
        VideoError: if it has more than ``MAX_PIXELS``.
    """
    if width * height > MAX_PIXELS:
        raise VideoError(
            f"{name}: has pictures of {width} x {height} pixels, and at most {MAX_PIXELS} pixels are read; "
            "make them smaller"
        )


class _View(io.RawIOBase):
    """A reader of a shared file object with a position of its own."""

    def __init__(self, file: BinaryIO, lock: threading.Lock, name: str):
        self._file, self._lock, self._name, self._position = file, lock, name, 0

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
            with self._lock, self._named():
                self._position = self._file.seek(offset, whence)
        return self._position

    def read(self, size: int = -1) -> bytes:
        with self._lock, self._named():
            self._file.seek(self._position)
            data = self._file.read(size)
            self._position += len(data)
        return data

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise VideoError(f"{self._name}: the file object failed while it was read ({reason})") from error


@dataclass(frozen=True)
class Source:
    """A video that can be opened several times at once.

    Args:
        name: how messages call it.
        location: path or URL; None for bytes and file objects.
        file: the seekable file object, where there is no location.
        lock: guards the position of ``file``.
        timeout: seconds that a server may take to answer.
    """

    name: str
    location: str | None = None
    file: BinaryIO | None = None
    lock: Any = None
    timeout: float = 30.0

    def fresh_file(self) -> BinaryIO:
        """Return a file object over the same bytes, at its start, with a position of its own."""
        return _View(self.file, self.lock, self.name)

    @property
    def is_remote(self) -> bool:
        return self.file is None and "://" in self.location

    def local_file(self) -> BinaryIO | None:
        """Return a file object over the bytes, at their start; None for a URL. Close it unless it is a view."""
        if self.file is not None:
            return self.fresh_file()
        try:
            return None if self.is_remote else open(self.location, "rb")
        except OSError as error:
            raise VideoError(f"{self.name}: cannot be opened ({_reason(error)}); check the path") from error

    def open(self) -> av.container.InputContainer:
        """Open the container.

        Raises:
            VideoError: if FFmpeg does not recognise it, it is text, or it does not answer in time.
        """
        where = self.location if self.file is None else self.fresh_file()
        options = {"rw_timeout": str(round(self.timeout * 1e6))} if self.is_remote else {}
        try:
            container = av.open(
                where,
                options=options,
                metadata_errors="ignore",
                timeout=self.timeout if self.is_remote else None,
            )
        except TOO_SLOW as error:
            raise self.too_slow() from error
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, VideoError):
                raise
            raise VideoError(
                f"{self.name}: cannot be opened as a video ({_reason(error)}); the file is damaged, cut off, or not "
                "a video. Fetch it again, or check it with ffprobe"
            ) from error
        if container.format.name in TEXT:
            container.close()
            raise VideoError(f"{self.name}: is text, not a video; check the path")
        return container

    def too_slow(self) -> VideoError:
        """Return the error for a server that does not answer."""
        return VideoError(
            f"{self.name}: did not answer within {self.timeout:g} s; check the address, or set a longer timeout"
        )


def as_source(
    source: str | os.PathLike | bytes | bytearray | memoryview | BinaryIO, *, timeout: float = 30.0
) -> Source:
    """Accept what users call a video; files of FLV and Matroska that were joined are seen as one.

    Args:
        source: path, URL, folder, bytes or file object.
        timeout: seconds that a server may take to answer.

    Raises:
        VideoError: if the file does not exist, is empty, a pipe, closed or cannot be read.
        TypeError: if it is none of the known kinds, or open as text.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise VideoError("<bytes>: is empty (0 bytes); was it read to its end before?")
        return _of_file(io.BytesIO(source), f"<{len(source)} bytes>")
    if isinstance(source, (str, os.PathLike)):
        return _of_path(os.fsdecode(source), timeout)
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        if getattr(source, "closed", False):
            raise VideoError(f"{name or '<file object>'}: is closed; open it again")
        if isinstance(source, io.TextIOBase):
            raise TypeError(f"{name or '<file object>'} is open as text; open it with mode 'rb'")
        seekable = getattr(source, "seekable", None)
        try:
            if not (seekable and seekable()):
                source = io.BytesIO(source.read())
            length = source.seek(0, os.SEEK_END)
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise VideoError(f"{name or '<file object>'}: cannot be read ({reason}); open it again") from error
        if not length:
            raise VideoError(f"{name or '<file object>'}: is empty (0 bytes); was it written and flushed?")
        return _of_file(source, str(name or "<file object>"))
    raise TypeError(f"a video is a path, a URL, bytes or a binary file object, not {type(source).__name__}")


def _of_file(file: BinaryIO, name: str) -> Source:
    return _joined(Source(name=name, file=file, lock=threading.Lock()))


def _joined(source: Source) -> Source:
    """Let files of FLV and Matroska that were joined be seen as one."""
    file = source.local_file()
    spliced = without_headers(file)
    if spliced is not None:
        return replace(source, location=None, file=spliced, lock=threading.Lock())
    file.close()
    return source


def _of_path(location: str, timeout: float) -> Source:
    if "://" in location:
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout is {timeout}; it must be a positive number of seconds")
        return Source(name=location, location=location, timeout=timeout)
    # A path from the root, so that FFmpeg does not take what stands before a colon for a protocol.
    path = Path(os.path.abspath(os.path.expanduser(location)))
    try:
        kind = path.stat() if location else None
    except (OSError, ValueError) as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            kind = None
        else:
            raise VideoError(f"{location}: cannot be opened ({_reason(error)}); check the path") from error
    if kind is None:
        raise VideoError(f"{location or repr('')}: no such file; check the path, or the folder that it is relative to")
    if not (stat.S_ISREG(kind.st_mode) or stat.S_ISDIR(kind.st_mode)):
        raise VideoError(f"{location}: is neither a file nor a folder; save it to a file, or give its bytes")
    if stat.S_ISREG(kind.st_mode) and not kind.st_size:
        raise VideoError(f"{location}: is empty (0 bytes); fetch it again")
    found = Source(name=location, location=str(path))
    return _joined(found) if stat.S_ISREG(kind.st_mode) else found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
