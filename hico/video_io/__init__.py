"""Video in: open, probe, sample, decode and resize, in memory bounded by the sampled frames.

``read_video`` returns the frames at once, ``stream_video`` in chunks while the next ones decode, ``probe`` only the
facts. A source is a path, a URL, a folder of images, bytes or a binary file object.
"""

from hico.video_io.api import Video, probe, read_video, stream_video
from hico.video_io.base import READERS
from hico.video_io.index import VideoInfo
from hico.video_io.plan import ReadSettings
from hico.video_io.resize import SCALERS
from hico.video_io.source import VideoError
from hico.video_io.stream import VideoStream

__all__ = [
    "READERS",
    "SCALERS",
    "ReadSettings",
    "Video",
    "VideoError",
    "VideoInfo",
    "VideoStream",
    "probe",
    "read_video",
    "stream_video",
]
