"""What a reader is, where its frames go, and the readers by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from hico.registry import Registry
from hico.video_io.index import VideoIndex
from hico.video_io.resize import ExactResizer
from hico.video_io.source import Source


class Sink(ABC):
    """Takes finished samples, from any thread."""

    @abstractmethod
    def put(self, here: int, picture: np.ndarray, second: float) -> None:
        """Take a sample; may wait until earlier ones are there.

        Args:
            here: its number among the wanted frames.
            picture: ``(h, w, 3)`` uint8; copied before this returns.
            second: when it appears, from the start of the video.
        """

    def fail(self, error: BaseException) -> None:  # noqa: B027 - most sinks never wait
        """Release whoever waits for a sample that will not come."""


class Reader(ABC):
    """Gets numbered frames out of a video whose index is known."""

    @abstractmethod
    def decode(
        self,
        source: Source,
        index: VideoIndex,
        wanted: list[int],
        sink: Sink,
        *,
        resizer: Callable[[], ExactResizer],
        num_threads: int,
        max_ahead: int,
    ) -> int:
        """Decode frames and hand each one over, resized, as soon as it is there.

        Args:
            source: the video.
            index: its index.
            wanted: frame numbers, strictly increasing.
            sink: takes the samples.
            resizer: makes the resizer of one thread.
            num_threads: threads to decode with.
            max_ahead: samples that the sink takes beyond the first one that is still missing.

        Returns:
            How many samples were lost and replaced by another frame.

        Raises:
            VideoError: if the reader cannot decode the video.
        """


READERS = Registry(
    "video reader",
    {
        "pyav": "hico.video_io.pyav:PyAVReader",
        "decord": "hico.video_io.libraries:DecordReader",
        "torchcodec": "hico.video_io.libraries:TorchCodecReader",
    },
)
