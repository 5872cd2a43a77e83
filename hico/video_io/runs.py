"""How to get the wanted frames with the least decoding: where to seek, and what may be done side by side."""

from dataclasses import dataclass

import numpy as np

SEEK_COST = 8
"""Frames whose decoding costs about as much as one seek. Below it, decoding on is cheaper."""

RUNS_PER_THREAD = 4
"""Runs to cut for each thread, so that the last one does not wait long for another's end."""

SPARSE_SECONDS = 1.0
"""Mean distance of samples from which ``exact=False`` takes keyframes."""


@dataclass(frozen=True)
class Run:
    """Decode from a start (its number) on, for ``wanted[first:last]``."""

    start: int
    first: int
    last: int


def plan_runs(wanted: list[int], starts: list[int], *, num_threads: int = 1) -> list[Run]:
    """Cut the wanted frames into runs, each decoded in sequence from a keyframe.

    A new run starts at the keyframe of a wanted frame if that skips at least ``SEEK_COST`` frames, or, with several
    threads, once the present run is a fair share of all decoding.

    Args:
        wanted: frames, strictly increasing.
        starts: the frames where decoding can start, strictly increasing, the first at or before ``wanted[0]``.
        num_threads: runs that can be decoded at the same time.

    Returns:
        The runs, in order; together they cover ``wanted``.
    """
    keyframes = np.maximum(np.searchsorted(starts, wanted, side="right") - 1, 0).tolist()
    span = wanted[-1] - starts[keyframes[0]] + 1
    share = span / (num_threads * RUNS_PER_THREAD) if num_threads > 1 else float("inf")
    runs, first = [], 0
    for here in range(1, len(wanted)):
        start = starts[keyframes[here]]
        skipped = start - wanted[here - 1] - 1
        done = start - starts[keyframes[first]]
        if skipped >= 0 and (skipped >= SEEK_COST or done >= share):
            runs.append(Run(keyframes[first], first, here))
            first = here
    return [*runs, Run(keyframes[first], first, len(wanted))]


def nearest_keyframes(wanted: list[int], keyframes: list[int], seconds: np.ndarray) -> list[int]:
    """Move samples to the nearest keyframes, unless they lie denser than one per second.

    Args:
        wanted: frames, never decreasing.
        keyframes: the frames that need no other, within the part of the video that may be used.
        seconds: ``(F,)`` when each frame of the video appears.

    Returns:
        As many frames, never decreasing; several may share a keyframe. ``wanted`` itself if the samples are dense or
        there is no keyframe.
    """
    spacing = (seconds[wanted[-1]] - seconds[wanted[0]]) / max(1, len(wanted) - 1)
    is_dense = len(wanted) > 1 and spacing < SPARSE_SECONDS * 0.99
    if is_dense or not keyframes:
        return wanted
    times, targets = seconds[keyframes], seconds[wanted]
    after = np.minimum(np.searchsorted(times, targets), len(keyframes) - 1)
    before = np.maximum(after - 1, 0)
    is_after = np.abs(times[after] - targets) < np.abs(targets - times[before])
    return np.asarray(keyframes)[np.where(is_after, after, before)].tolist()
