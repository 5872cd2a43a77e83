"""What training keeps in memory: losses and MLPs in chunks of tokens, and activations that wait in host memory."""

import inspect
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from hico.compat import UnsupportedDecoder
from hico.llm_dropout.patch import find_decoder
from hico.ops.chunks import map_over_chunks
from hico.train.config import Recipe


def chunk_mlps(model: nn.Module, size: int) -> None:
    """Run the MLP of every layer of an LLM on ``size`` tokens at a time, in training and without.

    What an MLP needs for its backward pass is computed again there, one chunk after the other, so no more than a
    chunk of its wide activations is there at once.

    Args:
        model: holds the decoder; it is changed. Experts choose per token, so a mixture of them works too.
        size: tokens of a chunk.

    Raises:
        UnsupportedDecoder: if a layer has no ``mlp`` of hidden states alone.
    """
    decoder = find_decoder(model)[0]
    for layer in {type(getattr(layer, "mlp", None)): layer for layer in decoder.layers}.values():
        _check_mlp(layer, decoder.config.hidden_size)
    for layer in decoder.layers:
        layer.mlp.forward = partial(_in_chunks, layer.mlp.forward, size)


def _in_chunks(forward: Callable[[Tensor], Tensor], size: int, hidden_states: Tensor) -> Tensor:
    return map_over_chunks(forward, hidden_states, size=size)


@torch.no_grad()
def _check_mlp(layer: nn.Module, width: int) -> None:
    mlp = getattr(layer, "mlp", None)
    taken = [] if mlp is None else [*inspect.signature(mlp.forward).parameters.values()]
    if [parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in taken] != [True]:
        names = "none" if mlp is None else f"one of ({', '.join(parameter.name for parameter in taken)})"
        raise UnsupportedDecoder(layer, f"has no `mlp` of hidden states alone, but {names}; leave mlp_chunk out")
    if any(p.is_meta or not p.numel() for p in layer.parameters()):
        return  # its weights are elsewhere
    some = next(p for p in layer.parameters() if p.is_floating_point())
    result = mlp(torch.zeros(1, 1, width, dtype=some.dtype, device=some.device))
    if not isinstance(result, Tensor):
        raise UnsupportedDecoder(layer, "has an `mlp` that returns more than hidden states; leave mlp_chunk out")


class Offloader:
    """Keep what gradient checkpointing saves of a forward pass in host memory until the backward pass wants it.

    At most two tensors are on their way out before more is computed; and while a layer is computed again, the tensor
    that the next one needs is on its way back. On a CPU, where all memory is the host's, tensors are kept as they are.

    Args:
        copies: moves tensors; `CudaCopies` once there is a tensor on CUDA, if omitted.
        least: numbers of a tensor from which on it is moved.
    """

    def __init__(self, copies: "Copies | None" = None, *, least: int = 1 << 16):
        self._copies, self._least = copies, least
        self._leaving: deque[_Away] = deque()
        self._away: list[weakref.ref[_Away]] = []

    def pack(self, tensor: Tensor) -> Any:
        """Send a tensor away; see `torch.autograd.graph.saved_tensors_hooks`."""
        if self._copies is None and tensor.is_cuda:
            self._copies = CudaCopies()
        if self._copies is None or tensor.numel() < self._least or isinstance(tensor, nn.Parameter):
            return tensor
        while len(self._leaving) >= 2:
            self._copies.wait_until_gone(self._leaving.popleft().copy)
        while self._away and self._away[-1]() is None:  # of a pass that nobody went back through
            self._away.pop()
        away = _Away(self._copies.send(tensor), len(self._away))
        self._away.append(weakref.ref(away))
        self._leaving.append(away)
        return away

    def unpack(self, packed: Any) -> Tensor:
        """Return what `pack` was given, and begin to fetch what was sent before it."""
        if not isinstance(packed, _Away):
            return packed
        tensor = self._copies.fetch(packed.copy)
        # The backward pass goes the other way, so whatever was sent after this one is done with.
        del self._away[packed.place :]
        self._leaving.clear()
        before = self._away[-1]() if self._away else None
        if before is not None:
            self._copies.prefetch(before.copy)
        return tensor


@dataclass(eq=False)
class _Away:
    """A tensor in host memory, the ``place``-th of its forward pass."""

    copy: Any
    place: int


class Copies(Protocol):
    """Moves tensors to host memory and back."""

    def send(self, tensor: Tensor) -> Any:
        """Begin to copy a tensor to the host; return what stands for the copy."""

    def wait_until_gone(self, copy: Any) -> None:
        """Compute nothing more before a tensor has left."""

    def prefetch(self, copy: Any) -> None:
        """Begin to copy a tensor back."""

    def fetch(self, copy: Any) -> Tensor:
        """Return the tensor, for computations that wait until it is there."""


@dataclass(eq=False)
class _Copy:
    host: Tensor
    device: torch.device
    moved: "torch.cuda.Event"
    back: Tensor | None = None


class CudaCopies:
    """Moves tensors over a stream beside the one that computes; see `Copies`."""

    def __init__(self):
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, tensor: Tensor) -> _Copy:
        stream = self._streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            return _Copy(host, tensor.device, stream.record_event())

    def wait_until_gone(self, copy: _Copy) -> None:
        torch.cuda.current_stream(copy.device).wait_event(copy.moved)

    def prefetch(self, copy: _Copy) -> None:
        if copy.back is None:
            with torch.cuda.stream(self._streams[copy.device]):
                copy.back = copy.host.to(copy.device, non_blocking=True)
                copy.moved = self._streams[copy.device].record_event()

    def fetch(self, copy: _Copy) -> Tensor:
        self.prefetch(copy)
        tensor, copy.back = copy.back, None
        current = torch.cuda.current_stream(copy.device)
        current.wait_event(copy.moved)
        tensor.record_stream(current)
        return tensor


class _Offloaded:
    def __init__(self, offloader: Offloader, checkpointing: Callable):
        self._offloader, self._checkpointing = offloader, checkpointing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._offloader.pack, self._offloader.unpack):
            return self._checkpointing(*args, **kwargs)


def offload_activations(model: nn.Module, offloader: Offloader | None = None) -> None:
    """Move what the checkpointed layers of a model save to host memory.

    Args:
        model: with gradient checkpointing switched on; it is changed. Switching that on again undoes it.
        offloader: keeps it.

    Raises:
        ValueError: if no layer is checkpointed.
    """
    offloader, found = offloader or Offloader(), False
    for module in model.modules():
        checkpointing = getattr(module, "_gradient_checkpointing_func", None)
        if checkpointing is None or not getattr(module, "gradient_checkpointing", False):
            continue
        found = True
        if not isinstance(checkpointing, _Offloaded):
            module._gradient_checkpointing_func = _Offloaded(offloader, checkpointing)
    if not found:
        raise ValueError("no layer is checkpointed, so there is nothing to offload; set gradient_checkpointing: true")


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
