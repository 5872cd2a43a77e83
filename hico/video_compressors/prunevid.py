"""Average what stands still, and cluster what is left: PruneVid."""

import torch
from torch import Tensor

from hico.ops.clustering import dpc_knn, group_means
from hico.ops.dropping import keep_count
from hico.ops.segments import cut_segments
from hico.ops.similarity import frame_blocks, frame_means, unit_vectors
from hico.video_compressors.base import FrameTokens, VideoCompressor

NEIGHBOURS = 7
MIN_CLUSTERED = 14
"""Tokens that are left as they are, if there are no more."""


class PruneVidVideoCompressor(VideoCompressor):
    """Cut a video into segments, average over each what stands still in it, and merge similar tokens.

    Frames are clustered by their means around density peaks (`hico.ops.clustering.dpc_knn`, 7 neighbours); a segment
    is a run of frames of one cluster. A place whose tokens have a mean cosine above ``threshold``, over all pairs of a
    segment's frames, is static, and its mean stands in the first of them. The static tokens of a segment, and the
    others of each frame, are clustered in the same way, where there are more than 14, and clusters are averaged at the
    place of their centre.

    Args:
        segment_ratio: clusters of frames, as a share of the frames; ``int`` of it, at least one.
        threshold: mean cosine above which a place is static; 1 for none.
        cluster_ratio: share of tokens that clustering leaves; 1 clusters nothing.

    Raises:
        ValueError: if a setting is out of range.

    Source: Huang et al., "PruneVid", arXiv:2412.16117, the part before the LLM. It joins frames of a cluster that lie
    apart; we let them be segments of their own.
    """

    by_content = True

    def __init__(self, *, segment_ratio: float = 0.25, threshold: float = 0.8, cluster_ratio: float = 0.5):
        super().__init__()
        for name, value in (("segment_ratio", segment_ratio), ("cluster_ratio", cluster_ratio)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it is a cosine, from -1 to 1")
        self.segment_ratio = segment_ratio
        self.threshold = threshold
        self.cluster_ratio = cluster_ratio

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``."""
        return num_frames * tokens_per_frame

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        tokens_FPD, (num_frames, per_frame) = video.tokens_FPD, video.tokens_FPD.shape[:2]
        with torch.no_grad():
            num_clusters = max(1, keep_count(num_frames, self.segment_ratio))
            cluster_F = dpc_knn(frame_means(tokens_FPD)[None], num_clusters, k=NEIGHBOURS)[1][0]
        found = []
        for start, end in cut_segments((cluster_F.diff() != 0).tolist()):
            places, tokens = self._reduce(tokens_FPD[start:end])
            found.append((places + start * per_frame, tokens))
        indices, tokens = map(torch.cat, zip(*found, strict=True))
        return indices, tokens

    def _reduce(self, tokens_LPD: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce one segment: increasing places in it, and tokens."""
        per_frame, dtype = tokens_LPD.shape[1], tokens_LPD.dtype
        is_static_P = mean_pairwise_cosine(tokens_LPD) > self.threshold
        means_1PD = tokens_LPD.mean(0, keepdim=True, dtype=torch.promote_types(dtype, torch.float32))
        parts = []
        for places, tokens_GND in (
            (is_static_P.nonzero()[:, 0], means_1PD[:, is_static_P]),
            ((~is_static_P).nonzero()[:, 0], tokens_LPD[:, ~is_static_P]),
        ):
            if len(places):
                centres_GM, merged_GMD = self._cluster(tokens_GND)
                first_G1 = torch.arange(len(centres_GM), device=places.device)[:, None] * per_frame
                parts.append(((places[centres_GM] + first_G1).flatten(), merged_GMD.to(dtype).flatten(0, 1)))
        indices, tokens = map(torch.cat, zip(*parts, strict=True))
        order = indices.argsort()
        return indices[order], tokens[order]

    def _cluster(self, tokens_GND: Tensor) -> tuple[Tensor, Tensor]:
        num_groups, num_tokens, width = tokens_GND.shape
        if num_tokens <= MIN_CLUSTERED:
            return torch.arange(num_tokens, device=tokens_GND.device).expand(num_groups, -1), tokens_GND
        num_kept = max(1, keep_count(num_tokens, self.cluster_ratio))
        centres_GM, group_GN = dpc_knn(tokens_GND, num_kept, k=NEIGHBOURS)
        first_G1 = torch.arange(num_groups, device=group_GN.device)[:, None] * num_kept
        means, _ = group_means(tokens_GND.flatten(0, 1), (group_GN + first_G1).flatten(), num_groups * num_kept)
        return centres_GM, means.view(num_groups, num_kept, width)


@torch.no_grad()
def mean_pairwise_cosine(tokens_LPD: Tensor) -> Tensor:
    """Average the cosine of every pair of frames, place by place: ``(P,)`` float64; -1 if there is one frame only."""
    num_frames = len(tokens_LPD)
    sum_PD, own_P = 0, 0
    for block in frame_blocks(tokens_LPD):
        units = unit_vectors(tokens_LPD[block]).double()
        sum_PD, own_P = sum_PD + units.sum(0), own_P + units.square().sum((0, 2))
    if num_frames == 1:
        return torch.full_like(own_P, -1)
    return ((sum_PD.square().sum(-1) - own_P) / (num_frames * (num_frames - 1))).clamp(-1, 1)
