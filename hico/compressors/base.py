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

    def num_steps(self, grid: tuple[int, int, int]) -> int:
        """Say how many steps of time the output tokens are laid out in, time-major, equally many in each.

        1, as here, where a token may hold patches of several steps: then a clip counts as one frame for what comes
        after, see `hico.video_compressors`.
        """
        return 1

    @property
    def carries(self) -> bool:
        """Whether `carry` works, so that what the encoder attended to can follow its tokens."""
        return type(self).carry is not Compressor.carry

    def carry(self, values_NLC: Tensor, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Average what is known of the input tokens over those that each output token holds.

        Args:
            values_NLC: such as the attention that each received.
            tokens_NLD: what `forward` is given.

        Returns:
            ``(N, K, C)``.
        """
        raise NotImplementedError  # and `carries` says so

    @abstractmethod
    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Compress ``(N, L, D)`` with ``L = T*H*W`` to ``(N, K, D)``."""
