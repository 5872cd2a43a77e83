"""Random tokens: the baseline that a drop policy should beat."""

import torch
from torch import Tensor

from hico.llm_dropout.base import DropPolicy
from hico.ops.dropping import random_keep_indices


class RandomPolicy(DropPolicy):
    """Keep random tokens, the same ones whenever the seed, the layer and the place of the span in its row are."""

    def choose(
        self, num_tokens: int, num_keep: int, *, scores: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `DropPolicy.choose`."""
        return random_keep_indices(num_tokens, num_keep, generator=generator)
