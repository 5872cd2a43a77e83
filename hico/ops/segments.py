"""Runs of frames that belong together."""

from collections.abc import Sequence


def cut_segments(is_border: Sequence[bool], *, longest: int | None = None) -> list[tuple[int, int]]:
    """Cut frames into segments.

    Args:
        is_border: ``num_frames - 1`` flags, whether a segment ends between frame f and f + 1.
        longest: a segment of more frames is cut again, after so many; None for no limit.

    Returns:
        The first and the past-the-last frame of every segment, in order.
    """
    num_frames, found, start = len(is_border) + 1, [], 0
    for end in range(1, num_frames + 1):
        if end == num_frames or is_border[end - 1] or end - start == longest:
            found.append((start, end))
            start = end
    return found


def split_evenly(total: int, count: int) -> list[int]:
    """Divide a number of things among ``count``; the first ones get one more where it does not divide."""
    share, rest = divmod(total, count) if count else (0, 0)
    return [share + (place < rest) for place in range(count)]
