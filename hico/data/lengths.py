"""Estimates of how many tokens rows take, made without opening their media."""

import numpy as np

from hico.data.mixture import Mixture
from hico.data.settings import RowSettings
from hico.processing_hico import IMAGE_GRIDS, HicoProcessor
from hico.prompt import time_message

TYPICAL_GRID = (2, 3)
"""Rows and columns taken for an image that may be tiled: those of a 640 x 480 photograph at 224 pixels a tile."""


def estimate_lengths(mixture: Mixture, processor: HicoProcessor, settings: RowSettings) -> np.ndarray:
    """Estimate the tokens of every row.

    Videos whose rows give ``start`` and ``end`` or a ``duration`` count the frames that dynamic sampling takes;
    others count ``max_frames``. Tiled images count a typical grid. Text counts by its bytes, as fitted to some rows,
    and by the sentence about each video.

    Returns:
        ``(n,)`` int64, at most ``max_length``.
    """
    vision = processor.vision
    frames = np.full(len(mixture), settings.max_frames, dtype=np.float64)
    if settings.frame_sampling == "dynamic_fps1":
        known = ~np.isnan(mixture.seconds)
        per_video = np.floor(mixture.seconds[known] / np.maximum(mixture.num_videos[known], 1))
        frames[known] = np.clip(per_video, settings.min_frames, settings.max_frames)
    clips = np.ceil(frames / vision.clip_len) * mixture.num_videos
    grid = TYPICAL_GRID if IMAGE_GRIDS[processor.image_tiling]() else (0, 0)
    visual = clips * vision.num_video_tokens(vision.clip_len)
    # num_images is 0 for most rows, and the encoder may not take single frames: ask only if there are images.
    if mixture.num_images.any():
        visual += mixture.num_images * vision.num_image_tokens(grid)
    sentence = time_message(settings.time_message, duration=100, seconds=range(settings.max_frames))
    visual += mixture.num_videos * len(processor.tokenizer(sentence)["input_ids"])
    per_row, per_byte = _fit_text(mixture, processor)
    return np.clip(np.ceil(visual + per_row + per_byte * mixture.text_bytes), 1, settings.max_length).astype(np.int64)


def _fit_text(mixture: Mixture, processor: HicoProcessor, num_rows: int = 64) -> tuple[float, float]:
    """Fit the tokens of a row's text, the headers of its turns included: so many per row and per byte."""
    chosen = np.linspace(0, len(mixture) - 1, min(num_rows, len(mixture))).astype(int)
    texts = [processor.apply_chat_template(mixture.record(index).messages) for index in chosen.tolist()]
    tokens = np.array([len(ids) for ids in processor.tokenizer(texts)["input_ids"]], dtype=np.float64)
    columns = np.stack([np.ones(len(chosen)), mixture.text_bytes[chosen]], axis=1)
    per_row, per_byte = np.linalg.lstsq(columns, tokens, rcond=None)[0]
    return float(per_row), float(per_byte)
