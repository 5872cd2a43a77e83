"""What reading a row depends on, beside the row."""

from dataclasses import dataclass, field
from typing import Any


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
    """Further settings of `hico.video_io.read_video`, such as ``{scaler: fast, exact: false}``."""
    time_message: str | None = "short"
    """Sentence about duration and sampling after each video: ``short``, ``long`` or nothing."""
    label_scheme: str = "assistant"
    """What is learned: a scheme of `hico.prompt.label_mask`."""
    max_length: int = 32768
    """Tokens of a row at most, visual tokens included."""
    on_bad_sample: str = "raise"
    """What a row that cannot be read does: ``raise`` or ``skip``."""
    decode_timeout: float | None = 120.0
    """Seconds after which the decoding of a row is killed; no limit if null."""
