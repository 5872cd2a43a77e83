"""Tokens that the text attends to: the deep half of progressive visual dropout."""

import torch
from torch import Tensor

from hico.llm_dropout.base import DropPolicy
from hico.ops.dropping import top_keep_indices


class AttentionPolicy(DropPolicy):
    """Keep the tokens that get most attention from the query rows.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, progressive visual dropout, text-guided selection.
    """

    needs_scores = True

    def choose(
        self, num_tokens: int, num_keep: int, *, scores: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `DropPolicy.choose`."""
        return top_keep_indices(scores, num_keep)
