"""The memory of a training step's activations: a step on tensors without numbers, whose sizes are added up.

Only sizes matter, so a 7B model takes seconds on any machine. On a CPU the sums are those of torch's own profiler.
"""

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from hico.compat import rotary_embeddings, takes_layer_type
from hico.llm_dropout.patch import find_decoder
from hico.train.lm_head import LOSS_CHUNK, with_text_loss
from hico.train.memory import Offloader, chunk_mlps, offload_activations

_ATTENTION = "hico_sizes_only"


@dataclass(frozen=True)
class MemoryKeys:
    """What decides how much a step keeps; see the recipe keys of the same names.

    Args:
        weights: dtype of the weights, and of what passes from layer to layer.
        autocast: compute in bfloat16 all the same, as ``bf16: true`` does.
    """

    loss_chunk: int | None = None
    mlp_chunk: int | None = None
    offload_activations: bool = False
    gradient_checkpointing: bool = True
    weights: torch.dtype = torch.float32
    autocast: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes that the activations of a step take at their most, by the number of tokens.

    Args:
        lines: bytes of no token and of every further one, in each phase of a step; the phase with most decides.
    """

    lines: tuple[tuple[float, float], ...]

    def at(self, num_tokens: int) -> float:
        """Return the bytes of a sequence."""
        return max(base + slope * num_tokens for base, slope in self.lines)

    def longest(self, room: float) -> int:
        """Return the tokens of the longest sequence that fits into so many bytes, rounded down to thousands."""
        return max(0, int(min((room - base) / slope for base, slope in self.lines)) // 1000 * 1000)


def footprint(config: PreTrainedConfig, keys: MemoryKeys) -> Footprint:
    """Count what a training step of a causal LM keeps beside weights, gradients and the optimizer's state.

    It is most while losses are computed, or while the layers' backward pass runs. Each grows with layers and tokens in
    a straight line, so few of them tell it for all. Attention is counted as one that keeps no scores, like flash
    attention.

    Args:
        config: of the LLM.
        keys: see `MemoryKeys`.

    Raises:
        ValueError: if the decoder is not built like Llama's.
    """
    # So long that what grows with it is most of it.
    length, few, many = 12 * max(keys.loss_chunk or LOSS_CHUNK, keys.mlp_chunk or 0), 2, 3
    lines = []
    # Meta tensors know no autocast, and fake ones take several times as long.
    with FakeTensorMode() if keys.autocast else torch.device("meta"):
        step = _Step(config, keys)
        few, many = (min(count, len(step.layers)) for count in (few, many))
        for with_loss in (False, True):
            peaks = {
                (layers, tokens): step.peak(layers, tokens, with_loss=with_loss)
                for layers in {few, many}
                for tokens in (length, 2 * length)
            }
            thin, thick = ((peaks[layers, 2 * length] - peaks[layers, length]) / length for layers in (few, many))
            per_layer = (thick - thin) / (many - few) if many > few else 0.0
            slope = thick + per_layer * (len(step.layers) - many)
            lines.append((peaks[many, length] - thick * length, slope))
    return Footprint(tuple(lines))


class _Step:
    """A causal LM without numbers, and steps on its first layers."""

    def __init__(self, config: PreTrainedConfig, keys: MemoryKeys):
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=_ATTENTION, dtype=keys.weights).train()
        self.model, self.decoder, self.autocast = model, find_decoder(model)[0], keys.autocast
        self.layers = list(self.decoder.layers)
        if not hasattr(self.decoder, "norm") or not hasattr(self.decoder, "embed_tokens"):
            raise ValueError(
                f"the activations of {type(model).__name__} cannot be counted: it is not built like Llama"
            )
        self.decoder.forward = MethodType(_decode, self.decoder)
        with_text_loss(model, loss_chunk=keys.loss_chunk)
        if keys.mlp_chunk:
            chunk_mlps(model, keys.mlp_chunk)
        if keys.gradient_checkpointing:
            # Its name before transformers 5.24; drop it when only newer ones are supported.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if keys.offload_activations:
            offload_activations(model, Offloader(_Elsewhere()))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def peak(self, num_layers: int, length: int, *, with_loss: bool) -> float:
        """Return the most bytes of a step through the first layers, up to the loss or without."""
        self.decoder.layers = nn.ModuleList(self.layers[:num_layers])
        input_ids = torch.zeros(1, length, dtype=torch.long)
        there = [*self.model.parameters(), *(parameter.grad for parameter in self.model.parameters())]
        with _Sizes(there) as sizes:
            with ExitStack() as casting:
                if self.autocast:
                    casting.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
                if with_loss:
                    loss = self.model(input_ids=input_ids, labels=input_ids).loss
                else:
                    loss = _Nothing.apply(self.decoder(input_ids).last_hidden_state)
            loss.backward()
        return sizes.peak


class _Sizes(TorchDispatchMode):
    """Add up the bytes of all tensors that are alive, but for those that were ``there`` before."""

    def __init__(self, there: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in there)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


class _Elsewhere:
    """Copies in a memory that is not counted; see `hico.train.memory.Copies`."""

    def send(self, tensor: Tensor) -> tuple:
        return tensor.shape, tensor.dtype, tensor.device

    def wait_until_gone(self, copy: tuple) -> None:
        pass

    def prefetch(self, copy: tuple) -> None:
        pass

    def fetch(self, copy: tuple) -> Tensor:
        shape, dtype, device = copy
        return torch.empty(shape, dtype=dtype, device=device)


class _KeepsNoScores(torch.autograd.Function):
    """What flash attention saves, without what it computes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty([query.shape[axis] for axis in (0, 2, 1, 3)])  # laid out as the next layer wants it
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Nothing(torch.autograd.Function):
    """A loss that has a gradient, and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape = hidden.shape
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_zeros(ctx.shape)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple:
    return _KeepsNoScores.apply(query, key, value), None


def _decode(self: nn.Module, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
    """Run the layers of a decoder without what it looks up in numbers: masks and borders of packed rows."""
    hidden_BSE = self.embed_tokens(input_ids)
    position_ids = torch.arange(hidden_BSE.shape[1])[None]
    types = getattr(self.config, "layer_types", None) if takes_layer_type(self.rotary_emb) else None
    made: dict[Any, Any] = {}  # one for all layers of a type, as the decoder's own forward makes them
    for number, layer in enumerate(self.layers):
        kind = types and types[number]
        if kind not in made:
            made[kind] = rotary_embeddings(self, hidden_BSE, position_ids, number)
        output = layer(hidden_BSE, attention_mask=None, position_ids=position_ids, position_embeddings=made[kind])
        hidden_BSE = output[0] if isinstance(output, tuple) else output
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BSE))
