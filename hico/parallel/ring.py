"""Ring attention: every process keeps its queries, and the keys and values of all go around."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hico.parallel.exchange import pass_on
from hico.parallel.kernels import attend, attend_backward
from hico.parallel.layout import Layout


def ring_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scaling: float) -> Tensor:
    """Attend causally, within documents, to the tokens of all processes of the ring.

    Args:
        query: ``(B, A, M, C)``, the tokens of this place in the ring.
        key, value: ``(B, G, M, C)``; G divides A, and no head of them is sent twice.
        layout: of the rows.
        scaling: factor of the logits.

    Returns:
        ``(B, A, M, C)``; zero for padding that sees nothing.

    Source: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv:2310.01889.
    """
    return _RingAttention.apply(query, key, value, layout, scaling)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
        mesh = layout.mesh
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = torch.zeros(query.shape, dtype=wide, device=query.device)
        log_sum = torch.full(query.shape[:-1], float("-inf"), dtype=wide, device=query.device)
        pair = torch.stack([key, value])
        for step in range(mesh.ring_size):
            is_last = step == mesh.ring_size - 1
            arrival = None if is_last else pass_on(pair, mesh.ring_group)
            for block in layout.blocks((mesh.ring_rank - step) % mesh.ring_size):
                at, keys = (block.rows, slice(None), block.queries), (block.rows, slice(None), block.keys)
                part, part_sum = attend(query[at], pair[0][keys], pair[1][keys], causal=block.causal, scaling=scaling)
                both = torch.logaddexp(log_sum[at], part_sum)
                output[at] = (
                    output[at] * (log_sum[at] - both).exp()[..., None] + part * (part_sum - both).exp()[..., None]
                )
                log_sum[at] = both
            if arrival:
                pair = arrival()
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, log_sum = ctx.saved_tensors
        layout, mesh = ctx.layout, ctx.layout.mesh
        of_query = torch.zeros_like(output, dtype=log_sum.dtype)
        pair, of_pair, returning = torch.stack([key, value]), None, None
        for step in range(mesh.ring_size):
            arrival = None if step == mesh.ring_size - 1 else pass_on(pair, mesh.ring_group)
            added = torch.zeros_like(pair, dtype=log_sum.dtype)
            for block in layout.blocks((mesh.ring_rank - step) % mesh.ring_size):
                at, keys = (block.rows, slice(None), block.queries), (block.rows, slice(None), block.keys)
                parts = attend_backward(
                    *(gradient[at], query[at], pair[0][keys], pair[1][keys], output[at], log_sum[at]),
                    causal=block.causal,
                    scaling=ctx.scaling,
                )
                of_query[at] += parts[0]
                added[0][keys] += parts[1]
                added[1][keys] += parts[2]
            # Gradients follow their keys, one step behind, and come home after the last.
            of_pair = added if returning is None else returning() + added
            if mesh.ring_size > 1:
                returning = pass_on(of_pair, mesh.ring_group)
            if arrival:
                pair = arrival()
        if returning is not None:
            of_pair = returning()
        return of_query.to(query.dtype), of_pair[0].to(key.dtype), of_pair[1].to(value.dtype), None, None
