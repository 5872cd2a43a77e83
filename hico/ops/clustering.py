"""Density peaks: which tokens stand for their neighbours, and what becomes of those."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hico.ops.similarity import BLOCK_ELEMENTS, wide


@torch.no_grad()
def squared_distances(points_GND: Tensor) -> Tensor:
    """Compute the squared distances within every group.

    Points, taken from their group's mean, are rounded to ``2**-26`` of the longest one. That makes sums exact in any
    order, and distances of equal points equal.

    Returns:
        ``(G, N, N)`` float64.
    """
    points_GND = points_GND.double()
    points_GND = points_GND - points_GND.mean(1, keepdim=True)
    scale_G11 = points_GND.square().sum(-1).amax(-1).sqrt()[:, None, None]
    scale_G11 = scale_G11.masked_fill(scale_G11 == 0, 1)
    points_GND = (points_GND / scale_G11 * 2.0**26).round() * 2.0**-26
    dots_GNN = points_GND @ points_GND.mT
    squares_GN = dots_GNN.diagonal(dim1=1, dim2=2)
    return (squares_GN[:, :, None] + squares_GN[:, None] - 2 * dots_GNN).clamp(min=0) * scale_G11.square()


@torch.no_grad()
def peak_order(distances_GNN: Tensor, *, k: int) -> Tensor:
    """Order the points of every group by how well they stand for others: density times distance.

    The density of a point is ``exp(-m)``, m the mean of the squared distances to its k nearest neighbours. Its
    distance is that to the nearest point of higher density, and to the farthest point if there is none. Compared are
    logarithms, so that no density vanishes; of equal points the earlier is the denser one.

    Args:
        distances_GNN: squared, see `squared_distances`.
        k: neighbours; all other points if there are fewer.

    Returns:
        ``(G, N)`` int64, the best first.

    Source: Rodriguez and Laio, "Clustering by fast search and find of density peaks", with the density of
    DPC-kNN.
    """
    num_points = distances_GNN.shape[1]
    if num_points == 1:
        return torch.zeros(distances_GNN.shape[:2], dtype=torch.int64, device=distances_GNN.device)
    is_self_NN = torch.eye(num_points, dtype=torch.bool, device=distances_GNN.device)
    nearest_GNk = distances_GNN.masked_fill(is_self_NN, torch.inf).topk(min(k, num_points - 1), largest=False).values
    density_GN = -nearest_GNk.mean(-1)
    rank_GN = density_GN.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    is_denser_GNN = rank_GN[:, None, :] < rank_GN[:, :, None]
    apart_GN = distances_GNN.masked_fill(~is_denser_GNN, torch.inf).amin(-1)
    apart_GN = torch.where(rank_GN == 0, distances_GNN.amax(-1), apart_GN)
    return (density_GN + apart_GN.log() / 2).sort(dim=1, descending=True, stable=True).indices


@torch.no_grad()
def dpc_knn(points_GND: Tensor, num_clusters: int, *, k: int) -> tuple[Tensor, Tensor]:
    """Cluster the points of every group around its density peaks.

    Args:
        points_GND: groups are independent, and worked on a few at a time.
        num_clusters: M, at most N.
        k: neighbours that make the density.

    Returns:
        ``(G, M)`` the centres, increasing, and ``(G, N)`` to which of them each point belongs: the nearest, of equally
        near ones the earlier.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, points_GND.shape[1:].numel()))
    parts = [_cluster(part, num_clusters, k=k) for part in points_GND.split(step)]
    centres, groups = zip(*parts, strict=True)
    return torch.cat(centres), torch.cat(groups)


def _cluster(points_GND: Tensor, num_clusters: int, *, k: int) -> tuple[Tensor, Tensor]:
    distances_GNN = squared_distances(points_GND)
    centres_GM = peak_order(distances_GNN, k=k)[:, :num_clusters].sort(dim=1).values
    to_centre_GMN = distances_GNN.gather(1, centres_GM[..., None].expand(-1, -1, distances_GNN.shape[1]))
    group_GN = to_centre_GMN.argmin(1)
    own_GM = torch.arange(num_clusters, device=group_GN.device).expand_as(centres_GM)
    return centres_GM, group_GN.scatter(1, centres_GM, own_GM)


def group_means(tokens_ND: Tensor, group_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Average tokens group by group, in their order, so that the result is the same on every run.

    Returns:
        ``(num_groups, D)`` in float32 or wider, zero where a group is empty, and ``(num_groups,)`` its sizes.
    """
    sizes = torch.bincount(group_N, minlength=num_groups)
    order = group_N.argsort(stable=True)
    return F.embedding_bag(order, wide(tokens_ND), sizes.cumsum(0) - sizes, mode="mean"), sizes


def merge_into(centres_MD: Tensor, tokens_ND: Tensor, group_N: Tensor, *, min_weight: float) -> Tensor:
    """Merge tokens into the centres that they belong to.

    Args:
        centres_MD: none of them among the tokens.
        tokens_ND: what is merged.
        group_N: the centre of each.
        min_weight: a centre of n tokens weighs ``max(1 / (n + 1), min_weight)`` and their mean the rest; with 0 the
            result is the mean of all n + 1.

    Returns:
        ``(M, D)`` in the dtype of the centres; a centre without tokens is unchanged.
    """
    means_MD, sizes_M = group_means(tokens_ND, group_N, len(centres_MD))
    weight_M1 = torch.where(sizes_M > 0, (1 / (sizes_M + 1)).clamp(min=min_weight), 1.0)[:, None].to(means_MD)
    return (weight_M1 * wide(centres_MD) + (1 - weight_M1) * means_MD).to(centres_MD.dtype)
