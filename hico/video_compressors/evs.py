"""Keep the tokens that changed most since the frame before: EVS."""

from collections.abc import Iterable

import torch
from torch import Tensor

from hico.ops.dropping import keep_count, top_keep_indices
from hico.ops.similarity import cosine_to_previous
from hico.video_compressors.base import FrameTokens, VideoCompressor, check_ratio


class EVSVideoCompressor(VideoCompressor):
    """Keep the tokens that differ most from the same place of the frame before, over the whole video.

    The first frame differs from everything, so it is kept whole.

    Args:
        keep_ratio: share R of the tokens to keep, in (0, 1]; ``max(P, int(F P R))`` are.

    Raises:
        ValueError: if ``keep_ratio`` is out of range.

    Source: "Efficient Video Sampling", arXiv:2510.14624.
    """

    def __init__(self, *, keep_ratio: float = 0.25):
        super().__init__()
        self.keep_ratio = check_ratio(keep_ratio)

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``; at least a frame."""
        return max(tokens_per_frame, keep_count(num_frames * tokens_per_frame, self.keep_ratio))

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        tokens_FPD = video.tokens_FPD
        kept = top_keep_indices(_novelty(tokens_FPD, None), self.num_kept(*tokens_FPD.shape[:2]))
        return kept, tokens_FPD.flatten(0, 1)[kept]

    def select_stream(self, chunks: Iterable[FrameTokens], *, num_frames: int) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.select_stream``; holds as many tokens as it keeps, and one chunk."""
        places, novelty, kept, last, start = [], [], [], None, 0
        for tokens_FPD, *_ in chunks:
            tokens = tokens_FPD.flatten(0, 1)
            places.append(torch.arange(start, start + len(tokens), device=tokens.device))
            novelty.append(_novelty(tokens_FPD, last))
            kept.append(tokens)
            parts = [torch.cat(part) for part in (places, novelty, kept)]
            num_keep = min(len(parts[0]), self.num_kept(num_frames, tokens_FPD.shape[1]))
            best = top_keep_indices(parts[1], num_keep)
            places, novelty, kept = ([part[best]] for part in parts)
            last, start = tokens_FPD[-1:].clone(), start + len(tokens)
        return places[0], kept[0]


def _novelty(tokens_FPD: Tensor, before_1PD: Tensor | None) -> Tensor:
    """Return ``(F * P,)`` how little each token is like its place in the frame before; infinite if there is none."""
    if before_1PD is not None:
        return 1 - cosine_to_previous(torch.cat([before_1PD, tokens_FPD])).flatten()
    novelty_FP = 1 - cosine_to_previous(tokens_FPD)
    return torch.cat([novelty_FP.new_full(tokens_FPD.shape[1:2], torch.inf), novelty_FP.flatten()])
