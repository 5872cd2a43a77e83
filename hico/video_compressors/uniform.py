"""Keep evenly spaced tokens: a baseline that no table should lack."""

from torch import Tensor

from hico.ops.dropping import uniform_keep_indices
from hico.video_compressors.base import PlacewiseCompressor


class UniformVideoCompressor(PlacewiseCompressor):
    """Keep evenly spaced tokens of all tokens of a video, the first and the last among them.

    Args:
        keep_ratio: share R of the tokens to keep, in (0, 1]; ``int(F P R)`` are, at least one.

    Raises:
        ValueError: if ``keep_ratio`` is out of range.
    """

    def places(self, num_tokens: int, num_keep: int) -> Tensor:
        """See ``PlacewiseCompressor.places``."""
        return uniform_keep_indices(num_tokens, num_keep)
