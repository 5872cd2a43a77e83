"""Collectives whose backward is their true adjoint.

Where every process computes its share of one loss, the gradients of all processes then sum up to that of the loss; and
where every process computes all of it, to as many times that. Both times their *mean* over the group is right once
the shares are added by `all_reduce`, so that a group looks to DDP, FSDP and ZeRO like devices with the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, values.shape
        gathered = values.new_empty(group.size(), *values.shape)
        dist.all_gather(list(gathered), values.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(ctx.shape)
        dist.reduce_scatter(own, list(gradient.contiguous()), group=ctx.group)
        return own, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, group: ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _swap(values, group, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(gradient, ctx.group, ctx.received, ctx.sent), None, None, None


def _swap(values: Tensor, group: ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    arrived = values.new_empty(sum(received), *values.shape[1:])
    dist.all_to_all_single(arrived, values.contiguous(), received, sent, group=group)
    return arrived


def all_gather(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Stack what all processes have: ``(N, ...)``."""
    return values[None] if group is None else _AllGather.apply(values, group)


def all_reduce(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add up what all processes have."""
    return values if group is None else _AllReduce.apply(values, group)


def all_to_all(
    values: Tensor,
    group: ProcessGroup | None,
    sent: Sequence[int] | None = None,
    received: Sequence[int] | None = None,
) -> Tensor:
    """Send a part of the first dimension to every process, and put together what comes from them.

    Args:
        values: ``(sum(sent), ...)``.
        group: the processes.
        sent, received: how much goes to and comes from every process; equally much if omitted.
    """
    if group is None:
        return values
    even = [len(values) // group.size()] * group.size()
    return _AllToAll.apply(values, group, list(sent or even), list(received or even))


def pass_on(values: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Send to the next process of a ring; return what waits for that which comes from the one before."""
    rank, size = group.rank(), group.size()
    values = values.contiguous()
    arriving = torch.empty_like(values)
    following, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    operations = [dist.P2POp(dist.isend, values, following, group), dist.P2POp(dist.irecv, arriving, before, group)]
    requests = dist.batch_isend_irecv(operations)

    def wait() -> Tensor:
        for request in requests:
            request.wait()
        operations.clear()  # until then what is sent must not be freed
        return arriving

    return wait
