"""Work on many tokens, a chunk of them at a time; the backward pass computes again what it needs of a chunk."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def sum_over_chunks(function: Callable[..., Tensor], *tensors: Tensor, size: int) -> Tensor:
    """Add up what a function returns for chunks of ``size`` entries of the first axis of all tensors.

    Args:
        function: takes as many tensors; it runs once more per chunk in the backward pass, unless there is but one.
        tensors: ``(n, ...)`` each.
        size: entries of a chunk.

    Returns:
        The sum; of ``n == 0`` entries, what the function says of none.
    """
    if len(tensors[0]) <= size:
        return function(*tensors)
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return sum(checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks)


def map_over_chunks(function: Callable[[Tensor], Tensor], hidden: Tensor, *, size: int) -> Tensor:
    """Apply a function that treats every token alike to chunks of ``size`` tokens.

    Args:
        function: ``(..., n, D)`` to ``(..., n, E)``.
        hidden: ``(..., S, D)``.
        size: tokens of a chunk.

    Returns:
        ``(..., S, E)``.
    """
    if hidden.shape[-2] <= size:
        return function(hidden)
    parts = hidden.split(size, dim=-2)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts], dim=-2)
    return torch.cat([function(part) for part in parts], dim=-2)
