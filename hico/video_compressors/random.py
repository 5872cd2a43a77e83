"""Keep tokens at random: a baseline that no table should lack."""

import torch
from torch import Tensor

from hico.ops.dropping import random_keep_indices
from hico.video_compressors.base import PlacewiseCompressor


class RandomVideoCompressor(PlacewiseCompressor):
    """Keep tokens at random, without replacement.

    Args:
        keep_ratio: share R of the tokens to keep, in (0, 1]; ``int(F P R)`` are, at least one.
        seed: what chance starts from, for every video anew: videos of one size lose tokens at the same places, on
            every device, alone or in any batch.

    Raises:
        ValueError: if ``keep_ratio`` is out of range.
    """

    def __init__(self, *, keep_ratio: float = 0.25, seed: int = 0):
        super().__init__(keep_ratio=keep_ratio)
        self.seed = seed

    def places(self, num_tokens: int, num_keep: int) -> Tensor:
        """See ``PlacewiseCompressor.places``."""
        return random_keep_indices(num_tokens, num_keep, generator=torch.Generator().manual_seed(self.seed))
