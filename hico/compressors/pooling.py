"""Pool neighbouring tokens of a frame, as LongVA does."""

from einops import rearrange, reduce
from torch import Tensor

from hico.compressors.base import Compressor
from hico.ops.pooling import SQUARES, WINDOWS, check_mode, square_side


class PoolingCompressor(Compressor):
    """Pool each frame's tokens over rows and columns, and over time if asked.

    Has no weights. Tokens come out time-major, then rows.

    Args:
        hidden_size: width D; not used.
        num_heads: the encoder's attention heads; not used.
        stride: rows and columns per window; an odd last row or column is left out, as published. 2 if neither this nor
            ``tokens_per_frame`` is given.
        tokens_per_frame: a square number; the frame is pooled to so many tokens whatever its size, with windows that
            overlap where sides do not divide.
        mode: ``"average"``, ``"max"`` or ``"bilinear"`` (which samples the map at the middle of each window).
        temporal_stride: steps of time per window, which are averaged, or their maximum taken; an image has but one.

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
        temporal_stride: int = 1,
    ):
        super().__init__()
        if stride is not None and tokens_per_frame is not None:
            raise ValueError(f"give stride ({stride}) or tokens_per_frame ({tokens_per_frame}), not both")
        for setting, value in (("stride", stride), ("temporal_stride", temporal_stride)):
            if value is not None and value < 1:
                raise ValueError(f"{setting} {value} must be at least 1")
        self.side = None if tokens_per_frame is None else square_side(tokens_per_frame, "tokens_per_frame")
        self.stride = None if self.side else stride or 2
        self.mode = check_mode(mode)
        self.temporal_stride = temporal_stride

    def num_output_tokens(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_output_tokens``."""
        steps, rows, columns = grid
        if min(rows, columns) < (self.side or self.stride):
            wanted = f"{self.side} x {self.side} tokens" if self.side else f"windows of {self.stride} x {self.stride}"
            raise ValueError(f"frames of {rows} x {columns} tokens are too small for {wanted}; use larger frames")
        windows = steps // self._steps_per_window(steps)
        return windows * self.side**2 if self.side else windows * (rows // self.stride) * (columns // self.stride)

    def num_steps(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_steps``."""
        return grid[0] // self._steps_per_window(grid[0])

    def carry(self, values_NLC: Tensor, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.carry``; the average over each window, whatever the mode."""
        return self._pool(values_NLC, grid, "average")

    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.forward``."""
        self.check_grid(tokens_NLD, grid)
        self.num_output_tokens(grid)
        return self._pool(tokens_NLD, grid, self.mode)

    def _pool(self, tokens_NLD: Tensor, grid: tuple[int, int, int], mode: str) -> Tensor:
        steps, rows, columns = grid
        maps = rearrange(tokens_NLD, "n (t h w) d -> (n t) d h w", t=steps, h=rows, w=columns)
        pooled = SQUARES[mode](maps, self.side) if self.side else WINDOWS[mode](maps, self.stride)
        window = self._steps_per_window(steps)
        kind = "max" if mode == "max" else "mean"
        return reduce(pooled, "(n t s) d h w -> n (t h w) d", kind, t=steps // window, s=window)

    def _steps_per_window(self, steps: int) -> int:
        window = self.temporal_stride if steps > 1 else 1
        if steps % window:
            raise ValueError(f"{steps} steps of time do not split into windows of {window}; change temporal_stride")
        return window
