"""What every drop policy offers."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class DropPolicy(ABC):
    """Choose which visual tokens stay; know nothing of layers, caches or padding."""

    needs_scores: bool = False
    """Whether `choose` wants the attention that the query rows pay to each token."""

    def num_keep(self, num_tokens: int, num_asked: int) -> int:
        """Say how many of ``num_tokens`` tokens `choose` will keep when the schedule asks for ``num_asked``."""
        return min(num_asked, num_tokens)

    @abstractmethod
    def choose(
        self, num_tokens: int, num_keep: int, *, scores: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Choose the tokens to keep.

        Args:
            num_tokens: tokens to choose from: one video or image, or all of a row, in their order.
            num_keep: tokens to keep, ``0 <= num_keep <= num_tokens``, as `num_keep` said.
            scores: ``(num_tokens,)`` float32, the higher the more attended to; given if `needs_scores`.
            generator: the only source of chance; seeded alike for the same place in the schedule.

        Returns:
            ``(num_keep,)`` int64 positions in ``[0, num_tokens)``, strictly increasing.
        """
