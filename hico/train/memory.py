"""What training keeps in memory: losses and MLPs in chunks of tokens, and activations that wait in host memory."""

import inspect
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from hico.llm_dropout.patch import find_decoder
from hico.ops.chunks import map_over_chunks
from hico.train.config import Recipe

_WORTH_MOVING = 1 << 16
"""Numbers of a tensor from which on it is moved to host memory."""


def chunk_mlps(model: nn.Module, size: int) -> None:
    """Run the MLP of every layer of an LLM on ``size`` tokens at a time, in training and without.

    What an MLP needs for its backward pass is computed again there, one chunk after the other, so no more than a
    chunk of its wide activations is there at once.

    Args:
        model: holds the decoder; it is changed. Experts choose per token, so a mixture of them works too.
        size: tokens of a chunk.

    Raises:
        ValueError: if a layer has no ``mlp`` that takes and returns hidden states alone.
    """
    for layer in find_decoder(model)[0].layers:
        mlp = getattr(layer, "mlp", None)
        taken = [] if mlp is None else [*inspect.signature(mlp.forward).parameters.values()]
        needed = [p for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(needed) != 1:
            raise ValueError(
                f"mlp_chunk needs layers with an `mlp` of hidden states alone; {type(layer).__name__} has "
                f"{'none' if mlp is None else ', '.join(p.name for p in needed)}; leave mlp_chunk out"
            )
        mlp.forward = partial(_in_chunks, mlp.forward, size)


def _in_chunks(forward: Callable[[Tensor], Tensor], size: int, hidden: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    return map_over_chunks(lambda part: forward(part, *rest, **kwargs), hidden, size=size)


class Offloader:
    """Keep what gradient checkpointing saves of a forward pass in host memory until the backward pass wants it.

    On CUDA, copies run on a stream of their own, beside the layers: at most two tensors are on their way out, and
    while a layer is computed again, the tensor that the next one needs is on its way back. On a CPU, where all memory
    is the host's, tensors are kept as they are.
    """

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None
        self._leaving: deque[torch.cuda.Event] = deque()
        self._away: list[weakref.ref[_Away]] = []

    def around(self, checkpointing: Callable) -> Callable:
        """Return a function that checkpoints a layer as the given one does, with what it saves moved out."""
        return _Offloaded(self, checkpointing)

    def pack(self, tensor: Tensor) -> Any:
        """Send a tensor away; see `torch.autograd.graph.saved_tensors_hooks`."""
        moves = tensor.is_cuda and tensor.numel() >= _WORTH_MOVING and not isinstance(tensor, nn.Parameter)
        if not moves:
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        while len(self._leaving) >= 2:
            # Nothing new is computed before the tensor before the last has left, so that its memory is free.
            torch.cuda.current_stream(tensor.device).wait_event(self._leaving.popleft())
        while self._away and self._away[-1]() is None:  # of a pass that nobody went back through
            self._away.pop()
        away = _Away(tensor, self._stream, len(self._away))
        self._away.append(weakref.ref(away))
        self._leaving.append(away.moved)
        return away

    def unpack(self, packed: Any) -> Tensor:
        """Return what `pack` was given, and begin to fetch what was sent before it."""
        if not isinstance(packed, _Away):
            return packed
        tensor = packed.back(self._stream)
        # The backward pass goes the other way, so whatever was sent after this one is done with.
        del self._away[packed.place :]
        self._leaving.clear()
        before = self._away[-1]() if self._away else None
        if before is not None:
            before.fetch(self._stream)
        return tensor


class _Away:
    """A tensor in host memory."""

    def __init__(self, tensor: Tensor, stream: "torch.cuda.Stream", place: int):
        self.place, self.device = place, tensor.device
        self._here: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._there.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            self.moved = stream.record_event()

    def fetch(self, stream: "torch.cuda.Stream") -> None:
        """Begin to copy the tensor back."""
        if self._here is None:
            with torch.cuda.stream(stream):
                self._here = self._there.to(self.device, non_blocking=True)
                self.moved = stream.record_event()

    def back(self, stream: "torch.cuda.Stream") -> Tensor:
        """Return the tensor on its device, once it is there."""
        self.fetch(stream)
        here, self._here = self._here, None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.moved)
        here.record_stream(current)
        return here


class _Offloaded:
    def __init__(self, offloader: Offloader, checkpointing: Callable):
        self._offloader, self._checkpointing = offloader, checkpointing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._offloader.pack, self._offloader.unpack):
            return self._checkpointing(*args, **kwargs)


def offload_activations(model: nn.Module) -> Offloader:
    """Move what the checkpointed layers of a model save to host memory.

    Args:
        model: with gradient checkpointing switched on; it is changed. Switching that on again undoes it.

    Raises:
        ValueError: if no layer is checkpointed.
    """
    offloader, found = Offloader(), False
    for module in model.modules():
        checkpointing = getattr(module, "_gradient_checkpointing_func", None)
        if checkpointing is None or not getattr(module, "gradient_checkpointing", False):
            continue
        found = True
        if not isinstance(checkpointing, _Offloaded):
            module._gradient_checkpointing_func = offloader.around(checkpointing)
    if not found:
        raise ValueError("no layer is checkpointed, so there is nothing to offload; set gradient_checkpointing: true")
    return offloader


def save_memory(model: nn.Module, recipe: Recipe) -> None:
    """Set up what a recipe says of losses and MLPs in chunks.

    Args:
        model: a causal LM of transformers, or of hico, without adapters; it is changed.
        recipe: of the stage.

    Raises:
        ValueError: if the LLM has no MLPs that can be cut, or devices that share weights would make other cuts.
    """
    # Under ZeRO-3 devices gather weights together, so all must make as many chunks. Packed text is of one length.
    given = [key for key in ("loss_chunk", "mlp_chunk") if getattr(recipe, key)]
    if given and recipe.objective != "text" and is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{' and '.join(given)} cannot be combined with ZeRO-3 where rows differ in length: devices gather "
            "weights together, and would wait for each other; leave it out, or use ZeRO-2 or FSDP2"
        )
    if recipe.loss_chunk:
        model.tokens_per_loss_chunk = recipe.loss_chunk
    if recipe.mlp_chunk:
        chunk_mlps(model, recipe.mlp_chunk)


class OffloadActivations(TrainerCallback):
    """Offload once the trainer has switched gradient checkpointing on."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        offload_activations(model)
