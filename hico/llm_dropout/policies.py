"""Which visual tokens stay: what every drop policy offers, and the five that come with the library."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hico.ops.dropping import random_keep_indices, top_keep_indices, uniform_keep_indices
from hico.ops.merging import most_similar


class DropPolicy(ABC):
    """Choose which visual tokens stay; know nothing of layers, caches or padding."""

    needs_scores: bool = False
    """Whether `choose` wants the attention that the query rows pay to each token."""

    merges: bool = False
    """Whether tokens that go are averaged into those that stay, as `merge_into` says."""

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

    def merge_into(self, tokens_ND: Tensor, kept_K: Tensor) -> Tensor:
        """Say into which kept token each one is averaged: the one most like it by cosine, of equals the earlier.

        Args:
            tokens_ND: what enters the layer, the tokens that `choose` chose from.
            kept_K: the positions that it chose, at least one.

        Returns:
            ``(N,)`` int64 positions in ``[0, K)``; those of kept tokens are not looked at.
        """
        units_ND = normalize(tokens_ND.to(torch.promote_types(tokens_ND.dtype, torch.float32)), dim=-1)
        return most_similar(units_ND[None], units_ND[None, kept_K])[1][0]


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


class AttentionMergePolicy(AttentionPolicy):
    """Keep what gets most attention, and average every other token of the video or image into the most similar of it.

    Source: Shao et al., "HoliTom", arXiv:2505.21334, inner-LLM merging.
    """

    merges = True


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
