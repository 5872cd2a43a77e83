"""Work on many tokens, a chunk of them at a time; the backward pass computes again what it needs of a chunk."""

from collections.abc import Callable
from functools import partial

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


def map_over_chunks(function: Callable[[Tensor], Tensor], hidden_BSD: Tensor, *, size: int) -> Tensor:
    """Apply a function that treats every token alike to chunks of ``size`` tokens, of whatever rows.

    Args:
        function: ``(1, n, D)`` to ``(1, n, E)``.
        hidden_BSD: ``(B, S, D)``.
        size: tokens of a chunk.

    Returns:
        ``(B, S, E)``.
    """
    if hidden_BSD[..., 0].numel() <= size:
        return function(hidden_BSD)
    run = partial(checkpoint, function, use_reentrant=False) if torch.is_grad_enabled() else function
    parts = [run(part) for part in hidden_BSD.flatten(0, 1)[None].split(size, dim=1)]
    return torch.cat(parts, dim=1).unflatten(1, hidden_BSD.shape[:2])[0]
