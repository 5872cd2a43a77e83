"""How many tokens rows take: estimated without opening their media, or measured by their headers and indices."""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hico.data.cache import cached
from hico.data.forms import Media
from hico.data.media import measure
from hico.data.mixture import Mixture
from hico.data.settings import RowSettings, read_settings
from hico.grids import choose_grid
from hico.processing_hico import IMAGE_GRIDS, HicoProcessor
from hico.prompt import time_message

logger = logging.getLogger(__name__)

TYPICAL_GRID = (2, 3)
"""Rows and columns taken for an image that may be tiled: those of a 640 x 480 photograph at 224 pixels a tile."""


def estimate_lengths(mixture: Mixture, processor: HicoProcessor, settings: RowSettings) -> np.ndarray:
    """Estimate the tokens of every row.

    Videos whose rows give ``start`` and ``end`` or a ``duration`` count the frames that dynamic sampling takes;
    others count ``max_frames``. Tiled images count a typical grid. Text counts by its bytes, as fitted to some rows,
    and by the sentence about each video.

    Returns:
        ``(n,)`` int64, at most ``max_length``; of a preference row twice that of the longer answer, since a batch has
        a row for each.
    """
    vision = processor.vision
    frames = np.full(len(mixture), settings.max_frames, dtype=np.float64)
    if settings.frame_sampling == "dynamic_fps1":
        known = ~np.isnan(mixture.seconds)
        per_video = np.floor(mixture.seconds[known] / np.maximum(mixture.num_videos[known], 1))
        frames[known] = np.clip(per_video, settings.min_frames, settings.max_frames)
    grid = TYPICAL_GRID if _grids(processor) else (0, 0)
    counts, row = np.unique(np.ceil(frames / vision.clip_len), return_inverse=True)
    per_video = [vision.num_video_tokens(int(clips) * vision.clip_len) if clips else 0 for clips in counts]
    visual = np.array(per_video, dtype=np.float64)[row] * mixture.num_videos
    # num_images is 0 for most rows, and the encoder may not take single frames: ask only if there are images.
    if mixture.num_images.any():
        visual += mixture.num_images * vision.num_image_tokens(grid)
    sentence = time_message(settings.time_message, duration=100, seconds=range(settings.max_frames))
    visual += mixture.num_videos * len(processor.tokenizer(sentence)["input_ids"])
    per_row, per_byte = _fit_text(mixture, processor)
    lengths = np.ceil(visual + per_row + per_byte * mixture.text_bytes)
    return _of_batch(lengths.astype(np.int64), mixture, settings)


def measure_lengths(mixture: Mixture, processor: HicoProcessor, settings: RowSettings) -> np.ndarray:
    """Measure the tokens of every row, by its text, the index of its videos and the header of its images.

    What was measured is cached for the same rows, files, tokenizer and settings. A row with a file that cannot be
    measured counts ``max_length``.

    Returns:
        ``(n,)`` int64, as `estimate_lengths`; no row has more tokens.
    """
    stats = [_stat(source) for index in range(len(mixture)) for source in mixture.sources(index)]
    rows = hashlib.sha256(mixture.rows.tobytes()).hexdigest()
    told = [mixture.manifest(), rows, stats, processor.tokenizer.backend_tokenizer.to_str()]
    told += [processor.chat_template, processor.to_dict(), vars(settings), [vars(d.spec) for d in mixture.datasets]]
    content = json.dumps(told, default=str, sort_keys=True)
    found = cached("lengths", [content], lambda: {"lengths": _measure_all(mixture, processor, settings)})
    return _of_batch(found["lengths"], mixture, settings)


def _measure_all(mixture: Mixture, processor: HicoProcessor, settings: RowSettings) -> np.ndarray:
    logger.warning("measuring the videos and images of %d rows, once for these files and settings", len(mixture))
    video = read_settings(settings, processor.vision.clip_len)
    known: dict[tuple[int, int], int] = {}

    def tokens_of(item: Media, own: dict) -> int:
        try:
            seen, duration = measure(item, {**video, **own})
        except Exception:  # a file may fail in any way, and does so again when it is its turn
            return settings.max_length
        if item.kind == "image":
            grids = _grids(processor)
            side = processor.vision.image_size
            grid = choose_grid(*map(int, seen), tile=side, grids=grids)[::-1] if grids else (0, 0)
            return processor.vision.num_image_tokens(grid) - 1
        sentence = time_message(settings.time_message, duration=duration, seconds=seen)
        key = len(seen), len(sentence)
        if key not in known:
            # Of sentences that are equally long, one may take a token more than another.
            known[key] = len(processor.tokenizer(sentence, add_special_tokens=False)["input_ids"]) + 4 * bool(sentence)
        num_frames = len(seen) + -len(seen) % processor.vision.clip_len
        return processor.vision.num_video_tokens(num_frames) + known[key] - 1

    def length_of(index: int) -> int:
        record = mixture.record(index)
        own = mixture.spec(index).video_settings
        texts = [processor.apply_chat_template(talk) for talk in record.talks]
        placed = max(len(ids) for ids in processor.tokenizer(texts)["input_ids"])
        return placed + sum(tokens_of(item, own) for item in record.media)

    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        return np.array(list(pool.map(length_of, range(len(mixture)))), dtype=np.int64)


def _of_batch(lengths: np.ndarray, mixture: Mixture, settings: RowSettings) -> np.ndarray:
    """Return what rows take in a batch, where each of two answers has a row of its own."""
    return np.clip(lengths, 1, settings.max_length) * (2 if mixture.preferences else 1)


def _grids(processor: HicoProcessor) -> list[tuple[int, int]]:
    tiling = processor.image_tiling
    return IMAGE_GRIDS[tiling]() if isinstance(tiling, str) else tiling


def _stat(source) -> tuple[str, int, int]:
    try:
        stat = os.stat(source)
    except (OSError, TypeError):  # missing, or inside another file
        return str(source), 0, 0
    return str(source), stat.st_size, stat.st_mtime_ns


def _fit_text(mixture: Mixture, processor: HicoProcessor, num_rows: int = 64) -> tuple[float, float]:
    """Fit the tokens of a row's text, the headers of its turns included: so many per row and per byte."""
    chosen = np.linspace(0, len(mixture) - 1, min(num_rows, len(mixture))).astype(int)
    texts = [processor.apply_chat_template(mixture.record(index).longest_talk) for index in chosen.tolist()]
    tokens = np.array([len(ids) for ids in processor.tokenizer(texts)["input_ids"]], dtype=np.float64)
    columns = np.stack([np.ones(len(chosen)), mixture.text_bytes[chosen]], axis=1)
    per_row, per_byte = np.linalg.lstsq(columns, tokens, rcond=None)[0]
    return float(per_row), float(per_byte)
