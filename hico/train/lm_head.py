"""The two halves of a causal LM, decoder and head, and the loss of text by chunks of the second."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast

from hico.compat import UnsupportedDecoder
from hico.configuration_hico import HicoConfig
from hico.llm_dropout.patch import find_decoder
from hico.ops.chunks import sum_over_chunks
from hico.prompt import IGNORE_INDEX

LOSS_CHUNK = 2048
"""Tokens whose logits exist at once in training, if nobody says how many."""


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder of a causal LM, or of a model of hico.

    Raises:
        UnsupportedDecoder: if it holds none that is like those of Llama.
    """
    if sees(model):
        return model.model.language_model
    decoder = model.get_decoder()
    return find_decoder(model)[0] if decoder is model or not isinstance(decoder, PreTrainedModel) else decoder


def sees(model: nn.Module) -> bool:
    """Say whether a model is one of hico, and not an LM alone."""
    return isinstance(model.config, HicoConfig)


def logits_of(model: nn.Module, hidden_BSE: Tensor) -> Tensor:
    """Return the logits of hidden states, as the model's own ``forward`` makes them of its decoder's output.

    LLMs differ in what they do there beside the LM head: some scale logits, some cap them.

    Args:
        model: a causal LM of transformers, or of hico.
        hidden_BSE: what its decoder returned.

    Returns:
        ``(B, S, vocabulary)``.
    """
    if sees(model):
        return model.lm_head(hidden_BSE)
    with _answering(decoder_of(model), hidden_BSE):
        return type(model).forward(model, inputs_embeds=hidden_BSE, use_cache=False).logits


def with_text_loss(model: nn.Module, *, loss_chunk: int | None = None) -> nn.Module:
    """Let a model compute the loss of text by chunks; see `text_forward`. It is changed, and returned."""
    model.forward = MethodType(text_forward, model)
    model.tokens_per_loss_chunk = loss_chunk or getattr(model, "tokens_per_loss_chunk", LOSS_CHUNK)
    return model


def text_forward(
    self: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Stand in for the ``forward`` of a causal LM, or of a model of hico, while it learns text.

    Logits exist for ``tokens_per_loss_chunk`` tokens at a time, and none are returned. All positions go through the LM
    head, learned or not, so that devices that share weights run it equally often.

    Args:
        input_ids: ``(B, S)``.
        labels: ``(B, S)``, -100 where nothing is learned.
        position_ids: ``(B, S)``, if they do not count from 0.
        shift_labels: ``(B, S)`` what every position is to predict, instead of ``labels``.
        num_items_in_batch: what the sum of losses is divided by; the number of learned tokens if omitted.
    """
    if labels is None and shift_labels is None:
        return type(self).forward(self, input_ids=input_ids, position_ids=position_ids, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != IGNORE_INDEX).sum()
    outputs = decoder_of(self)(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    layout = getattr(outputs, "sequence_layout", None)  # of processes that share the rows
    if layout is not None:
        shift_labels = layout.shard(shift_labels, fill=IGNORE_INDEX)

    def chunk_loss(hidden_nE: Tensor, targets_n: Tensor) -> Tensor:
        logits_nV = logits_of(self, hidden_nE[None])[0].float()
        return nn.functional.cross_entropy(logits_nV, targets_n, ignore_index=IGNORE_INDEX, reduction="sum")

    hidden_nE = outputs.last_hidden_state.flatten(0, 1)
    total = sum_over_chunks(chunk_loss, hidden_nE, shift_labels.flatten(), size=self.tokens_per_loss_chunk)
    total = total if layout is None else layout.total(total)
    return CausalLMOutputWithPast(loss=total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1))


@torch.no_grad()
def check_halves(model: nn.Module) -> None:
    """Check on a few tokens that both halves of a model make what the whole does; weights elsewhere are passed over.

    Raises:
        UnsupportedDecoder: if they do not, or the model's own loss has a part that they leave out.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UnsupportedDecoder(
            model,
            "is to learn a loss of its router too; set output_router_logits: false in its config.json",
        )
    if any(parameter.is_meta or not parameter.numel() for parameter in model.parameters()):
        return
    was_training = model.training
    model.eval()
    input_ids = torch.arange(4, 12, device=model.device)[None] % model.config.get_text_config().vocab_size
    hidden_BSE = decoder_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    found, expected = logits_of(model, hidden_BSE), model(input_ids=input_ids, use_cache=False).logits
    model.train(was_training)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise UnsupportedDecoder(model, "makes other logits than those of what its decoder returns")


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class _Hidden(MoeModelOutputWithPast):
    """What a decoder returns, without anything but hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(decoder: nn.Module, hidden_BSE: Tensor) -> Iterator[None]:
    """Let a decoder return hidden states, whatever it is asked, and whatever hooks it has."""
    before = {name: vars(decoder)[name] for name in ("forward", *_HOOKS) if name in vars(decoder)}
    vars(decoder).update({name: OrderedDict() for name in _HOOKS})
    decoder.forward = lambda *args, **kwargs: _Hidden(last_hidden_state=hidden_BSE)
    try:
        yield
    finally:
        del decoder.forward
        vars(decoder).update(before)
