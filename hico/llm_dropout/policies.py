"""Which visual tokens stay: what every drop policy offers, and the four that come with the library."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hico.ops.dropping import random_keep_indices, top_keep_indices, uniform_keep_indices


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
            scores: ``(num_tokens,)`` float32, the higher the more attended to; given if `needs_scores`. A token that
                has to stay has score infinity.
            generator: the only source of chance; seeded alike for the same place in the schedule.

        Returns:
            ``(num_keep,)`` int64 positions in ``[0, num_tokens)``, strictly increasing.
        """


class UniformPolicy(DropPolicy):
    """Keep evenly spaced tokens: the shallow half of progressive visual dropout.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, progressive visual dropout.
    """

    def choose(self, num_tokens, num_keep, *, scores=None, generator=None) -> Tensor:
        return uniform_keep_indices(num_tokens, num_keep)


class AttentionPolicy(DropPolicy):
    """Keep the tokens that get most attention from the query rows; of equal ones the earlier.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, progressive visual dropout, text-guided selection.
    """

    needs_scores = True

    def choose(self, num_tokens, num_keep, *, scores=None, generator=None) -> Tensor:
        return top_keep_indices(scores, num_keep)


class RandomPolicy(DropPolicy):
    """Keep random tokens, the same ones whenever the seed, the layer and the place of the span in its row are."""

    def choose(self, num_tokens, num_keep, *, scores=None, generator=None) -> Tensor:
        return random_keep_indices(num_tokens, num_keep, generator=generator)


class NonePolicy(DropPolicy):
    """Keep every token, whatever the schedule asks for: the baseline that costs the most."""

    def num_keep(self, num_tokens: int, num_asked: int) -> int:
        return num_tokens

    def choose(self, num_tokens, num_keep, *, scores=None, generator=None) -> Tensor:
        return torch.arange(num_keep)
