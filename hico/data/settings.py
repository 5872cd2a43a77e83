"""What reading a row depends on, beside the row."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class RowSettings:
    """How rows become examples: frames, text, lengths, and what a bad row does."""

    frame_sampling: str = "dynamic_fps1"
    """How frames are chosen: a mode of `hico.video_io.read_video`."""
    min_frames: int = 4
    """Fewest frames of a video."""
    max_frames: int = 8
    """Most frames of a video."""
    video: dict[str, Any] = field(default_factory=dict)
    """Further settings of `hico.video_io.read_video`, such as ``{scaler: exact, start: 60}``."""
    time_message: Literal["short", "long"] | None = "short"
    """Sentence about duration and sampling after each video: ``short``, ``long`` or nothing."""
    label_scheme: Literal["assistant", "published", "longva"] = "assistant"
    """What is learned: a scheme of `hico.data.labels.Labels`."""
    max_length: int = 32768
    """Tokens of a row at most, visual tokens included."""
    on_long_sample: Literal["cut", "bad"] = "cut"
    """What a longer row does: ``cut`` loses the end of its text, and is a bad row only where that would cut a video
    or image, or all that is learned; ``bad`` makes it a bad row always."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What a row that cannot be read does."""
    decode_timeout: float | None = 120.0
    """Seconds after which the decoding of a row is killed; no limit if null."""


def frame_settings(settings: RowSettings) -> dict[str, Any]:
    """Return what is said about frames in the words of `hico.sampling.sample_frames`.

    ``middle`` and ``rand`` take ``max_frames``, however long the video.
    """
    if settings.frame_sampling in ("middle", "rand"):
        return {"mode": settings.frame_sampling, "num_frames": settings.max_frames}
    return {"mode": settings.frame_sampling, "min_frames": settings.min_frames, "max_frames": settings.max_frames}


def own_fit(processor: Any) -> dict[str, str]:
    """Return how a processor makes squares of frames, which training does not change unless it says so."""
    return {name: value for name, value in processor.video.items() if name == "fit"}


def read_settings(settings: RowSettings, clip_len: int) -> dict[str, Any]:
    """Return what is said about videos in the words of `hico.video_io.read_video`."""
    return {**frame_settings(settings), **settings.video, "clip_len": clip_len}
