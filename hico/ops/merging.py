"""Merge similar tokens of a clip: bipartite matching in rounds, then one size-weighted mean.

Published connectors merge wide tokens round by round. Only directions are compared, and what is compared (a mean over
heads) is linear in the tokens, so all rounds can run on sums of that narrow metric. They yield a plan, which output
token each input token goes to, and the wide tokens are averaged once.

Decisions do not depend on the batch, the threads or the kernel that a matrix product happens to use: unit vectors are
rounded to multiples of ``2**-26``, and dot products of those are exact in float64 in whatever order they are added up.
So equal tokens tie exactly, and a tie goes to the lowest index.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ORDERS = ("similarity", "position")

_UNIT = 2.0**26
"""Length of a rounded unit vector: dot products are whole numbers below ``2**53``, and float64 holds all of those."""
_MAX_SIMILARITIES = {"cpu": 2**20, "default": 2**24}
"""Similarities held at a time: what caches hold on a CPU (8 MiB), what amortises launches elsewhere (128 MiB). The
work is cut along clips and then along sources; dot products are exact, so the result does not show the cuts."""


class MergePlan(NamedTuple):
    """Which output token each input token goes to, as ``plan_merge`` decided it."""

    assignment_NL: Tensor
    """int64 index in ``[0, K)``."""
    sizes_NK: Tensor
    """int64 number of input tokens in each output token, at least 1; rows sum to L."""


def similarity_metric(tokens_NLD: Tensor, *, num_heads: int) -> Tensor:
    """Average the heads of each token.

    Args:
        tokens_NLD: any floating dtype.
        num_heads: the encoder's attention heads; D is split into so many equal runs of channels.

    Returns:
        ``(N, L, D / num_heads)`` in float32, or in the dtype of the tokens if that is wider.

    Raises:
        ValueError: if D does not split into ``num_heads``.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574; the released connector compares this mean and not the keys
    that Bolya et al., "Token Merging", arXiv:2210.09461, section 3, compare.
    """
    width = tokens_NLD.shape[-1]
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"tokens of width {width} do not split into {num_heads} heads; use a divisor of {width}")
    dtype = torch.promote_types(tokens_NLD.dtype, torch.float32)
    return tokens_NLD.unflatten(-1, (num_heads, -1)).mean(dim=-2, dtype=dtype)


@torch.no_grad()
def match_tokens(metric_NLC: Tensor, *, num_merge: int) -> Tensor:
    """Match the tokens at even positions with those at odd positions, once.

    Every even token (a source) picks the odd token (a target) of highest cosine similarity. The ``num_merge`` sources
    with the highest similarity go to their targets; several may share one. Ties go to the lowest index. A zero token
    is as similar as an orthogonal one, and a NaN or infinite component counts as 0.

    Args:
        metric_NLC: what to compare; lengths do not matter. At least two tokens.
        num_merge: sources to merge, at least 1; more than half of the tokens count as half of them, rounded down.

    Returns:
        ``(N, L)`` int64: the output token of each token. Output tokens are the remaining sources, from the most to the
        least similar to their best target, and then the targets by position.

    Raises:
        ValueError: if there is nothing to merge.

    Source: Bolya et al., "Token Merging", arXiv:2210.09461, section 3.
    """
    num_tokens = metric_NLC.shape[1]
    if num_merge < 1 or num_tokens < 2:
        raise ValueError(f"cannot merge {num_merge} of {num_tokens} tokens; merge at least 1 of at least 2")
    return _match(_finite(metric_NLC), min(num_merge, num_tokens // 2))


@torch.no_grad()
def plan_merge(metric_NLC: Tensor, num_keep: int, *, order: str = "similarity") -> MergePlan:
    """Decide which tokens to merge, in rounds that each remove at most half of them.

    A token that was merged takes part in the next round with the size-weighted mean of its members. Tokens of one row
    are compared with each other only, and a row's plan is the same alone and in any batch. Not differentiable. NaN and
    infinite components count as 0 here, so that they spoil no output token but the one they go to.

    Args:
        metric_NLC: what to compare; see ``similarity_metric``.
        num_keep: output tokens K, ``1 <= K <= L``. With ``K == L`` every token stays where it is.
        order: ``"similarity"`` as published, see ``match_tokens``: neither time nor place can be read from it;
            ``"position"``: by the first input token of each output token.

    Raises:
        ValueError: if ``num_keep`` is out of range or ``order`` unknown.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, clip-level compression; order by position is ours.
    """
    num_tokens = metric_NLC.shape[1]
    if not 1 <= num_keep <= num_tokens:
        raise ValueError(f"cannot merge {num_tokens} tokens into {num_keep}; ask for 1 to {num_tokens}")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r} of merged tokens; known: {', '.join(ORDERS)}")
    if metric_NLC.device.type == "mps":  # has no float64
        plan = plan_merge(metric_NLC.cpu(), num_keep, order=order)
        return MergePlan(*(part.to(metric_NLC.device) for part in plan))
    clips_at_once = max(1, _max_similarities(metric_NLC) // max(1, num_tokens // 2) ** 2)
    rows = [_merge_in_rounds(_finite(rows_NLC), num_keep) for rows_NLC in metric_NLC.split(clips_at_once)]
    assignment_NL = torch.cat(rows)
    if order == "position":
        assignment_NL = _number_by_first_member(assignment_NL, num_keep)
    sizes_NK = assignment_NL.new_zeros(len(assignment_NL), num_keep)
    return MergePlan(assignment_NL, sizes_NK.scatter_add_(1, assignment_NL, torch.ones_like(assignment_NL)))


@torch.no_grad()
def plan_merge_over_time(metric_NLC: Tensor, num_keep: int, *, num_steps: int) -> MergePlan:
    """Decide which tokens of one place to merge over time, in one round.

    Each token is linked to that of the same place one step before. The ``L - num_keep`` links of highest cosine
    similarity hold, ties going to the earliest; tokens along unbroken links make one output token. Output tokens stand
    by their first member, so in order of time, then place. A row's plan is the same alone and in any batch.

    Args:
        metric_NLC: what to compare, time-major; see ``similarity_metric``.
        num_keep: output tokens K, ``L / num_steps <= K <= L``: one place is never merged with another.
        num_steps: steps of time T.

    Raises:
        ValueError: if ``num_keep`` is out of range.
    """
    num_rows, num_tokens, _ = metric_NLC.shape
    num_places = num_tokens // num_steps
    if not num_places <= num_keep <= num_tokens:
        raise ValueError(
            f"cannot merge {num_tokens} tokens over time into {num_keep}; ask for {num_places} to {num_tokens}"
        )
    units = _units(_finite(metric_NLC)).unflatten(1, (num_steps, num_places))
    similarity = (units[:, 1:] * units[:, :-1]).sum(dim=-1).flatten(1)
    rank = similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    holds = F.pad((rank < num_tokens - num_keep), (num_places, 0))
    assignment_NL = (~holds).cumsum(dim=1) - 1
    by_step = assignment_NL.unflatten(1, (num_steps, num_places))
    for step in range(1, num_steps):
        joined = holds.unflatten(1, (num_steps, num_places))[:, step]
        by_step[:, step] = torch.where(joined, by_step[:, step - 1], by_step[:, step])
    sizes_NK = assignment_NL.new_zeros(num_rows, num_keep)
    return MergePlan(assignment_NL, sizes_NK.scatter_add_(1, assignment_NL, torch.ones_like(assignment_NL)))


def apply_merge(tokens_NLD: Tensor, plan: MergePlan) -> Tensor:
    """Average the input tokens of each output token.

    The sum runs over the members by position, so it does not depend on batch or threads. Differentiable in the tokens.

    Returns:
        ``(N, K, D)``.

    Raises:
        ValueError: if the plan is for another number of rows or tokens.
    """
    if plan.assignment_NL.shape != tokens_NLD.shape[:2]:
        raise ValueError(
            f"the plan is for {tuple(plan.assignment_NL.shape)} rows and tokens, "
            f"the tokens are {tuple(tokens_NLD.shape[:2])}; plan with a metric of these tokens"
        )
    by_group_NL = plan.assignment_NL.argsort(dim=1, stable=True)
    ends = plan.sizes_NK.flatten().cumsum(0)
    merged = F.embedding_bag(
        _rows_of_batch(by_group_NL, tokens_NLD.shape[1]),
        tokens_NLD.flatten(0, 1),
        ends - plan.sizes_NK.flatten(),
        mode="mean",
    )
    return merged.unflatten(0, plan.sizes_NK.shape)


def merge_tokens(tokens_NLD: Tensor, *, num_keep: int, num_heads: int, order: str = "similarity") -> Tensor:
    """Merge the tokens of each row into ``num_keep`` size-weighted means.

    Args:
        tokens_NLD: tokens of N clips.
        num_keep: output tokens K, ``1 <= K <= L``; with ``K == L`` the tokens are returned unchanged.
        num_heads: see ``similarity_metric``.
        order: see ``plan_merge``.

    Returns:
        ``(N, K, D)``. Gradients flow through the means, not through the choice of what to merge.

    Raises:
        ValueError: as ``similarity_metric`` and ``plan_merge``.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, clip-level compression.
    """
    plan = plan_merge(similarity_metric(tokens_NLD.detach(), num_heads=num_heads), num_keep, order=order)
    return tokens_NLD if num_keep == tokens_NLD.shape[1] else apply_merge(tokens_NLD, plan)


def _finite(metric_NLC: Tensor) -> Tensor:
    return torch.nan_to_num(metric_NLC.double(), nan=0.0, posinf=0.0, neginf=0.0)


def _units(vectors: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return (vectors * (_UNIT / norms.clamp_min(torch.finfo(norms.dtype).tiny))).round_()


def _merge_in_rounds(sums_NLC: Tensor, num_keep: int) -> Tensor:
    num_rows, num_tokens, _ = sums_NLC.shape
    assignment_NL = torch.arange(num_tokens, device=sums_NLC.device).expand(num_rows, -1)
    while num_tokens > num_keep:
        num_merge = min(num_tokens - num_keep, num_tokens // 2)
        step_NL = _match(sums_NLC, num_merge)
        assignment_NL = step_NL.gather(1, assignment_NL)
        num_tokens -= num_merge
        # Sums and not means: normalising cancels the size. The metric is float32, so float64 adds it exactly but for
        # the last bits, in any order (CUDA adds in any order), and rounding the unit vectors removes those.
        grouped = sums_NLC.new_zeros(num_rows * num_tokens, sums_NLC.shape[2])
        grouped.index_add_(0, _rows_of_batch(step_NL, num_tokens), sums_NLC.flatten(0, 1))
        sums_NLC = grouped.unflatten(0, (num_rows, num_tokens))
    return assignment_NL


def _match(sums_NLC: Tensor, num_merge: int) -> Tensor:
    units_NLC = _units(sums_NLC)
    sources, targets = units_NLC[:, 0::2], units_NLC[:, 1::2]
    best, target = most_similar(sources, targets)

    num_left = sources.shape[1] - num_merge
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    step_NL = torch.empty(sums_NLC.shape[:2], dtype=torch.int64, device=sums_NLC.device)
    step_NL[:, 0::2] = torch.where(rank < num_merge, num_left + target, rank - num_merge)
    step_NL[:, 1::2] = torch.arange(num_left, num_left + targets.shape[1], device=sums_NLC.device)
    return step_NL


def most_similar(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Find the highest dot product of each source ``(N, L, C)`` with targets ``(N, K, C)``, in blocks.

    Returns:
        ``(N, L)``: that product, and the target it is with, the first one of equals.
    """
    num_rows, num_sources, _ = sources.shape
    num_targets = targets.shape[1]
    sources_at_once = min(num_sources, max(1, _max_similarities(sources) // max(1, num_rows * num_targets)))
    # One buffer for all blocks: large allocations between small ones fragment the heap of a CPU.
    similarities = sources.new_empty(num_rows, sources_at_once, num_targets)
    best, target = [], []
    for block in sources.split(sources_at_once, dim=1):
        highest = torch.bmm(block, targets.mT, out=similarities[:, : block.shape[1]]).max(dim=-1)
        best.append(highest.values)
        target.append(highest.indices)
    return torch.cat(best, dim=1), torch.cat(target, dim=1)


def _max_similarities(tensor: Tensor) -> int:
    return _MAX_SIMILARITIES.get(tensor.device.type, _MAX_SIMILARITIES["default"])


def _number_by_first_member(assignment_NL: Tensor, num_groups: int) -> Tensor:
    num_rows, num_tokens = assignment_NL.shape
    positions = torch.arange(num_tokens, device=assignment_NL.device).expand(num_rows, -1)
    first_NK = assignment_NL.new_full((num_rows, num_groups), num_tokens)
    first_NK.scatter_reduce_(1, assignment_NL, positions, "amin")
    return first_NK.argsort(dim=1).argsort(dim=1).gather(1, assignment_NL)


def _rows_of_batch(index_NL: Tensor, num_per_row: int) -> Tensor:
    """Turn positions within a row into positions in the flattened batch."""
    starts = num_per_row * torch.arange(len(index_NL), device=index_NL.device)
    return (index_NL + starts[:, None]).flatten()
