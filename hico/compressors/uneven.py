"""Pool the first frame of a clip finely and the others coarsely, under one budget."""

import torch
from einops import rearrange
from torch import Tensor

from hico.compressors.base import Compressor
from hico.ops.pooling import SQUARES, check_mode, square_side


class UnevenCompressor(Compressor):
    """Keep a finer grid of a clip's first frame than of the others.

    Has no weights. Frames are pooled to squares of tokens, with windows that overlap where sides do not divide. Tokens
    come out time-major, then rows.

    Args:
        hidden_size: width D; not used.
        num_heads: the encoder's attention heads; not used.
        tokens_per_frame: on average: the squares a^2 of the first frame and b^2 of the T - 1 others, a > b, make up
            ``T * tokens_per_frame`` exactly, and are those nearest to each other that do: 49 makes 11 x 11 and 3 times
            5 x 5 for T = 4.
        first_tokens: of the first frame, a square number, with ``other_tokens`` instead of ``tokens_per_frame``.
        other_tokens: of each other frame, a square number.
        tokens_per_image: of a clip with one step, a square number.
        mode: ``"average"``, ``"max"`` or ``"bilinear"``.

    Raises:
        ValueError: if the settings do not fit.

    Source: Wei and Chen, "Visual Context Window Extension", arXiv:2409.20018, progressive pooling.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        tokens_per_frame: int | None = None,
        first_tokens: int | None = None,
        other_tokens: int | None = None,
        tokens_per_image: int = 64,
        mode: str = "average",
    ):
        super().__init__()
        by_frame = first_tokens is not None and other_tokens is not None
        if by_frame == (tokens_per_frame is not None) or (first_tokens is None) != (other_tokens is None):
            raise ValueError(
                f"give tokens_per_frame ({tokens_per_frame}), or both first_tokens ({first_tokens}) and other_tokens "
                f"({other_tokens})"
            )
        self.sides = (
            (square_side(first_tokens, "first_tokens"), square_side(other_tokens, "other_tokens"))
            if by_frame
            else None
        )
        self.tokens_per_frame = tokens_per_frame
        self.image_side = square_side(tokens_per_image, "tokens_per_image")
        self.mode = check_mode(mode)

    def sides_of(self, grid: tuple[int, int, int]) -> list[int]:
        """Say to how many rows and columns each frame of a clip is pooled.

        Raises:
            ValueError: if frames are too small, or the budget does not split; the message names those that do.
        """
        steps, rows, columns = grid
        if steps == 1:
            sides = [self.image_side]
        else:
            first, other = self.sides or _split(self.tokens_per_frame, steps, min(rows, columns))
            sides = [first, *[other] * (steps - 1)]
        if max(sides) > min(rows, columns):
            raise ValueError(
                f"frames of {rows} x {columns} tokens are too small for {max(sides)} x {max(sides)}; use larger frames"
            )
        return sides

    def num_output_tokens(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_output_tokens``."""
        return sum(side * side for side in self.sides_of(grid))

    def carry(self, values_NLC: Tensor, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.carry``; the average over each window, whatever the mode."""
        return self._pool(values_NLC, grid, "average")

    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.forward``."""
        self.check_grid(tokens_NLD, grid)
        return self._pool(tokens_NLD, grid, self.mode)

    def _pool(self, tokens_NLD: Tensor, grid: tuple[int, int, int], mode: str) -> Tensor:
        steps, rows, columns = grid
        sides = self.sides_of(grid)
        maps = rearrange(tokens_NLD, "n (t h w) d -> t n d h w", t=steps, h=rows, w=columns)
        pool = SQUARES[mode]
        first = pool(maps[0], sides[0]).flatten(2).mT
        if steps == 1:
            return first
        others = pool(maps[1:].flatten(0, 1), sides[1])
        return torch.cat([first, rearrange(others, "(t n) d h w -> n (t h w) d", t=steps - 1)], dim=1)


def _split(tokens_per_frame: int, steps: int, largest: int) -> tuple[int, int]:
    """Return the sides a > b, nearest to each other, with ``a^2 + (steps - 1) b^2 = steps * tokens_per_frame``."""
    budgets: dict[int, tuple[int, int]] = {}
    for other in range(1, largest):  # the last pair of a budget is the most even one
        for first in range(other + 1, largest + 1):
            budget, rest = divmod(first**2 + (steps - 1) * other**2, steps)
            if not rest:
                budgets[budget] = (first, other)
    if tokens_per_frame not in budgets:
        near = sorted(sorted(budgets, key=lambda budget: abs(budget - tokens_per_frame))[:4])
        raise ValueError(
            f"{tokens_per_frame} tokens a frame do not split into one larger and {steps - 1} smaller squares of at "
            f"most {largest} x {largest}; tokens_per_frame can be {', '.join(map(str, near)) or 'nothing'}, or give "
            "first_tokens and other_tokens"
        )
    return budgets[tokens_per_frame]
