"""Everything that leans on names or behaviour of transformers' insides, and refuses where it does not find them.

Checked on transformers 5.17 to 5.24. Each part says what it takes for granted; a part whose ground is gone raises
`UnsupportedDecoder`, which names the version, and never goes on.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAME = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
"""How outputs and arguments call the cache: ``past_key_values`` until 5.23, ``cache`` from 5.24 on."""

CAUSAL_LAYERS = ("full_attention", "sliding_attention")
"""Types of layers, as ``config.layer_types`` names them, in which a token sees what stands before it."""

LAYER_ARGUMENTS = {
    *("hidden_states", "attention_mask", "position_ids", "position_embeddings"),
    *("cache", "past_key_values", "layer_past", "use_cache", "output_attentions", "kwargs"),
}
"""What the layers of a decoder may be given; whatever else a layer names in its ``forward``, nobody would shorten."""

_CAPTURE = "hico_capture"
_ATTENTION_ARGUMENTS = {
    *("dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal"),
    *("use_cache", "output_attentions"),
}
"""What an attention function may be given beside query, key, value, mask and what its layer was given."""


class UnsupportedDecoder(ValueError):
    """A decoder does not do what dropping visual tokens builds on.

    Args:
        owner: the module, or its class.
        reason: what is in the way, as the end of a sentence that begins with its name.
    """

    def __init__(self, owner: nn.Module | type, reason: str):
        name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        super().__init__(f"{name} of transformers {transformers.__version__} {reason}")


# Calls


def arguments(function: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name all arguments of a call, those behind ``**kwargs`` too."""
    signature = inspect.signature(function)
    bound = signature.bind_partial(*args, **kwargs).arguments
    rest = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    return {**bound, **bound.pop(rest, {})} if rest in bound else dict(bound)


def find_cache(values: dict[str, Any]) -> tuple[str | None, Cache | None]:
    """Find the cache among named values by its type, since its name changes; ``(None, None)`` if there is none."""
    return next(((name, value) for name, value in values.items() if isinstance(value, Cache)), (None, None))


def cache_argument(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache]:
    """Name a cache that was given under its new or its old name as the installed decoders do; empty for None.

    To be deleted when 5.24 is the oldest version supported: then ``cache`` is the name, and the old one an error.

    Raises:
        ValueError: if both are given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("got both cache and past_key_values, which are two names of one argument; give one of them")
    given = past_key_values if cache is None else cache
    return {} if given is None else {CACHE_NAME: given}


def require(owner: type, *names: str) -> None:
    """Check that a class still has the methods that we override: without one, ours would never be called.

    Raises:
        RuntimeError: naming the class, the methods and the version.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"{owner.__name__} of transformers {transformers.__version__} has no {', '.join(missing)}, "
            "which hico overrides; install a version that docs/versions.md names"
        )


def save_under_own_names(model: nn.Module) -> None:
    """Make ``save_pretrained`` write a model's own names, where transformers 5 writes those that it was loaded from.

    Raises:
        RuntimeError: if transformers keeps the names elsewhere, and would write them without a word.
    """
    if not hasattr(model, "_weight_conversions"):
        raise RuntimeError(
            f"transformers {transformers.__version__} does not keep the loaded names in _weight_conversions; "
            "install a version that docs/versions.md names"
        )
    model._weight_conversions = None


def replace_loss_function(model: nn.Module, function: Callable) -> Callable[[], None]:
    """Let a causal LM compute its loss by another function; return what undoes it."""
    before = dict(vars(model))
    model.loss_function = function  # a property, which stores it under a name of its own
    changed = [name for name, value in vars(model).items() if before.get(name) is not value]
    return partial(_restore, model, changed, {name: before[name] for name in changed if name in before})


def _restore(model: nn.Module, changed: list[str], before: dict[str, Any]) -> None:
    """Undo for a model, or for its copy: a partial is copied with its model, where a closure would keep the first."""
    for name in changed:
        if name in before:
            vars(model)[name] = before[name]
        else:
            delattr(model, name)


def causal_mask(
    config: Any, hidden_states: Tensor, valid: Tensor | None, cache: Cache | None, layer: int, *, required: bool
) -> Any:
    """Make the attention mask of a layer, in the form that the decoder's attention takes.

    Args:
        config: of the decoder.
        hidden_states: ``(B, N, E)`` entering the layer.
        valid: bool ``(B, past + N)``, False at padding; None if there is none.
        cache: that the layer continues, or None.
        layer: its index.
        required: whether the layer must have one even where its attention function knows causality itself, since it
            adds to it, as Doge's does.
    """
    create = create_causal_mask if sliding_window(config, layer) is None else create_sliding_window_causal_mask
    given = {"inputs_embeds": hidden_states, "attention_mask": valid, CACHE_NAME: cache, "layer_idx": layer}
    return create(config=config, allow_is_causal_skip=not required, **given)


# Decoders


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what `torch.compile` or torch's activation checkpointing wrapped, or the module itself."""
    for name in ("_checkpoint_wrapped_module", "_orig_mod"):
        module = getattr(module, name, module)
    return module


def sliding_window(config: Any, layer: int) -> int | None:
    """Say how many tokens a layer sees at most; None if all before it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def query_scale_start(config: Any) -> int | None:
    """Say after how many tokens queries are scaled by their position, as Ministral 3's are; None if they never are."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") if rope.get("llama_4_scaling_beta") else None


def check_decoder(decoder: nn.Module) -> None:
    """Check that every layer is causal attention, and keeps nothing but keys and values.

    Raises:
        UnsupportedDecoder: naming what is in the way.
    """
    config, num_layers = decoder.config, len(decoder.layers)
    for layer_type in {type(unwrapped(layer)) for layer in decoder.layers}:
        names = set(inspect.signature(layer_type.forward).parameters) - {"self"}
        if others := sorted(names - LAYER_ARGUMENTS):
            raise UnsupportedDecoder(layer_type, f"takes {', '.join(others)}, which dropping does not know to shorten")
        if missing := sorted({"hidden_states", "attention_mask", "position_embeddings"} - names):
            raise UnsupportedDecoder(layer_type, f"does not take {', '.join(missing)}, which dropping has to change")
    parts = [config, *(module for layer in decoder.layers for module in layer.modules())]
    if any(getattr(part, "is_causal", None) is False for part in parts):
        raise UnsupportedDecoder(decoder, "lets tokens attend to those after them")
    makers = [vars(sys.modules[owner.__module__]).values() for owner in type(decoder).__mro__]
    slides = any(create_sliding_window_causal_mask in names for names in makers)
    if not slides and any(sliding_window(config, layer) is not None for layer in range(num_layers)):
        raise UnsupportedDecoder(
            decoder,
            f"has a sliding window of {config.sliding_window} in its configuration, by which its cache is cut and its "
            "attention is not; set config.sliding_window = None",
        )
    takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(decoder.forward).parameters.values())
    if not takes_kwargs:
        raise UnsupportedDecoder(
            decoder, "takes no further keyword arguments, which carry what is dropped to its layers"
        )
    kinds = getattr(config, "layer_types", None)
    others = sorted({kind for kind in kinds or () if kind not in CAUSAL_LAYERS})
    if others:
        raise UnsupportedDecoder(
            decoder, f"has layers of type {', '.join(others)}; known are {', '.join(CAUSAL_LAYERS)}"
        )
    stateful = getattr(decoder, "_is_stateful", False)
    cache_layers = DynamicCache(config=config).layers
    odd = sorted({type(layer).__name__ for layer in cache_layers if not hasattr(layer, "is_sliding")})
    if stateful or odd:
        raise UnsupportedDecoder(
            decoder, f"keeps more than keys and values between calls ({', '.join(odd) or 'a state'})"
        )
    if cache_layers and len(cache_layers) != num_layers:
        raise UnsupportedDecoder(decoder, f"has {num_layers} layers and keeps keys of {len(cache_layers)}")


def takes_layer_type(rotary: nn.Module) -> bool:
    """Whether a rotary embedding differs between types of layers, as Gemma 3's does."""
    return "layer_type" in inspect.signature(rotary.forward).parameters


def rotary_embeddings(decoder: nn.Module, hidden_states: Tensor, position_ids: Tensor, layer: int) -> Any:
    """Compute what a layer multiplies queries and keys by at other positions."""
    rotary = decoder.rotary_emb
    kind = {"layer_type": decoder.config.layer_types[layer]} if takes_layer_type(rotary) else {}
    sections = (getattr(decoder.config, "rope_parameters", None) or {}).get("mrope_section")
    if sections is not None:  # in 5.17 such embeddings take one position for each axis alone
        position_ids = position_ids.expand(len(sections), *position_ids.shape)
    return rotary(hidden_states, position_ids=position_ids, **kind)


# Attention of a layer


@dataclass
class AttentionCall:
    """What a decoder layer hands to its attention function.

    Args:
        query: ``(B, A, N, C)``, rotated and normalised as the layer does it.
        key: ``(B, G, N, C)``.
        scaling: factor of the logits.
        softcap: bound of the logits, or None.
        sinks: ``(A,)`` logits that take part in the softmax and belong to no token, or None.
        group: processes that share the heads by tensor parallelism; None if all are here.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    group: ProcessGroup | None = None


class _Reached(Exception):
    """Ends a layer's forward where its attention function would begin."""


def attention_call(
    layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any], *, window: int | None
) -> AttentionCall:
    """Run a layer up to its attention, and say what it would attend with.

    The layer's own ``forward`` does it, with norms, projections and rotary embedding as it has them, on a shallow copy
    whose config names an attention function that stops there. The layer, its cache and its hooks stay untouched.

    Args:
        layer: of a decoder whose attention goes through `transformers.AttentionInterface`.
        hidden_states: ``(B, N, E)`` entering it.
        kwargs: what the decoder passes to it; mask and cache are left out.
        window: how many tokens the layer is known to see; all if None.

    Raises:
        UnsupportedDecoder: if attention is computed elsewhere, or with something beside what `AttentionCall` holds.
    """
    from transformers import AttentionInterface  # loads what may still be loading when this module is

    AttentionInterface.register(_CAPTURE, _stop)
    given = {name: value for name, value in kwargs.items() if not isinstance(value, Cache)} | {"attention_mask": None}
    for part in layer.modules():
        if hasattr(part, "unshard"):  # by FSDP2, apart from its layer; gathered now, and let go when the layer has run
            part.unshard()
    try:
        _stopping_copy(layer).forward(hidden_states, **given)
    except _Reached as reached:
        module, query, key, mask, rest = reached.args
    else:
        raise UnsupportedDecoder(layer, "computes attention outside transformers' AttentionInterface; use 'uniform'")
    unknown = [
        name
        for name, value in rest.items()
        if value is not None and name not in _ATTENTION_ARGUMENTS and name not in given
    ]
    if mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise UnsupportedDecoder(layer, f"attends by {', '.join(unknown)} too, which scores would miss; use 'uniform'")
    if rest.get("is_causal") is False:
        raise UnsupportedDecoder(layer, "lets tokens attend to those after them")
    if rest.get("sliding_window", window) != window:
        raise UnsupportedDecoder(layer, f"sees {rest['sliding_window']} tokens where its config says {window}")
    scaling = rest.get("scaling")
    return AttentionCall(
        query,
        key,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        rest.get("softcap"),
        rest.get("s_aux"),
        _tensor_parallel_group(module),
    )


def _stop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any):
    raise _Reached(module, query, key, attention_mask, kwargs)


def _stopping_copy(module: nn.Module) -> nn.Module:
    """Copy the modules that hold a config, and those around them; parameters and all other modules are shared.

    Hooks of the copied ones are left out, but for accelerate's, which stand in for ``forward`` and move tensors.
    """
    module = unwrapped(module)
    children = {name: child if child is None else _stopping_copy(child) for name, child in module._modules.items()}
    has_config = hasattr(vars(module).get("config"), "_attn_implementation")
    if not has_config and all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = object.__new__(type(module))  # what FSDP makes of a class has a `__new__` of its own
    twin.__dict__.update(module.__dict__)
    twin.__dict__ |= {"_modules": children, "_parameters": dict(module._parameters), "_compiled_call_impl": None}
    twin.__dict__ |= {name: type(hooks)() for name, hooks in vars(module).items() if name.endswith("_hooks")}
    for name, value in list(vars(twin).items()):
        if isinstance(value, MethodType) and value.__self__ is module:
            twin.__dict__[name] = MethodType(value.__func__, twin)
        elif isinstance(value, partial) and any(a is module for a in value.args):
            twin.__dict__[name] = partial(
                value.func, *(twin if a is module else a for a in value.args), **value.keywords
            )
    if has_config:
        twin.config = copy.deepcopy(module.config)
        twin.config._attn_implementation = _CAPTURE
    return twin


def _tensor_parallel_group(attention: nn.Module) -> ProcessGroup | None:
    """Find the processes over which the heads of an attention module are sharded (transformers' ``tp_plan``)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    for parameter in attention.parameters():
        if isinstance(parameter, DTensor) and any(placement.is_shard() for placement in parameter.placements):
            mesh = parameter.device_mesh
            return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    return None


def vision_attentions(model: nn.Module) -> list[nn.Module]:
    """List the self-attentions of a vision model of transformers, in order of its layers.

    Taken for granted: each has the projections ``q_proj`` and ``k_proj``, all heads side by side, and is given what it
    projects first or as ``hidden_states``. Empty if there are no such modules, which is an encoder without attention.
    """
    return [module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "k_proj")]
