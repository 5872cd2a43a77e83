"""decord and torchcodec as readers. Both are extras, imported only when asked for by name.

The index stays ours: a library that numbers the frames differently from the file's timestamps is refused, for it
would return other frames than asked for.
"""

import importlib
import os
from abc import abstractmethod
from collections.abc import Iterator
from types import ModuleType

import numpy as np
from PIL import Image

from hico.video_io.base import Reader
from hico.video_io.index import VideoIndex
from hico.video_io.packets import BY_BYTES, JUMPS
from hico.video_io.source import Source, VideoError

BATCH_FRAMES = 8
"""Full-size frames held at a time."""


class _LibraryReader(Reader):
    """A library that decodes by frame number, in batches of whole frames."""

    name: str

    def decode(self, source, index, wanted, sink, *, resizer, num_threads, max_ahead):
        if index.packets.container in BY_BYTES | JUMPS or index.timeline.is_counted or index.notes:
            raise VideoError(
                f"{source.name}: is a broadcast stream, or has no sound timestamps, where {self.name} returns other "
                'frames than asked for; use reader="pyav"'
            )
        resize = resizer()
        here = 0
        try:
            for batch in self._batches(source, index, wanted, num_threads):
                for picture in batch:
                    sink.put(here, resize.from_image(Image.fromarray(picture)), float(index.seconds[wanted[here]]))
                    here += 1
        except (RuntimeError, IndexError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise VideoError(
                f'{source.name}: {self.name} cannot decode it ({reason}); use reader="pyav", which decodes more '
                "formats and goes on after damage"
            ) from error
        return 0

    @abstractmethod
    def _batches(self, source: Source, index: VideoIndex, wanted: list[int], num_threads: int) -> Iterator[np.ndarray]:
        """Yield ``(n, h, w, 3)`` uint8, upright, in order."""

    def _check(self, source: Source, index: VideoIndex, positions: list[int], seconds: np.ndarray) -> None:
        if np.abs(seconds - index.seconds[positions]).max() > 0.5 / index.info.fps:
            raise VideoError(
                f"{source.name}: {self.name} shows frames at other times than the file says (an edit list or a "
                'transport stream); use reader="pyav"'
            )

    def _check_count(self, source: Source, index: VideoIndex, num_frames: int) -> None:
        if num_frames != index.info.num_frames:
            raise VideoError(
                f"{source.name}: {self.name} counts {num_frames} frames and the file shows {index.info.num_frames} "
                '(an edit list, or a damaged file); use reader="pyav"'
            )

    def _import(self, module: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except (ImportError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ImportError(
                f'reader="{self.name}" needs the package {self.name}, which cannot be imported ({reason}); '
                f'pip install "hico[{self.name}]", or use reader="pyav"'
            ) from error


class DecordReader(_LibraryReader):
    """decord 0.6: no AV1, no gif."""

    name = "decord"

    def _batches(self, source, index, wanted, num_threads):
        decord = self._import("decord")
        if index.has_leading:
            raise VideoError(
                f"{source.name}: has open GOPs, after whose keyframes decord counts wrongly and returns other frames "
                'than asked for; use reader="pyav"'
            )
        # Without a limit decord retries the end of a transport stream for ever.
        os.environ.setdefault("DECORD_EOF_RETRY_MAX", "128")
        # Opened here, in the process that decodes: a reader opened before a fork hangs in the child.
        file = source.location or source.fresh_file()
        try:
            reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=num_threads)
            self._check_count(source, index, len(reader))
            positions = list(range(len(reader)))
            shown = reader.get_frame_timestamp(positions)[:, 0]
            self._check(source, index, positions, shown - shown[0])
            for first in range(0, len(wanted), BATCH_FRAMES):
                yield reader.get_batch(wanted[first : first + BATCH_FRAMES]).asnumpy()
        except decord.DECORDError as error:
            raise RuntimeError(str(error)) from error


class TorchCodecReader(_LibraryReader):
    """torchcodec 0.12 or newer; it needs FFmpeg's libraries from the system."""

    name = "torchcodec"

    def _batches(self, source, index, wanted, num_threads):
        decoders = self._import("torchcodec.decoders")
        file = source.location or source.fresh_file()
        decoder = decoders.VideoDecoder(file, num_ffmpeg_threads=num_threads, dimension_order="NHWC")
        self._check_count(source, index, len(decoder))
        for first in range(0, len(wanted), BATCH_FRAMES):
            positions = wanted[first : first + BATCH_FRAMES]
            batch = decoder.get_frames_at(positions)
            self._check(source, index, positions, batch.pts_seconds.numpy() - index.start)
            yield batch.data.numpy()
