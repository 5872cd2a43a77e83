"""Attention of one block with the log-sum-exp of its rows, and its gradients: all private names of torch stand here.

Blocks of a row are merged by their log-sum-exps, and `torch.nn.functional.scaled_dot_product_attention` keeps those to
itself: the operators below it hand them out. Where there is none for a device or dtype, the formula does the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TILE_ELEMENTS = 2**24
"""Attention weights that the formula holds at a time (64 MiB in float32)."""

HALF = (torch.float16, torch.bfloat16)
Attended = tuple[Tensor, Tensor]
"""Output ``(B, A, Q, C)``, and log-sum-exp ``(B, A, Q)`` of at least float32."""


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float) -> Attended:
    """Attend within a block.

    Args:
        query: ``(B, A, Q, C)``.
        key, value: ``(B, G, K, C)``; G divides A (grouped-query attention).
        causal: whether the i-th query sees the first i keys only; then Q is K.
        scaling: factor of the logits.
    """
    kernel = _kernel(query)
    if kernel is None:
        return attend_by_formula(query, key, value, causal=causal, scaling=scaling)
    repeats = query.shape[1] // key.shape[1]
    return kernel(query, _repeat(key, repeats), _repeat(value, repeats), 0.0, causal, scale=scaling)[:2]


def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    *,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a block's query, key and value.

    Args:
        gradient, output, log_sum: of whole rows, of which this block may be a part.
        query, key, value, causal, scaling: as `attend` got them.
    """
    if _kernel(query) is None:
        given = gradient, query, key, value, output, log_sum
        return backward_by_formula(*given, causal=causal, scaling=scaling)
    repeats = query.shape[1] // key.shape[1]
    given = gradient, query, _repeat(key, repeats), _repeat(value, repeats), output, log_sum
    if query.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = backward(*given, 0.0, causal, scale=scaling)
    else:
        state = torch.empty(2, dtype=torch.uint64, device=query.device)  # of dropout, of which there is none
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        lengths, given = (query.shape[2], key.shape[2]), [part.contiguous() for part in given]
        found = backward(*given, None, None, *lengths, 0.0, causal, state, state[0], scale=scaling)
    of_query, *others = found
    return of_query, *(part.unflatten(1, (-1, repeats)).sum(2) for part in others)


def _kernel(query: Tensor) -> Callable | None:
    """Return torch's operator that keeps the log-sum-exp, if there is one for such queries."""
    if query.device.type == "cpu":
        return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if query.is_cuda and query.dtype in HALF and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention
    return None


def _repeat(values: Tensor, repeats: int) -> Tensor:
    return values.repeat_interleave(repeats, 1) if repeats > 1 else values


@torch.no_grad()
def attend_by_formula(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float) -> Attended:
    """See `attend`: a few query rows at a time, in float32 at least."""
    with torch.autocast(query.device.type, enabled=False):
        key_BG1KC, value_BG1KC = (_wide(part)[:, :, None] for part in (key, value))
        outputs, log_sums = [], []
        for rows in _tiles(query, key):
            logits = _logits(query, key_BG1KC, rows, causal, scaling)
            log_sum = logits.logsumexp(-1, keepdim=True)
            outputs.append(((logits - log_sum).exp() @ value_BG1KC).flatten(1, 2))
            log_sums.append(log_sum[..., 0].flatten(1, 2))
    return torch.cat(outputs, 2).to(query.dtype), torch.cat(log_sums, 2)


def backward_by_formula(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    *,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attend_backward`: a few query rows at a time, in float32 at least."""
    with torch.autocast(query.device.type, enabled=False):
        key_BG1KC, value_BG1KC = (_wide(part)[:, :, None] for part in (key, value))
        of_query = []
        of_key, of_value = (torch.zeros_like(part[:, :, 0]) for part in (key_BG1KC, value_BG1KC))
        for rows in _tiles(query, key):
            tile, gradient_tile, output_tile = (
                _wide(part[:, :, rows]).unflatten(1, (key.shape[1], -1)) for part in (query, gradient, output)
            )
            log_sum_tile = log_sum[:, :, rows].unflatten(1, (key.shape[1], -1))[..., None]
            weights = (_logits(query, key_BG1KC, rows, causal, scaling) - log_sum_tile).exp()
            of_value += (weights.transpose(-1, -2) @ gradient_tile).sum(2)
            delta = (gradient_tile * output_tile).sum(-1, keepdim=True)
            of_logits = weights * (gradient_tile @ value_BG1KC.transpose(-1, -2) - delta) * scaling
            of_query.append((of_logits @ key_BG1KC).flatten(1, 2))
            of_key += (of_logits.transpose(-1, -2) @ tile).sum(2)
    return torch.cat(of_query, 2).to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def _logits(query: Tensor, key_BG1KC: Tensor, rows: slice, causal: bool, scaling: float) -> Tensor:
    """Return ``(B, G, A / G, q, K)``."""
    tile = _wide(query[:, :, rows]).unflatten(1, (key_BG1KC.shape[1], -1))
    logits = tile @ key_BG1KC.transpose(-1, -2) * scaling
    if causal:
        places = torch.arange(key_BG1KC.shape[-2], device=query.device)
        logits = logits.masked_fill(places > places[rows, None], float("-inf"))
    return logits


def _tiles(query: Tensor, key: Tensor) -> list[slice]:
    batch, num_heads, num_queries, _ = query.shape
    size = max(1, TILE_ELEMENTS // (batch * num_heads * key.shape[2]))
    return [slice(start, start + size) for start in range(0, num_queries, size)]


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
