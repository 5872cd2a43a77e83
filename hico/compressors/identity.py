"""Keep every token."""

import math

from torch import Tensor

from hico.compressors.base import Compressor


class IdentityCompressor(Compressor):
    """Return the tokens unchanged: the baseline of an ablation.

    Args:
        hidden_size: width D; not used.
        num_heads: the encoder's attention heads; not used.
    """

    def __init__(self, *, hidden_size: int, num_heads: int):
        super().__init__()

    def num_output_tokens(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_output_tokens``."""
        return math.prod(grid)

    def num_steps(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_steps``."""
        return grid[0]

    def carry(self, values_NLC: Tensor, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.carry``."""
        return values_NLC

    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.forward``."""
        self.check_grid(tokens_NLD, grid)
        return tokens_NLD
