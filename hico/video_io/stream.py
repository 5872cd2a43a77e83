"""Frames in chunks, decoded ahead of whoever uses them."""

import threading
from collections.abc import Iterator

import numpy as np
import torch

from hico.video_io.base import Sink
from hico.video_io.plan import Plan

DEPTH = 3
"""Chunks that may be under way or waiting; the consumer holds one more."""


class _Closed(RuntimeError):
    """Ends the decoding of a stream that nobody reads any more."""

    def __init__(self) -> None:
        super().__init__("this stream was read or closed already; open it again with stream_video")


class _Window(Sink):
    """The chunks between the decoding threads and the consumer."""

    def __init__(self, plan: Plan, chunk_frames: int):
        self.seconds = plan.seconds.copy()
        self._places, self._size, self._chunk_frames = plan.places, plan.size, chunk_frames
        self._changed = threading.Condition()
        self._chunks: dict[int, np.ndarray] = {}
        self._missing: dict[int, int] = {}
        self._next = 0
        self._error: BaseException | None = None

    def put(self, here: int, picture: np.ndarray, second: float) -> None:
        for place in self._places[here]:
            number, row = divmod(place, self._chunk_frames)
            with self._changed:
                self._changed.wait_for(lambda number=number: self._error or number < self._next + DEPTH)
                if self._error is not None:
                    raise _Closed
                if number not in self._chunks:
                    num_frames = min(self._chunk_frames, len(self.seconds) - number * self._chunk_frames)
                    self._chunks[number] = np.empty((num_frames, 3, *self._size), np.uint8)
                    self._missing[number] = num_frames
            self._chunks[number][row] = picture.transpose(2, 0, 1)
            self.seconds[place] = second
            with self._changed:
                self._missing[number] -= 1
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def take(self) -> torch.Tensor:
        """Wait for the next chunk.

        Raises:
            Exception: what the decoding raised, if it failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._missing.get(self._next) == 0)
            if self._missing.get(self._next) != 0:
                raise self._error
            chunk = self._chunks.pop(self._next)
            del self._missing[self._next]
            self._next += 1
            self._changed.notify_all()
        return torch.from_numpy(chunk)


class VideoStream:
    """The sampled frames of a video, chunk by chunk; iterate once.

    Decoding starts with the first chunk asked for and runs ahead in the background by at most three chunks, so memory
    does not grow with the number of frames. Leaving the loop early, ``close()`` or the end of a ``with`` block stops
    it.

    Attributes:
        info: the facts about the whole video.
        num_frames: frames that will come, with sampling and padding done.
        num_chunks: chunks that will come.
        chunk_frames: frames per chunk; the last one may have fewer.
        size: ``(height, width)`` of the frames.
        seconds: ``(num_frames,)`` float64, when each frame appears, from the start of the video. Known beforehand;
            after the iteration corrected where another frame stands in for a lost one.
        start: seconds, where the chosen part begins.
        duration: seconds, length of the chosen part.
        num_lost: frames that could not be decoded, each replaced by the nearest good one; None until all are there.
    """

    def __init__(self, plan: Plan, *, chunk_frames: int):
        self.info = plan.index.info
        self.num_frames = len(plan.seconds)
        self.chunk_frames = chunk_frames
        self.num_chunks = -(-self.num_frames // chunk_frames)
        self.size = plan.size
        self.start = plan.start
        self.duration = plan.duration
        self.num_lost: int | None = None
        self._plan = plan
        self._window = _Window(plan, chunk_frames)
        self._thread: threading.Thread | None = None
        self._is_used = False

    @property
    def seconds(self) -> torch.Tensor:
        return torch.from_numpy(self._window.seconds.copy())

    @property
    def fps(self) -> float:
        """Frames per second of the source."""
        return self.info.fps

    @property
    def name(self) -> str:
        return self.info.name

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield ``(chunk_frames, 3, h, w)`` uint8 chunks in order.

        Raises:
            RuntimeError: if the stream was read or closed before.
            VideoError: if the video cannot be decoded.
        """
        if self._is_used:
            raise _Closed
        self._is_used = True
        self._thread = threading.Thread(target=self._run, name=f"decode {self.name}", daemon=True)
        self._thread.start()
        try:
            for _ in range(self.num_chunks):
                yield self._window.take()
        finally:
            self.close()

    def _run(self) -> None:
        try:
            self.num_lost = self._plan.decode(self._window, max_ahead=DEPTH * self.chunk_frames)
        except _Closed:
            pass  # The reason is known to the window.
        except BaseException as error:
            self._window.fail(error)

    def close(self) -> None:
        """Stop decoding and wait for its threads to end. Closing twice is harmless."""
        self._is_used = True
        self._window.fail(_Closed())
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "VideoStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
