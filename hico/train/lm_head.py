"""The two halves of a causal LM: its decoder, and what it makes of the decoder's output."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from hico.configuration_hico import HicoConfig


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder of a causal LM, or of a model of hico."""
    return model.model.language_model if sees(model) else model.get_decoder()


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


@contextmanager
def _answering(decoder: nn.Module, hidden_BSE: Tensor) -> Iterator[None]:
    """Let a decoder return hidden states, whatever it is asked."""
    before = vars(decoder).get("forward")
    decoder.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=hidden_BSE)
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before
