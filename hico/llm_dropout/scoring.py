"""Attention scores of one decoder layer, from its own weights and a few query rows."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hico.ops.dropping import gather_rows, query_row_scores

ORDINARY: dict[str, Callable[[Any], bool]] = {
    "sinks": lambda value: value is None,
    "use_rope": lambda value: value is None or bool(value),
    "rotary_ndims": lambda value: value is None,
}
"""Attribute of an attention module -> whether its value, None if there is none, leaves attention as it is in Qwen2."""


def check_scorable(layer: nn.Module) -> None:
    """Raise ``ValueError`` unless a decoder layer has the parts that `score_tokens` calls, and attends as it takes."""
    attention = getattr(layer, "self_attn", None)
    missing = [
        name
        for owner, name in [
            (layer, "input_layernorm"),
            (attention, "q_proj"),
            (attention, "k_proj"),
            (attention, "head_dim"),
            (attention, "scaling"),
            (sys.modules[type(attention).__module__], "apply_rotary_pos_emb"),
        ]
        if not hasattr(owner, name)
    ]
    if missing:
        raise ValueError(
            f"{type(layer).__name__} lacks {', '.join(missing)}, which scoring by attention needs; "
            "use the policy 'uniform', or a decoder laid out like Qwen2, Qwen3, Llama or Mistral"
        )
    for name, ordinary in ORDINARY.items():
        if not ordinary(getattr(attention, name, None)):
            raise ValueError(
                f"{type(attention).__name__} does not attend as scoring by attention takes it to, see its {name}; "
                "use the policy 'uniform'"
            )


@torch.no_grad()
def score_tokens(
    layer: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    query_index_BQ: Tensor,
    *,
    key_mask_BN: Tensor | None = None,
    past_keys_BGMC: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Score the tokens that enter a decoder layer by the attention of its query rows.

    Dropout inside the projections, as of an adapter in training, takes nothing from the streams of chance.

    Args:
        layer: the layer, whose input norm, query and key projections and rotary embedding are used.
        hidden_states: ``(B, N, E)`` entering it.
        position_embeddings: cosines and sines, ``(B or 1, N, C)``.
        query_index_BQ: query rows among the N tokens, -1 where a row has fewer.
        key_mask_BN: bool ``(B, M + N)``, False at padding; none if omitted.
        past_keys_BGMC: keys that the layer has cached; M = 0 if omitted.
        window: sliding window of the layer in tokens; none if omitted.

    Returns:
        ``(B, N)`` float32.
    """
    attention = layer.self_attn
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    device = attention.k_proj.weight.device  # a model spread over devices moves its inputs only inside `forward`
    cos, sin = (part.to(device) for part in position_embeddings)
    query_index_BQ = query_index_BQ.to(device)
    with _restored_chance(device) if layer.training else nullcontext():
        tokens = layer.input_layernorm(hidden_states.to(device))
        queries = attention.q_proj(gather_rows(tokens, query_index_BQ)).unflatten(-1, (-1, attention.head_dim))
        keys = attention.k_proj(tokens).unflatten(-1, (-1, attention.head_dim))
        queries = getattr(attention, "q_norm", nn.Identity())(queries).transpose(1, 2)
        keys = getattr(attention, "k_norm", nn.Identity())(keys).transpose(1, 2)
    # The model's own function rotates a pair of equal length; the other half of each pair is one head, thrown away.
    queries, _ = rotate(queries, queries[:, :1], gather_rows(cos, query_index_BQ), gather_rows(sin, query_index_BQ))
    _, keys = rotate(keys[:, :1], keys, cos, sin)

    num_past = 0
    if past_keys_BGMC is not None:
        num_past = past_keys_BGMC.shape[2]
        keys = torch.cat([past_keys_BGMC.to(keys), keys], 2)
        query_index_BQ = torch.where(query_index_BQ < 0, -1, query_index_BQ + num_past)
    scores = query_row_scores(
        queries,
        keys,
        query_index_BQ,
        scaling=attention.scaling,
        key_mask_BN=None if key_mask_BN is None else key_mask_BN.to(device),
        window=window,
    )
    return scores[:, num_past:].to(hidden_states.device)


def _restored_chance(device: torch.device) -> AbstractContextManager:
    """Set chance back on leaving, or a checkpointed layer, which is not scored again, would repeat other dropout."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
