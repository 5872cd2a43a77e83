"""Hooks that spread the rows of a stock Hugging Face decoder over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hico.compat import UnsupportedDecoder, arguments, find_cache, sliding_window
from hico.parallel.attention import IMPLEMENTATION, register
from hico.parallel.blocks import find_documents
from hico.parallel.layout import Layout
from hico.parallel.mesh import SequenceMesh

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the largest position, which differs between processes."""


def patch(model: nn.Module, mesh: SequenceMesh) -> SequenceHandle:
    """Spread the rows of every call of a decoder over the processes of a mesh.

    All processes of a group call it with the same rows. The decoder embeds or takes them whole, works on its part, and
    returns the hidden states ``(B, n, E)`` of that part with ``sequence_layout``, which puts parts together, see
    `Layout`. A stock causal LM around it returns the logits, and the loss, that one process would: give
    ``logits_to_keep`` where rows are long. Rows may be padded on either side, or packed: then ``position_ids`` begin
    anew with every document, and there is no ``attention_mask``. No weight, state-dict key or class changes.

    Args:
        model: a decoder, or a model with ``get_decoder``.
        mesh: from `make_mesh`.

    Returns:
        A handle; ``remove()`` it to have the decoder as it was.

    Raises:
        UnsupportedDecoder: if layers are not causal attention over all tokens, naming what they are.
        RuntimeError: if the decoder is patched already.
    """
    decoder = model if hasattr(model, "layers") else model.get_decoder()
    check_decoder(decoder)
    reads_layouts = model is decoder or hasattr(model, "set_sequence_parallel")
    return SequenceHandle(decoder, mesh, None if reads_layouts else model)


def check_decoder(decoder: nn.Module) -> None:
    """Check that every layer is attention to all tokens before, at positions that do not depend on the length.

    Raises:
        UnsupportedDecoder: naming what is in the way.
    """
    check_config(decoder.config)
    rope_type = getattr(getattr(decoder, "rotary_emb", None), "rope_type", "default")
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    if found := sorted({kind for kind in kinds if kind in LENGTH_DEPENDENT_ROPE}):
        raise UnsupportedDecoder(
            decoder,
            f"has a rotary embedding of type {', '.join(found)}, which no process that sees a part can compute",
        )
    if any(getattr(module, "is_causal", None) is False for module in decoder.layers.modules()):
        raise UnsupportedDecoder(decoder, "lets tokens attend to those after them")


def check_config(config: Any) -> None:
    """Check the types of layers that a configuration names; see `check_decoder`."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    windows = {sliding_window(config, layer) for layer in range(config.num_hidden_layers)} - {None}
    if windows:
        kinds.add(f"sliding_attention (of {', '.join(map(str, sorted(windows)))} tokens)")
    if kinds:
        raise UnsupportedDecoder(
            type(config),
            f"names layers of type {', '.join(sorted(kinds))}; sequence parallelism serves full_attention only",
        )


class SequenceHandle:
    """The hooks of one patched decoder; holds nothing of any forward pass.

    Args:
        decoder: the decoder.
        mesh: the processes.
        causal_lm: the stock causal LM around it, if there is one.
    """

    def __init__(self, decoder: nn.Module, mesh: SequenceMesh, causal_lm: nn.Module | None = None):
        if decoder.config._attn_implementation == IMPLEMENTATION:
            raise RuntimeError(
                f"{type(decoder).__name__} is spread over processes already; remove() that handle first"
            )
        register()
        self.mesh, self._decoder = mesh, decoder
        self._local = decoder.config._attn_implementation
        decoder.set_attn_implementation(IMPLEMENTATION)
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
        ]
        if causal_lm is not None:
            self._hooks.append(causal_lm.register_forward_pre_hook(self._before_causal_lm, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks away. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self._decoder.set_attn_implementation(self._local)
        self._hooks = []

    @staticmethod
    def _before_causal_lm(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = arguments(model.forward, args, kwargs)
        keep = given.pop("logits_to_keep", 0)
        return (), given | {"logits_to_keep": 0, "sequence_keep": (keep,)}  # no tensor: layers are given it too

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = arguments(decoder.forward, args, kwargs)
        if given.get("use_cache") or find_cache(given)[1] is not None:
            raise ValueError(
                "a decoder whose rows are spread over processes keeps no cache; pass use_cache=False, and generate "
                "without sequence parallelism"
            )
        name = "input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"
        whole = given[name]
        shape = tuple(whole.shape[:2])
        mask, position_ids = given.get("attention_mask"), given.get("position_ids")
        for what, part, known in (
            ("attention_mask", mask, [shape]),
            ("position_ids", position_ids, [shape, (1, shape[1])]),
        ):
            if part is not None and (not isinstance(part, Tensor) or tuple(part.shape) not in known):
                seen = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"{what} is {seen} for rows of {shape}; give None or one number per token")
        layout = Layout(self.mesh, shape[1], find_documents(mask, position_ids))
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=whole.device)[None]
        changed = {name: layout.shard(whole), "position_ids": layout.shard(position_ids)}
        changed |= {"attention_mask": None, "use_cache": False}
        return (), given | changed | {"sequence_layout": layout, "sequence_local": self._local}

    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        layout = kwargs["sequence_layout"]
        if not layout.num_attended:
            raise UnsupportedDecoder(decoder, "computes attention outside transformers' AttentionInterface")
        if not isinstance(output, ModelOutput):
            raise ValueError(
                "a decoder whose rows are spread over processes returns their layout; pass return_dict=True"
            )
        if output.get("router_logits") is not None:
            raise UnsupportedDecoder(decoder, "returns router_logits, of which every process has a part")
        layout = getattr(output, "sequence_layout", layout)  # dropping leaves another
        output.sequence_layout = layout
        if "sequence_keep" in kwargs:
            output.last_hidden_state = layout.keep(output.last_hidden_state, *kwargs["sequence_keep"])
