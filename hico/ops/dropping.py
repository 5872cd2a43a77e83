"""Choosing which tokens to keep, scoring them from a few query rows, and gathering ragged rows."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_SCORE_ELEMENTS = 2**26
"""Attention weights that `query_row_scores` holds at a time (256 MiB in float32)."""


def keep_count(num_tokens: int, keep_ratio: float) -> int:
    """Say how many tokens a ratio keeps, truncated as floating point does it: 29 % of 100 are 28.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, progressive visual dropout; truncation as released.
    """
    return int(num_tokens * keep_ratio)


def share_budget(counts: list[int], budget: int) -> list[int]:
    """Divide a budget of tokens among spans in proportion to their sizes.

    Args:
        counts: tokens of each span.
        budget: tokens to keep in all, at least 0.

    Returns:
        Tokens to keep of each span, none above its count; they sum to ``min(budget, sum(counts))``. What rounding
        leaves over goes to the largest remainders, the earlier span first.
    """
    total = sum(counts)
    if budget >= total:
        return list(counts)
    shares = [budget * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda span: -(budget * counts[span] % total))
    for span in by_remainder[: budget - sum(shares)]:
        shares[span] += 1
    return shares


def uniform_keep_indices(num_tokens: int, num_keep: int, *, device: torch.device | None = None) -> Tensor:
    """Pick evenly spaced tokens.

    The first token is always kept, and the last one too if ``num_keep > 1``.

    Args:
        num_tokens: tokens to choose from.
        num_keep: tokens to keep, ``0 <= num_keep <= num_tokens``.
        device: where to put the result; CPU if omitted.

    Returns:
        ``(num_keep,)`` int64 positions, strictly increasing, in ``[0, num_tokens)``.

    Raises:
        ValueError: if ``num_keep`` is out of range.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, progressive visual dropout.
    """
    check_num_keep(num_tokens, num_keep)
    # On the CPU always: elsewhere torch steps in float32 and a large video would keep other tokens.
    return torch.linspace(0, max(num_tokens - 1, 0), num_keep, dtype=torch.int64).to(device)


def top_keep_indices(scores: Tensor, num_keep: int) -> Tensor:
    """Pick the tokens with the highest scores, in their order.

    Args:
        scores: ``(num_tokens,)``; of equal scores the earlier token wins, on every device.
        num_keep: tokens to keep, ``0 <= num_keep <= num_tokens``.

    Returns:
        ``(num_keep,)`` int64 positions, strictly increasing.

    Raises:
        ValueError: if ``num_keep`` is out of range.
    """
    check_num_keep(len(scores), num_keep)
    return scores.sort(descending=True, stable=True).indices[:num_keep].sort().values


def random_keep_indices(num_tokens: int, num_keep: int, *, generator: torch.Generator) -> Tensor:
    """Pick tokens at random, without replacement, in their order: ``(num_keep,)`` int64 on the generator's device.

    Raises:
        ValueError: if ``num_keep`` is out of range.
    """
    check_num_keep(num_tokens, num_keep)
    order = torch.randperm(num_tokens, generator=generator, device=generator.device)
    return order[:num_keep].sort().values


def check_num_keep(num_tokens: int, num_keep: int) -> None:
    """Raise ``ValueError`` unless ``0 <= num_keep <= num_tokens``."""
    if not 0 <= num_keep <= num_tokens:
        raise ValueError(f"cannot keep {num_keep} of {num_tokens} tokens; ask for 0 to {num_tokens}")


def span_ids(visual_mask_BS: Tensor) -> Tensor:
    """Number the spans of a visual mask.

    Args:
        visual_mask_BS: integers, returned as int64 (0 is text, k the k-th span of the row, -1 text of an answer), or
            bool, where every unbroken run of True in a row is a span.

    Raises:
        ValueError: if the mask is not ``(B, S)`` or holds a number below -1.
        TypeError: if it is floating point.
    """
    if visual_mask_BS.ndim != 2:
        raise ValueError(f"visual_mask has shape {tuple(visual_mask_BS.shape)}; expected (batch, sequence)")
    if visual_mask_BS.dtype == torch.bool:
        starts = visual_mask_BS.clone()
        starts[:, 1:] &= ~visual_mask_BS[:, :-1]
        return starts.cumsum(1) * visual_mask_BS
    if visual_mask_BS.is_floating_point():
        raise TypeError(f"visual_mask is {visual_mask_BS.dtype}; expected bool, or integers with 0 for text")
    if (visual_mask_BS < -1).any():
        raise ValueError(
            f"visual_mask holds {visual_mask_BS.min().item()}; expected 0 for text, k for the k-th span and -1 for "
            "text of an answer"
        )
    return visual_mask_BS.long()


def pack_rows(keep_BS: Tensor, length: int, *, pad_left: bool) -> Tensor:
    """List the kept positions of each row, padded to one length.

    Args:
        keep_BS: bool.
        length: N, at least the largest number of kept positions in a row.
        pad_left: put the padding before the kept positions and not after them.

    Returns:
        ``(B, N)`` int64, the kept positions of each row in increasing order, and -1 as padding. Reads nothing back
        from the device.
    """
    if pad_left:
        order = keep_BS.int().argsort(dim=1, stable=True)[:, keep_BS.shape[1] - length :]
    else:
        order = (~keep_BS).int().argsort(dim=1, stable=True)[:, :length]
    return torch.where(keep_BS.gather(1, order), order, -1)


def gather_rows(values: Tensor, index_BN: Tensor, *, fill: float | int | bool = 0) -> Tensor:
    """Gather positions row by row.

    Args:
        values: ``(B, S, ...)``, or ``(1, S, ...)`` shared by all rows.
        index_BN: ``(B, N)`` positions in ``[0, S)``, or -1 where ``fill`` belongs.
        fill: what stands at padding.

    Returns:
        ``(B, N, ...)``.
    """
    batch, length = index_BN.shape
    index_BN = index_BN.to(values.device)
    padding_BN = index_BN < 0
    flat = index_BN.clamp(min=0)
    if values.shape[0] > 1:
        flat = flat + torch.arange(batch, device=values.device)[:, None] * values.shape[1]
    gathered = values.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, (batch, length))
    return gathered.masked_fill(padding_BN.reshape(batch, length, *[1] * (values.ndim - 2)), fill)


def query_row_scores(
    queries_BAQC: Tensor,
    keys_BGNC: Tensor,
    query_index_BQ: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks_A: Tensor | None = None,
    key_mask_BN: Tensor | None = None,
    window: int | None = None,
    key_positions_N: Tensor | None = None,
    join: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Average the causal attention that a few query rows pay to every key.

    The softmax runs over all keys that a row may see, in float32 also under autocast; then heads and query rows are
    averaged. Keys are shared by the query heads of their group and not repeated; memory grows with Q * N in chunks of
    bounded size.

    Args:
        queries_BAQC: the query rows only, rotated.
        keys_BGNC: all keys, rotated; G divides A (grouped-query attention).
        query_index_BQ: position of each query row among the keys; -1 where a row has fewer queries.
        scaling: factor of the logits.
        softcap: bound that the logits are squeezed into; none if omitted.
        sinks_A: a logit per head that takes part in the softmax and belongs to no key; none if omitted.
        key_mask_BN: bool, False at padding; none if omitted.
        window: how many keys a row sees, itself included; all if omitted.
        key_positions_N: where the keys stand, if they are a part of those that ``query_index_BQ`` counts.
        join: adds up log-sum-exps ``(B, A, Q, 1)`` of such parts, which other processes have.

    Returns:
        ``(B, N)`` float32; zeros in a row without queries.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, text-guided selection; not renormalised over visual tokens.
    """
    batch, num_heads, num_queries, _ = queries_BAQC.shape
    num_groups, num_keys = keys_BGNC.shape[1:3]
    keys_BGCN = keys_BGNC.float().transpose(2, 3)
    positions_N = torch.arange(num_keys) if key_positions_N is None else key_positions_N
    positions_N = positions_N.to(keys_BGNC.device)
    total_BN = keys_BGCN.new_zeros(batch, num_keys)
    chunk = max(1, MAX_SCORE_ELEMENTS // max(1, batch * num_heads * num_keys))
    for start in range(0, num_queries, chunk):
        index_BQ1 = query_index_BQ[:, start : start + chunk, None]
        seen_BQN = positions_N <= index_BQ1
        if window is not None:
            seen_BQN &= positions_N > index_BQ1 - window
        if key_mask_BN is not None:
            seen_BQN &= key_mask_BN[:, None, :]
        chunk_BAQC = queries_BAQC[:, :, start : start + chunk].float()
        grouped_BGXC = chunk_BAQC.unflatten(1, (num_groups, -1)).flatten(2, 3)
        with torch.autocast(keys_BGNC.device.type, enabled=False):
            logits_BAQN = (grouped_BGXC @ keys_BGCN * scaling).view(batch, num_heads, -1, num_keys)
        if softcap is not None:
            logits_BAQN = torch.tanh(logits_BAQN / softcap) * softcap
        seen_B1QN = seen_BQN[:, None]
        logits_BAQN = logits_BAQN.masked_fill(~seen_B1QN, float("-inf"))
        if sinks_A is None and join is None:
            weights_BAQN = logits_BAQN.softmax(-1)
        else:
            norm_BAQ1 = logits_BAQN.logsumexp(-1, keepdim=True)
            if join is not None:
                norm_BAQ1 = join(norm_BAQ1)
            if sinks_A is not None:
                norm_BAQ1 = torch.logaddexp(norm_BAQ1, sinks_A.float()[:, None, None])
            weights_BAQN = (logits_BAQN - norm_BAQ1).exp()
        total_BN += weights_BAQN.masked_fill(~seen_B1QN, 0.0).sum((1, 2))  # a row that sees nothing is 0, not NaN
    queries_B1 = (query_index_BQ >= 0).sum(1, keepdim=True).clamp(min=1)
    return total_BN / (num_heads * queries_B1)
