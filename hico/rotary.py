"""Rotary frequencies that stay float32 whatever the model's dtype."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def keep_rotary_in_float32(model: nn.Module) -> None:
    """Keep the frequencies of every rotary embedding in a model in float32, now and from now on.

    ``model.to(torch.bfloat16)`` casts the ``inv_freq`` buffers of stock transformers too, and at position 10,000 the
    angles are then off by up to a turn. Frequencies that were cast already are computed anew. Devices still follow the
    model. Calling it twice changes nothing.

    Args:
        model: any module; its rotary embeddings are the modules with a buffer ``inv_freq``.
    """
    for module in model.modules():
        if "inv_freq" in module._buffers and "_apply" not in vars(module):
            if module.inv_freq.dtype != torch.float32:
                _recompute(module)
            module._apply = partial(_apply_keeping_float32, module)  # unlike a bound method, this can be pickled


def _recompute(rotary: nn.Module) -> None:
    """Replace the buffers of a rotary embedding by those that its config gives."""
    fresh = type(rotary)(rotary.config)
    for name, buffer in fresh.named_buffers(recurse=False):
        setattr(rotary, name, buffer.to(rotary.inv_freq.device))


def _apply_keeping_float32(rotary: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Stand in for ``nn.Module._apply``, by which ``to``, ``half`` and their like move and cast tensors."""
    before = dict(rotary.named_buffers(recurse=False))
    type(rotary)._apply(rotary, fn, recurse)
    for name, old in before.items():
        new = rotary._buffers[name]
        if new.dtype != old.dtype:
            # From the meta device there are no values to keep, only the dtype.
            rotary._buffers[name] = torch.empty_like(new, dtype=old.dtype) if old.is_meta else old.to(new.device)
    return rotary
