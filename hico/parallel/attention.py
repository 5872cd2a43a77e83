"""The attention implementation of a decoder whose rows are spread over processes, registered with its mask."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from hico.compat import UnsupportedDecoder
from hico.parallel.kernels import HALF
from hico.parallel.layout import Layout
from hico.parallel.ring import ring_attention

IMPLEMENTATION = "hico_sequence"
"""How transformers knows it."""

_CAUSAL_BY_THEMSELVES = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Attention functions of transformers that need no mask to be causal."""


def register() -> None:
    """Make the implementation known to transformers."""
    from transformers import AttentionInterface  # loads what may still be loading when this module is
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, sequence_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Make no mask: a decoder sees only its part of the rows, and the layout knows what sees what."""


def sequence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    sequence_layout: Layout | None = None,
    sequence_local: str = "sdpa",
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over processes: heads by Ulysses, and what is left by the ring.

    Args:
        query: ``(B, A, n, C)``, of this process's tokens.
        key, value: ``(B, G, n, C)``.
        sequence_layout: of the rows.
        sequence_local: attention function of transformers for a sequence that is whole on every process.

    Returns:
        ``(B, n, A, C)``, and no weights.

    Raises:
        RuntimeError: outside a call whose rows are spread.
        UnsupportedDecoder: if attention is more than causal softmax.
    """
    if sequence_layout is None:
        raise RuntimeError(
            f"attention {IMPLEMENTATION!r} was called without the layout of rows that are spread over processes; call "
            "set_sequence_parallel(None), or remove() the handle, before anything else"
        )
    extra = {name: kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux")}
    extra |= {"dropout": dropout or None}
    if found := [name for name, setting in extra.items() if setting is not None]:
        raise UnsupportedDecoder(module, f"attends with {', '.join(found)}, which sequence parallelism does not know")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout, mesh = sequence_layout, sequence_layout.mesh
    layout.num_attended += 1
    query, key, value = (layout.to_heads(part) for part in (query, key, value))
    whole_here = mesh.ring_size == 1 and layout.is_one_document and sequence_local in _CAUSAL_BY_THEMSELVES
    if whole_here:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS[sequence_local]
        output = attend(module, query, key, value, None, scaling=scaling, dropout=0.0)[0].transpose(1, 2)
    elif layout.is_one_document and query.is_cuda and query.dtype in HALF and has_ring_flash_attention():
        output = zigzag_flash_attention(query, key, value, layout, scaling=scaling)
    else:
        output = ring_attention(query, key, value, layout, scaling=scaling)
    return layout.to_tokens(output).transpose(1, 2).contiguous(), None


@cache
def has_ring_flash_attention() -> bool:
    """Say whether the package ``ring-flash-attn`` is installed."""
    return find_spec("ring_flash_attn") is not None


def zigzag_flash_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scaling: float) -> Tensor:
    """Do what `ring_attention` does for rows of one document, by the package ``ring-flash-attn``."""
    from ring_flash_attn import zigzag_ring_flash_attn_func

    parts = (part.transpose(1, 2) for part in (query, key, value))
    output = zigzag_ring_flash_attn_func(*parts, softmax_scale=scaling, causal=True, group=layout.mesh.ring_group)
    return output.transpose(1, 2)
