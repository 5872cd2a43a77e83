"""How much attention the query rows of a layer pay to each token that enters it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hico.compat import attention_call
from hico.ops.dropping import query_row_scores


@torch.no_grad()
def score_tokens(
    layer: nn.Module,
    hidden_states: Tensor,
    kwargs: dict[str, Any],
    query_index_BQ: Tensor,
    *,
    key_mask_BM: Tensor,
    past_keys_BGMC: Tensor | None,
    window: int | None,
    layout: Any = None,
) -> Tensor:
    """Score the tokens that enter a decoder layer, by the layer's own queries and keys.

    Dropout inside the projections, as of an adapter in training, takes nothing from the streams of chance. Where heads
    are spread over processes, every process gets the scores of all.

    Args:
        layer: the layer.
        hidden_states: ``(B, N, E)`` entering it.
        kwargs: what the decoder passes to it, with positions of these N tokens.
        query_index_BQ: query rows among the N tokens, -1 where a row has fewer.
        key_mask_BM: bool, cached tokens first, False at padding.
        past_keys_BGMC: keys that the layer has cached; None if there are none.
        window: how many tokens the layer sees; all if None.
        layout: `hico.parallel.Layout` of the N tokens, if hidden states and positions are the part of one process.

    Returns:
        ``(B, N)`` float32, on the device of the hidden states.
    """
    with _restored_chance(hidden_states.device) if layer.training else nullcontext():
        call = attention_call(layer, hidden_states, kwargs, window=window)
    keys, device, num_past = call.key, call.key.device, 0
    query_index_BQ, parts = query_index_BQ.to(device), {}
    if layout is None:
        rows_B1 = torch.arange(len(keys), device=device)[:, None]
        queries_BQAC = call.query[rows_B1, :, query_index_BQ.clamp(min=0)]
    else:
        queries_BQAC = layout.take(call.query.transpose(1, 2), query_index_BQ)
        parts = {"key_positions_N": layout.positions, "join": layout.log_total}
        key_mask_BM = None if key_mask_BM is None else layout.shard(key_mask_BM)
    if past_keys_BGMC is not None:
        num_past = past_keys_BGMC.shape[2]
        keys = torch.cat([past_keys_BGMC.to(keys), keys], 2)
        query_index_BQ = torch.where(query_index_BQ < 0, -1, query_index_BQ + num_past)
    scores_BM = query_row_scores(
        queries_BQAC.transpose(1, 2),
        keys,
        query_index_BQ,
        scaling=call.scaling,
        softcap=call.softcap,
        sinks_A=call.sinks,
        key_mask_BN=key_mask_BM[:, -keys.shape[2] :].to(device),
        window=window,
        **parts,
    )
    if call.group is not None:
        scores_BM = _mean_over_processes(scores_BM, call.query.shape[1], call.group)
    scores_BN = scores_BM[:, num_past:].to(hidden_states.device)
    return scores_BN if layout is None else layout.gather(scores_BN)


def _mean_over_processes(scores_BM: Tensor, num_heads: int, group: dist.ProcessGroup) -> Tensor:
    """Average scores over the heads of all processes, of which this one has some."""
    sums = torch.cat([scores_BM.flatten() * num_heads, scores_BM.new_tensor([num_heads])])
    dist.all_reduce(sums, group=group)
    return (sums[:-1] / sums[-1]).view_as(scores_BM)


def _restored_chance(device: torch.device) -> AbstractContextManager:
    """Set chance back on leaving, or a checkpointed layer, which is not scored again, would repeat other dropout."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
