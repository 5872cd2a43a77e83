"""The order and times of display, from the packets' stamps, which may be guessed, missing, shared or start anew."""

from dataclasses import dataclass

import numpy as np

from hico.video_io.bitstream import TELLS_TYPES
from hico.video_io.packets import BIDIRECTIONAL, BY_BYTES, CLOSED, GUESSED, JUMPS, NO_TIME, PROGRAM, Packets

JUMP_SECONDS = 10.0
"""A gap that is longer is a jump of the clock, in the containers that allow for one; elsewhere it is a standstill."""

LOOSE_FRAMES = 1.5
"""Where some stamps are missing and the others fit the declared rate to so many frames, the rate tells the times."""


@dataclass(frozen=True)
class Start:
    """A packet that decoding can begin with, and the first frame, in order of display, that it leads to."""

    position: int
    packet: int


@dataclass(frozen=True)
class Timeline:
    """Frames in order of display.

    Args:
        ticks: ``(F,)`` float64, when each is shown, strictly increasing, on the container's clock; mended after the
            first jump.
        places: ``(P,)`` int64, the frame of each packet; -1 where it is not shown. Where ``is_counted``, only how many
            are before it in the file.
        numbers: ``(F,)`` int64, the packet of each frame, unless ``is_counted``.
        starts: where decoding can begin, in order of display; the first one leads to frame 0.
        is_counted: whether the order is known only once frames are decoded, and then counted.
        num_jumps: times that the clock went back or jumped.
        num_shared: frames that had the stamp of another.
    """

    ticks: np.ndarray
    places: np.ndarray
    numbers: np.ndarray
    starts: tuple[Start, ...]
    is_counted: bool
    num_jumps: int
    num_shared: int


def arrange(packets: Packets, *, tick: float, frame_ticks: float) -> Timeline | None:
    """Put the packets into order of display.

    Args:
        packets: the stream's packets.
        tick: seconds per unit of the stamps.
        frame_ticks: distance of two frames by the declared rate, for where the stamps do not tell.

    Returns:
        The order and the times; None if no frame is shown.
    """
    if not len(packets):
        return None
    shown = _decodable(packets)
    is_guess = packets.container in GUESSED | PROGRAM and packets.may_reorder
    stamps = packets.dts if is_guess else np.where(packets.pts == NO_TIME, _as_pts(packets), packets.pts)
    is_timed = (stamps[shown] != NO_TIME).any()
    stamps = np.where(stamps == NO_TIME, np.nan, stamps) if is_timed else np.arange(len(packets)) * frame_ticks
    if packets.container in PROGRAM and packets.position[0] >= 0:
        # Only the first frame that begins in a packet of the stream has a stamp; FFmpeg guesses the others.
        stamps = np.where(packets.position < 0, np.nan, stamps)

    is_sorted = is_guess or not packets.may_reorder
    jumps = _jumps(stamps, packets, is_sorted=is_sorted, limit=JUMP_SECONDS / tick)
    ticks, mended = _mend(stamps, shown, jumps, frame_ticks)
    if not len(ticks):
        return None
    shared = np.flatnonzero(np.diff(ticks) <= 0)
    is_told = is_timed and not (is_guess or len(shared) or np.isnan(mended[shown]).any())
    by_type = packets.codec in TELLS_TYPES
    is_counted = not is_told and packets.may_reorder and not by_type
    order = _order_by_type(packets) if by_type else mended if is_told else np.arange(len(packets))

    first = _first_key(packets)
    if first is not None and shown[: first + 1].sum() <= 1 and not packets.flags[first] & CLOSED and not is_counted:
        leading = shown & (order < order[first])
        if leading.any():
            shown, ticks = shown & ~leading, ticks[leading.sum() :]
    places = np.full(len(packets), -1)
    numbers = np.flatnonzero(shown)[np.argsort(order[shown], kind="stable")]
    places[numbers] = np.arange(len(numbers))
    if not len(ticks):
        return None
    return Timeline(
        ticks=_spread(ticks, frame_ticks),
        places=places,
        numbers=numbers,
        starts=_starts(packets, order, numbers, is_counted=is_counted),
        is_counted=is_counted,
        num_jumps=len(jumps),
        num_shared=len(shared),
    )


def _as_pts(packets: Packets) -> np.ndarray:
    """Return what stands in for missing presentation stamps."""
    return np.full(len(packets), NO_TIME) if packets.may_reorder else packets.dts


def _first_key(packets: Packets) -> int | None:
    return int(packets.is_key.argmax()) if packets.is_key.any() else None


def _decodable(packets: Packets) -> np.ndarray:
    """Tell which packets are shown: not hidden ones, nor those before the first keyframe of a broadcast."""
    shown = ~packets.is_hidden
    first = _first_key(packets)
    if packets.container in JUMPS | BY_BYTES and first is not None:
        shown &= np.arange(len(packets)) >= first
    if packets.container == "matroska" and (packets.pts != NO_TIME).any():
        # The stamps of a group that a cut has opened are below zero, which FFmpeg gives as none.
        shown &= packets.pts != NO_TIME
    return shown


def _jumps(stamps: np.ndarray, packets: Packets, *, is_sorted: bool, limit: float) -> list[int]:
    """Find the packets before which the clock starts anew.

    Frames that stand before a keyframe in the file are shown before it, so that a keyframe below an earlier stamp is a
    jump; other frames may be shown at most before the keyframe before them.
    """
    if packets.container == "mov":
        return []
    limit = limit if packets.container in JUMPS else np.inf
    keys = np.ones(len(stamps), bool) if is_sorted else packets.is_key & ~packets.is_hidden
    known = ~np.isnan(stamps)
    values, keys = stamps[known], keys[known]
    if len(values) < 2:
        return []
    if is_sorted:
        # Where stamps are missing, the same stamp again after a while is a clock that has started anew.
        values = values - np.where(np.diff(np.flatnonzero(known), prepend=0) > 1, 1e-3, 0)
    highest = np.maximum.accumulate(values)[:-1]
    is_back = (keys[1:] & (values[1:] < highest)) | (values < _floor(values, keys))[1:]
    if not is_back.any() and (values[1:] - highest).max() <= limit:
        return []
    numbers = np.flatnonzero(known)
    return numbers[_jumps_one_by_one(values.tolist(), keys.tolist(), limit)].tolist()


def _floor(stamps: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return for each packet the stamp of the keyframe before the latest one."""
    numbers = np.flatnonzero(keys)
    latest = np.cumsum(keys) - 2
    return (
        np.where(latest >= 0, stamps[numbers[np.maximum(latest, 0)]], -np.inf)
        if len(numbers)
        else np.full(len(stamps), -np.inf)
    )


def _jumps_one_by_one(stamps: list[float], keys: list[bool], limit: float) -> list[int]:
    jumps, highest, floor, latest = [], -np.inf, -np.inf, -np.inf
    for number, (stamp, is_key) in enumerate(zip(stamps, keys, strict=True)):
        is_forward = highest > -np.inf and stamp - highest > limit
        if (is_key and stamp < highest) or stamp < floor or is_forward:
            jumps.append(number)
            highest = floor = latest = -np.inf
        if is_key:
            floor, latest = latest, stamp
        highest = max(highest, stamp)
    return jumps


def _mend(
    stamps: np.ndarray, shown: np.ndarray, jumps: list[int], frame_ticks: float
) -> tuple[np.ndarray, np.ndarray]:
    """Let each part of the clock go on where the one before it ends.

    Args:
        stamps: ``(P,)`` in the order of the file; NaN where not known.
        shown: ``(P,)`` which packets are shown.
        jumps: the packets before which a new part begins.
        frame_ticks: distance of two frames where nothing tells.

    Returns:
        The times of the shown frames in order of display, and the mended stamps in the order of the file.
    """
    mended, ticks, end = stamps.copy(), [], None
    for first, past in zip([0, *jumps], [*jumps, len(stamps)], strict=True):
        part, visible = mended[first:past], shown[first:past]
        if not visible.any():
            continue
        times = _filled(part[visible], frame_ticks)
        if end is not None:
            part += end - times[0]
            times = times + (end - times[0])
        steps = np.diff(times)
        end = times[-1] + (np.median(steps[steps > 0]) if (steps > 0).any() else frame_ticks)
        ticks.append(times)
    return np.concatenate(ticks) if ticks else np.empty(0), mended


def _filled(stamps: np.ndarray, frame_ticks: float) -> np.ndarray:
    """Sort the stamps of a part, with even steps where some are missing."""
    known = np.flatnonzero(~np.isnan(stamps))
    if len(known) == len(stamps):
        return np.sort(stamps, kind="stable")  # Fast where they are nearly in order.
    numbers = np.arange(len(stamps))
    if not len(known):
        return numbers * frame_ticks
    even = np.sort(stamps[known])[0] + (numbers - known[0]) * frame_ticks
    if np.abs(even[known] - stamps[known]).max() <= LOOSE_FRAMES * frame_ticks:
        return even
    filled = np.interp(numbers, known, np.sort(stamps[known]))
    first, last = known[0], known[-1]
    filled[:first] -= (first - numbers[:first]) * frame_ticks
    filled[last + 1 :] += (numbers[last + 1 :] - last) * frame_ticks
    return filled


def _order_by_type(packets: Packets) -> np.ndarray:
    """Order packets as MPEG does: B-frames come at once, any other after the B-frames that follow it."""
    is_b = (packets.flags & BIDIRECTIONAL) > 0
    numbers = np.arange(len(packets))
    following = np.append(numbers[~is_b], len(packets))
    after = following[np.searchsorted(following, numbers, side="right").clip(max=len(following) - 1)]
    return np.where(is_b, numbers - 1, after - 1)


def _spread(ticks: np.ndarray, frame_ticks: float) -> np.ndarray:
    """Spread frames that share a time evenly up to the next time."""
    times, counts = np.unique(ticks, return_counts=True)
    if len(times) == len(ticks):
        return ticks
    steps = np.diff(times)
    room = np.append(steps, counts[-1] * (np.median(steps / counts[:-1]) if len(steps) else frame_ticks))
    inside = np.arange(len(ticks)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(times, counts) + inside * np.repeat(room / counts, counts)


def _starts(packets: Packets, order: np.ndarray, in_order: np.ndarray, *, is_counted: bool) -> tuple[Start, ...]:
    """Number the keyframes by the frame that they lead to; an edit list may hide the first one itself."""
    begins = packets.is_key & (((packets.flags & CLOSED) > 0) | (not is_counted)) & ~np.isnan(order.astype(float))
    numbers = np.flatnonzero(begins)
    numbers = numbers[np.argsort(order[numbers], kind="stable")]
    positions = np.searchsorted(order[in_order], order[numbers])
    # An edit list may show what stands before: no frame from a start on may come earlier in the file.
    earliest = np.minimum.accumulate(in_order[::-1])[::-1]
    starts = {0: 0}
    for number, position in zip(numbers.tolist(), positions.tolist(), strict=True):
        if position < len(earliest) and earliest[position] >= number:
            starts[position] = number
    return tuple(Start(position, number) for position, number in sorted(starts.items()))
