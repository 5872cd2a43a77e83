"""What every compressor offers."""

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn


class Compressor(nn.Module, ABC):
    """Turn the tokens of one clip (or one image tile) into fewer tokens.

    The constructor takes ``hidden_size`` (D) and ``num_heads`` of the encoder as keywords, beside settings of its own.
    """

    @staticmethod
    def check_grid(tokens_NLD: Tensor, grid: tuple[int, int, int]) -> None:
        """Check that the tokens fill the grid.

        Raises:
            ValueError: if they do not.
        """
        if tokens_NLD.shape[1] != math.prod(grid):
            raise ValueError(
                f"{tokens_NLD.shape[1]} tokens per clip do not fill a grid of {' x '.join(map(str, grid))} "
                f"(time x rows x columns, {math.prod(grid)} tokens); pass the encoder's grid for these clips"
            )

    @abstractmethod
    def num_output_tokens(self, grid: tuple[int, int, int]) -> int:
        """Say how many tokens K come out for a clip of ``grid`` tokens along time, rows and columns.

        This is the one owner of the number: config, processor and model ask here. Needs no weights.

        Raises:
            ValueError: if the clip has too few tokens.
        """

    @abstractmethod
    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Compress ``(N, L, D)`` with ``L = T*H*W`` to ``(N, K, D)``."""
