"""Which frames of a video the model sees. Pure arithmetic on frame counts; no video is opened here."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import torch

DENSE_FPS = 15.0
SPARSE_FPS = 1.0
DEFAULT_MIN_FRAMES = 64
DEFAULT_MAX_FRAMES = 512
BOUNDS = ("max_wins", "published")
PADS = ("repeat", "error")


@dataclass(frozen=True)
class _Request:
    """One call of ``sample_frames`` with its defaults filled in; ``max_frames`` is infinite where there is none."""

    num_source_frames: int
    fps: float
    num_frames: int | None
    rate: float | None
    min_frames: int
    max_frames: float
    multiple_of: int
    fix_start: int | None
    published: bool
    generator: torch.Generator | None

    @property
    def duration(self) -> float:
        return self.num_source_frames / self.fps

    def whole_clips(self, num_frames: float) -> int:
        """Round down to whole clips, or to what else the number is a multiple of, but not to none."""
        return self.multiple_of * max(1, math.floor(num_frames / self.multiple_of))


def sample_frames(
    num_source_frames: int,
    fps: float,
    *,
    mode: str | None = None,
    num_frames: int | None = None,
    rate: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    clip_len: int = 4,
    multiple_of: int | None = None,
    fix_start: int | None = None,
    bounds: str = "max_wins",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Choose the frames of a video that the model sees.

    The video is cut into as many equal intervals as frames are wanted, and each interval gives one frame: its middle
    one, or a random one (``rand``). The modes differ in how many frames they want:

    * ``dual``: 15 frames per second while that fits below ``max_frames`` (short videos), otherwise 1 per second;
      with ``rate``, that many per second, whatever the length. Whole clips.
    * ``dynamic_fps1``: 1 frame per second, in whole clips.
    * ``middle`` and ``rand``: ``num_frames``.
    * ``linspace``: ``num_frames`` at even distances from the very first to the very last, as LongVA
      (arXiv:2406.16852) samples; not one per interval.
    * ``fpsX``, such as ``fps2`` or ``fps0.5``: the frames nearest to the times 1/2X, 3/2X, 5/2X ... seconds.

    Args:
        num_source_frames: frames that the video has (at least 1).
        fps: frames per second of the video.
        mode: one of the above; if omitted, ``middle`` where ``num_frames`` is given and ``dual`` where it is not.
        num_frames: frames wanted, for ``middle``, ``rand`` and ``linspace`` only.
        rate: frames per second wanted, for ``dual`` only.
        min_frames: fewest frames; 64 for ``dual`` without ``rate`` and ``dynamic_fps1``, 1 otherwise.
        max_frames: most frames; 512 for ``dual`` and ``dynamic_fps1``, no limit otherwise. 0 or less is no limit.
        clip_len: frames per clip of the encoder.
        multiple_of: what the number of frames is a multiple of in the modes of whole clips, as far as the video has so
            many: a multiple of ``clip_len``, and that itself if omitted. The released models answer with 8.
        fix_start: take the frame this many places after the start of each interval, not its middle one.
        bounds: ``max_wins`` never exceeds ``max_frames`` (rounded down to whole clips where it holds one), never
            repeats a frame to reach a count, except to fill the first clip in the modes of whole clips, and thins a
            long ``fpsX`` evenly. ``published`` is the rule of the released code: the minimum beats the maximum, a
            video with too few frames repeats its last one up to the count (``linspace`` repeats evenly), and ``fpsX``
            ignores the minimum, drops everything after ``max_frames`` and may be empty.
        generator: source of chance for ``rand``.

    Returns:
        Frame indices in ``[0, num_source_frames)``, never decreasing; never empty with ``max_wins``.

    Raises:
        ValueError: if a setting is unknown, out of range, or has no effect in this mode.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, section 3.3 (duration-based sampling) and its released
    code. The paper gives no rule for where short ends; here it is where 15 frames per second exceed ``max_frames``.
    """
    mode = mode or ("dual" if num_frames is None else "middle")
    rule = _rule(mode)
    least, most = _defaults(rule, rate, min_frames, max_frames)
    if clip_len < 1:
        raise ValueError(f"clip_len is {clip_len}; a clip holds at least 1 frame")
    if multiple_of is not None:
        _check_multiple(multiple_of, clip_len, mode, rule)
    request = _Request(
        num_source_frames=num_source_frames,
        fps=fps,
        num_frames=num_frames,
        rate=rate,
        min_frames=least,
        max_frames=most,
        multiple_of=multiple_of or clip_len,
        fix_start=fix_start,
        published=_known("bounds", bounds, BOUNDS) == "published",
        generator=generator,
    )
    _check_numbers(request, mode, rule)
    if not request.published:
        _check_effects(request, mode, rule)
    return rule.sample(request)


def pad_to_clips(indices: list[int], clip_len: int, *, pad: str = "repeat") -> list[int]:
    """Make the number of frames a multiple of the clip length.

    Args:
        indices: sampled frames, in order.
        clip_len: frames per clip.
        pad: ``repeat`` repeats the last frame; ``error`` raises.

    Raises:
        ValueError: if ``pad`` is unknown, or is ``error`` and the frames do not divide into clips.
    """
    _known("pad", pad, PADS)
    missing = -len(indices) % clip_len
    if missing and pad == "error":
        raise ValueError(
            f"{len(indices)} frames do not split into clips of {clip_len}; drop {len(indices) % clip_len}, "
            f"sample {missing} more, or set pad='repeat'"
        )
    return indices + indices[-1:] * missing


def _num_requested(request: _Request) -> int:
    return request.num_frames


def _num_dynamic(request: _Request) -> int:
    return request.whole_clips(request.duration)


def _num_dual(request: _Request) -> int:
    def at(rate: float) -> int:
        # Rounded first, so that a product such as 59.999999 is the 60 that it means.
        return request.whole_clips(round(request.duration * rate, 6))

    if request.rate is not None:
        return at(request.rate)
    limit = request.max_frames if math.isfinite(request.max_frames) else DEFAULT_MAX_FRAMES
    return at(DENSE_FPS) if at(DENSE_FPS) <= limit else at(SPARSE_FPS)


def _bounded(request: _Request, num_frames: int, *, whole_clips: bool) -> int:
    """Apply the user's bounds: the maximum wins, and no more frames than there are."""
    most = min(request.max_frames, request.num_source_frames)
    if request.max_frames >= request.multiple_of and (whole_clips or request.max_frames < request.num_source_frames):
        most = request.whole_clips(most)
    least = request.whole_clips(request.min_frames + request.multiple_of - 1) if whole_clips else request.min_frames
    return int(max(min(num_frames, most), min(least, most)))


def _published_bounded(request: _Request, num_frames: int, *, whole_clips: bool) -> int:
    """Apply the bounds in the published order: the minimum comes last, so it wins over the maximum."""
    least = request.min_frames
    if least > request.num_source_frames:
        groups = request.num_source_frames // request.multiple_of
        least = groups * request.multiple_of if whole_clips else request.num_source_frames
    if whole_clips:
        num_frames = int(min(num_frames, request.max_frames))
    return max(num_frames, least)


def _intervals(request: _Request, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.linspace(0, request.num_source_frames, num_frames + 1).astype(np.int64)
    return edges[:-1], edges[1:]


def _middles(request: _Request, num_frames: int) -> np.ndarray:
    starts, ends = _intervals(request, num_frames)
    if request.fix_start is None:
        return (starts + ends - 1) // 2
    return starts + request.fix_start if request.published else np.minimum(starts + request.fix_start, ends - 1)


def _random(request: _Request, num_frames: int) -> np.ndarray:
    starts, ends = _intervals(request, num_frames)
    draws = torch.rand(num_frames, generator=request.generator, dtype=torch.float64).numpy()
    return starts + np.floor(draws * (ends - starts)).astype(np.int64)


def _from_end_to_end(request: _Request, num_frames: int) -> np.ndarray:
    return np.linspace(0, request.num_source_frames - 1, num_frames).astype(np.int64)


@dataclass(frozen=True)
class _Intervals:
    """Modes that take a number of frames, most of them one of each of equally long intervals."""

    count: Callable[[_Request], int]
    place: Callable[[_Request, int], np.ndarray]
    whole_clips: bool
    settings: frozenset[str]
    min_frames: int = 1
    max_frames: float = math.inf
    repeats: bool = False
    """Where the published bounds want more frames than there are, ``place`` repeats some, and not the last one."""

    def sample(self, request: _Request) -> list[int]:
        bound = _published_bounded if request.published else _bounded
        num_frames = bound(request, self.count(request), whole_clips=self.whole_clips)
        most = num_frames if self.repeats else request.num_source_frames
        indices = self.place(request, min(num_frames, most)).tolist()
        return indices + indices[-1:] * (num_frames - len(indices))


@dataclass(frozen=True)
class _AtTimes:
    """Modes ``fpsX``: the frames nearest to evenly spaced times."""

    rate: float
    settings: frozenset[str] = frozenset()
    min_frames: int = 1
    max_frames: float = math.inf

    def sample(self, request: _Request) -> list[int]:
        indices = self._nearest(request)
        if request.published:
            return indices[: int(min(len(indices), request.max_frames))].tolist()
        least = min(request.min_frames, request.num_source_frames)
        if least <= len(indices) <= request.max_frames:
            return indices.tolist()
        return _middles(request, _bounded(request, max(1, len(indices)), whole_clips=False)).tolist()

    def _nearest(self, request: _Request) -> np.ndarray:
        if self.rate >= request.fps and not request.published:
            return np.arange(request.num_source_frames)  # each frame once; rounding would repeat some and skip others
        step = 1 / self.rate
        times = np.arange(step / 2, request.duration + step / 2, step)
        indices = np.round(times * request.fps).astype(np.int64)
        return indices[indices < request.num_source_frames]


_RULES = {
    "middle": _Intervals(_num_requested, _middles, whole_clips=False, settings=frozenset({"num_frames", "fix_start"})),
    "rand": _Intervals(_num_requested, _random, whole_clips=False, settings=frozenset({"num_frames"})),
    "linspace": _Intervals(
        _num_requested, _from_end_to_end, whole_clips=False, settings=frozenset({"num_frames"}), repeats=True
    ),
    "dual": _Intervals(
        _num_dual,
        _middles,
        whole_clips=True,
        settings=frozenset({"rate", "fix_start"}),
        min_frames=DEFAULT_MIN_FRAMES,
        max_frames=DEFAULT_MAX_FRAMES,
    ),
    "dynamic_fps1": _Intervals(
        _num_dynamic,
        _middles,
        whole_clips=True,
        settings=frozenset({"fix_start"}),
        min_frames=DEFAULT_MIN_FRAMES,
        max_frames=DEFAULT_MAX_FRAMES,
    ),
}
MODES = (*_RULES, "fpsX")


def _rule(mode: str) -> _Intervals | _AtTimes:
    if mode in _RULES:
        return _RULES[mode]
    match = re.fullmatch(r"fps(\d+(?:\.\d+)?)", mode)
    if match and float(match.group(1)) > 0:
        return _AtTimes(float(match.group(1)))
    raise ValueError(_unknown("sampling mode", mode, MODES))


def _defaults(
    rule: _Intervals | _AtTimes, rate: float | None, min_frames: int | None, max_frames: int | None
) -> tuple[int, float]:
    """Fill the bounds in; a default never contradicts the bound that is given."""
    most = rule.max_frames if max_frames is None else max_frames if max_frames > 0 else math.inf
    least = (1 if rate is not None else rule.min_frames) if min_frames is None else min_frames
    if min_frames is None:
        least = int(min(least, most))
    elif max_frames is None:
        most = max(least, most)
    return max(1, least), most


def _check_numbers(request: _Request, mode: str, rule: _Intervals | _AtTimes) -> None:
    if request.num_source_frames < 1:
        raise ValueError(f"a video of {request.num_source_frames} frames has nothing to sample")
    if not (math.isfinite(request.fps) and request.fps > 0):
        raise ValueError(f"fps is {request.fps}; it must be a positive number of frames per second")
    if request.rate is not None and not (math.isfinite(request.rate) and request.rate > 0):
        raise ValueError(f"rate is {request.rate}; it must be a positive number of frames per second")
    if request.fix_start is not None and request.fix_start < 0:
        raise ValueError(f"fix_start is {request.fix_start}; it counts frames from the start of an interval")
    if "num_frames" in rule.settings and (request.num_frames is None or request.num_frames < 1):
        raise ValueError(f"the sampling mode {mode!r} needs num_frames of at least 1, not {request.num_frames}")


def _check_multiple(multiple_of: int, clip_len: int, mode: str, rule: _Intervals | _AtTimes) -> None:
    if not (isinstance(rule, _Intervals) and rule.whole_clips):
        raise ValueError(f"multiple_of = {multiple_of} has no effect in the sampling mode {mode!r}; leave it out")
    if multiple_of < 1 or multiple_of % clip_len:
        raise ValueError(f"multiple_of is {multiple_of}; it must be a multiple of the {clip_len} frames of a clip")


def _check_effects(request: _Request, mode: str, rule: _Intervals | _AtTimes) -> None:
    """Refuse settings that would be ignored; the published rule ignores them."""
    if request.min_frames > request.max_frames:
        raise ValueError(
            f"min_frames {request.min_frames} exceeds max_frames {request.max_frames}; "
            "lower one, or set bounds='published'"
        )
    for name in ("num_frames", "rate", "fix_start"):
        value = getattr(request, name)
        if value is not None and name not in rule.settings:
            raise ValueError(f"{name} = {value} has no effect in the sampling mode {mode!r}; leave it out")


def _known(kind: str, name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(_unknown(kind, name, names))
    return name


def _unknown(kind: str, name: str, names: tuple[str, ...]) -> str:
    nearest = get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}"
