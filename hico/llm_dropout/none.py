"""No dropping: the baseline that costs the most."""

import torch
from torch import Tensor

from hico.llm_dropout.base import DropPolicy


class NonePolicy(DropPolicy):
    """Keep every token, whatever the schedule asks for."""

    def num_keep(self, num_tokens: int, num_asked: int) -> int:
        """See `DropPolicy.num_keep`."""
        return num_tokens

    def choose(
        self, num_tokens: int, num_keep: int, *, scores: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `DropPolicy.choose`."""
        return torch.arange(num_keep)
