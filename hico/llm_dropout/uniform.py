"""Evenly spaced tokens: the shallow half of progressive visual dropout."""

import torch
from torch import Tensor

from hico.llm_dropout.base import DropPolicy
from hico.ops.dropping import uniform_keep_indices


class UniformPolicy(DropPolicy):
    """Keep evenly spaced tokens.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, progressive visual dropout.
    """

    def choose(
        self, num_tokens: int, num_keep: int, *, scores: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `DropPolicy.choose`."""
        return uniform_keep_indices(num_tokens, num_keep)
