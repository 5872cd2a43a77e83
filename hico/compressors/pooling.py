"""Pool neighbouring tokens of a frame, as LongVA does."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hico.compressors.base import Compressor

WINDOWS: dict[str, Callable] = {"average": F.avg_pool2d, "max": F.max_pool2d}
SQUARES: dict[str, Callable] = {"average": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}


class PoolingCompressor(Compressor):
    """Pool each frame's tokens over rows and columns; time is left alone.

    Has no weights. Tokens come out time-major, then rows.

    Args:
        hidden_size: width D; not used.
        num_heads: the encoder's attention heads; not used.
        stride: rows and columns per window; an odd last row or column is left out, as published. 2 if neither this nor
            ``tokens_per_frame`` is given.
        tokens_per_frame: a square number; the frame is pooled to so many tokens whatever its size, with windows that
            overlap where sides do not divide.
        mode: ``"average"`` or ``"max"``.

    Raises:
        ValueError: if the settings do not fit.

    Source: Zhang et al., "LongVA", arXiv:2406.16852, section 3.2 (2 x 2 average, after the projector there).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        stride: int | None = None,
        tokens_per_frame: int | None = None,
        mode: str = "average",
    ):
        super().__init__()
        if stride is not None and tokens_per_frame is not None:
            raise ValueError(f"give stride ({stride}) or tokens_per_frame ({tokens_per_frame}), not both")
        if stride is not None and stride < 1:
            raise ValueError(f"stride {stride} must be at least 1")
        side = math.isqrt(max(0, tokens_per_frame or 0))
        if tokens_per_frame is not None and (side < 1 or side**2 != tokens_per_frame):
            raise ValueError(
                f"tokens_per_frame {tokens_per_frame} is not a square number; "
                f"use {max(1, side) ** 2} or {(side + 1) ** 2}"
            )
        if mode not in WINDOWS:
            raise ValueError(f"unknown pooling mode {mode!r}; known: {', '.join(WINDOWS)}")
        self.side = side or None
        self.stride = None if side else stride or 2
        self.mode = mode

    def num_output_tokens(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_output_tokens``."""
        steps, rows, columns = grid
        if min(rows, columns) < (self.side or self.stride):
            wanted = f"{self.side} x {self.side} tokens" if self.side else f"windows of {self.stride} x {self.stride}"
            raise ValueError(f"frames of {rows} x {columns} tokens are too small for {wanted}; use larger frames")
        return steps * self.side**2 if self.side else steps * (rows // self.stride) * (columns // self.stride)

    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.forward``."""
        self.check_grid(tokens_NLD, grid)
        self.num_output_tokens(grid)
        steps, rows, columns = grid
        maps = rearrange(tokens_NLD, "n (t h w) d -> (n t) d h w", t=steps, h=rows, w=columns)
        pooled = SQUARES[self.mode](maps, self.side) if self.side else WINDOWS[self.mode](maps, self.stride)
        return rearrange(pooled, "(n t) d h w -> n (t h w) d", t=steps)
