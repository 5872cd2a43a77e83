"""Pool maps of tokens."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _resize(maps: Tensor, side: int | tuple[int, int]) -> Tensor:
    size = (side, side) if isinstance(side, int) else side
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


WINDOWS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "average": F.avg_pool2d,
    "max": F.max_pool2d,
    "bilinear": lambda maps, stride: _resize(maps, (maps.shape[-2] // stride, maps.shape[-1] // stride)),
}
"""Mode -> pooling of maps ``(..., H, W)`` by windows of ``stride`` rows and columns; an odd last one is left out."""
SQUARES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "average": F.adaptive_avg_pool2d,
    "max": F.adaptive_max_pool2d,
    "bilinear": _resize,
}
"""Mode -> pooling of maps ``(..., H, W)`` to so many rows and columns; windows overlap where sides do not divide."""


def check_mode(mode: str) -> str:
    """Return a mode of pooling.

    Raises:
        ValueError: if it is unknown.
    """
    if mode not in SQUARES:
        raise ValueError(f"unknown pooling mode {mode!r}; known: {', '.join(SQUARES)}")
    return mode


def square_side(num_tokens: int, setting: str) -> int:
    """Return the rows of a square of so many tokens.

    Raises:
        ValueError: if there is none; the message names ``setting`` and the nearest squares.
    """
    side = math.isqrt(max(0, num_tokens))
    if side < 1 or side**2 != num_tokens:
        raise ValueError(
            f"{setting} {num_tokens} is not a square number; use {max(1, side) ** 2} or {(side + 1) ** 2}"
        )
    return side
