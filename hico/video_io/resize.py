"""From a decoded frame to RGB of the wanted size."""

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from hico.registry import Registry

TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class ExactResizer:
    """Resize as the published preprocessing does: whole frame to RGB, upright, then PIL's bicubic filter on bytes.

    One instance serves one thread.

    Args:
        size: ``(height, width)`` of the result; the aspect ratio is not kept.
        rotation: degrees counter-clockwise to turn decoded frames; images and arrays are taken as upright.
    """

    def __init__(self, size: tuple[int, int], rotation: int = 0):
        self.size = size
        self.rotation = rotation
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Return ``(h, w, 3)`` uint8."""
        image = self._to_image(frame)
        return self.from_image(image.transpose(TURNS[self.rotation]) if self.rotation else image)

    def from_image(self, image: Image.Image) -> np.ndarray:
        """Resize an upright image; returns ``(h, w, 3)`` uint8."""
        if image.mode not in {"RGB", "RGBX"}:
            image = image.convert("RGB")
        if image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BICUBIC)
        return np.asarray(image)[..., :3]

    def _to_image(self, frame: av.VideoFrame) -> Image.Image:
        # PIL reads four bytes per pixel in place, and copies three. swscale (8.1) leaves the last columns black in
        # rgb0 where the width is 1 to 4 above a multiple of 16. Its own threads race where rows meet: threads=1.
        layout, mode = ("rgb24", "RGB") if frame.width % 16 else ("rgb0", "RGBX")
        plane = self._reformatter.reformat(frame, format=layout, threads=1).planes[0]
        return Image.frombuffer(mode, (frame.width, frame.height), plane, "raw", mode, plane.line_size, 1)


class FastResizer(ExactResizer):
    """Resize and convert in one step of swscale. A few grey levels off the exact result on harsh pictures."""

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Return ``(h, w, 3)`` uint8."""
        height, width = self.size[::-1] if self.rotation in {90, 270} else self.size
        scaled = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )
        return np.rot90(scaled.to_ndarray(), self.rotation // 90)  # counter-clockwise, like PIL's ROTATE_90

    def from_image(self, image: Image.Image) -> np.ndarray:
        """Resize an upright image; returns ``(h, w, 3)`` uint8."""
        image.draft("RGB", self.size[::-1])
        return np.asarray(image.convert("RGB").resize(self.size[::-1], Image.Resampling.BICUBIC, reducing_gap=2.0))


SCALERS = Registry(
    "scaler",
    {
        "exact": "hico.video_io.resize:ExactResizer",
        "fast": "hico.video_io.resize:FastResizer",
    },
)
