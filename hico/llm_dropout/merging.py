"""Averaging what is dropped into what is kept."""

import torch
from torch import Tensor

from hico.llm_dropout.policies import DropPolicy


@torch.no_grad()
def find_targets(policy: DropPolicy, hidden_BNE: Tensor, groups_BN: Tensor, kept_BN: Tensor) -> Tensor | None:
    """Say into which token each one is averaged.

    Args:
        policy: that merges.
        hidden_BNE: tokens.
        groups_BN: which of them belong together, by number; 0 and less are nothing to be merged.
        kept_BN: bool, which of them stay; a group that keeps none is not merged.

    Returns:
        ``(B, N)`` int64 positions: its own for a token that stays; None if all do.
    """
    groups_BN, kept_BN = groups_BN.to(hidden_BNE.device), kept_BN.to(hidden_BNE.device)
    goes_BN = ~kept_BN & (groups_BN > 0)
    if not goes_BN.any():
        return None
    into_BN = torch.arange(kept_BN.shape[1], device=hidden_BNE.device).repeat(len(kept_BN), 1)
    for row in goes_BN.any(1).nonzero()[:, 0].tolist():
        for group in groups_BN[row, goes_BN[row]].unique().tolist():
            members = (groups_BN[row] == group).nonzero()[:, 0]
            kept = kept_BN[row, members].nonzero()[:, 0]
            if len(kept):
                into_BN[row, members] = members[kept[policy.merge_into(hidden_BNE[row, members], kept)]]
                into_BN[row, members[kept]] = members[kept]
    return into_BN


def average_into(hidden_BNE: Tensor, into_BN: Tensor) -> Tensor:
    """Average tokens into those that `find_targets` found, in float32 at least; all others stay as they are."""
    exact = torch.promote_types(hidden_BNE.dtype, torch.float32)
    into_BN = into_BN.to(hidden_BNE.device)
    counts_BN = torch.zeros_like(into_BN).scatter_add(1, into_BN, torch.ones_like(into_BN))
    index_BNE = into_BN[..., None].expand_as(hidden_BNE)
    sums_BNE = torch.zeros_like(hidden_BNE, dtype=exact).scatter_add(1, index_BNE, hidden_BNE.to(exact))
    means_BNE = (sums_BNE / counts_BN.clamp(min=1)[..., None]).to(hidden_BNE.dtype)
    return torch.where(counts_BN[..., None] > 1, means_BNE, hidden_BNE)
