"""Cache layers that remember which tokens they hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True)
class Held:
    """What a cache layer, and those after it up to the next stage, hold of the tokens seen so far.

    Args:
        real_BM: bool, one for each cached token: False where a row is padded.
        dropped_B: tokens of each row that are missing.
        num_seen: tokens seen so far, dropped and padded ones included.
        padded: whether there may be a False.
    """

    real_BM: Tensor
    dropped_B: Tensor
    num_seen: int
    padded: bool

    def select(self, rows: Tensor) -> Held:
        """Return what other rows hold, as beam search asks."""
        rows = rows.to(self.real_BM.device)
        return replace(self, real_BM=self.real_BM[rows], dropped_B=self.dropped_B[rows])

    def extend(self, real_BN: Tensor) -> Held:
        """Return the same after more tokens came, of which none was dropped."""
        return replace(self, real_BM=torch.cat([self.real_BM, real_BN], 1), num_seen=self.num_seen + real_BN.shape[1])


class _RemembersTokens:
    """Keep `held` in step with the keys and values when rows move, and be filled by a patched decoder only."""

    held: Held | None = None
    awaits_update = False

    def update(self, key_states: Tensor, *args, **kwargs):
        if self.held is not None and not self.awaits_update:
            raise RuntimeError(
                "tokens were dropped when this cache was filled, and the model that continues it drops none; continue "
                "with the schedule that filled it, or start a new cache"
            )
        self.awaits_update = False
        return super().update(key_states, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.held = self.held and self.held.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.held = self.held and self.held.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.held is not None:
            self.held = self.held.select(torch.arange(len(self.held.real_BM)).repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()
        if self.get_seq_length() == 0:  # transformers 5.17 zeroes dynamic layers and keeps their length
            self.held = None


class ShortLayer(_RemembersTokens, DynamicLayer):
    """A dynamic cache layer that holds fewer tokens than layer 0."""


class ShortSlidingLayer(_RemembersTokens, DynamicSlidingWindowLayer):
    """A sliding window over fewer tokens than layer 0 has seen."""


SHORT_LAYERS: dict[type, type] = {
    DynamicLayer: ShortLayer,
    ShortLayer: ShortLayer,
    DynamicSlidingWindowLayer: ShortSlidingLayer,
    ShortSlidingLayer: ShortSlidingLayer,
}


def holds_less(cache: Cache | None) -> bool:
    """Whether a layer of a cache remembers that it holds fewer tokens than layer 0."""
    return cache is not None and any(getattr(layer, "held", None) is not None for layer in cache.layers)


def check_layers(cache: Cache | None) -> None:
    """Raise ``ValueError`` if the layers of a cache cannot differ in length."""
    for layer in [] if cache is None else cache.layers:
        _short_type(cache, layer)


def read_held(cache: Cache | None, stage_layers: list[int], num_layers: int, valid_BM: Tensor) -> list[Held | None]:
    """Read what the layers hold at which a schedule drops.

    Args:
        cache: empty or filled, or None.
        stage_layers: those layers.
        num_layers: of the decoder.
        valid_BM: bool ``(B, seen + S)``, False at padding.

    Returns:
        One entry per stage; None where all tokens are held.

    Raises:
        RuntimeError: if the cache was filled by another schedule or by a call that failed half way, or was cut back
            into a call that dropped tokens.
    """
    if cache is None:
        return [None] * len(stage_layers)
    num_seen, found = cache.get_seq_length(), []
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "held", None) is not None and index not in stage_layers:
            raise RuntimeError(
                f"tokens were dropped at layer {index} when the cache was filled, and this schedule drops none there; "
                "continue a cache with the schedule that filled it"
            )
    expected = num_seen
    for index in range(num_layers):
        if index in stage_layers:
            held = getattr(cache.layers[index], "held", None) if index < len(cache.layers) else None
            if held is not None and num_seen < held.num_seen:
                raise RuntimeError(
                    f"the cache was cut back to {num_seen} tokens, into the {held.num_seen} of a call that dropped "
                    f"some at layer {index}; cut off later tokens only, or start a new cache"
                )
            if held is not None:
                held = held.extend(valid_BM[:, held.num_seen : num_seen].to(held.real_BM.device))
            expected = num_seen if held is None else held.real_BM.shape[1]
            found.append(held)
        if cache.get_seq_length(index) != expected:
            raise RuntimeError(
                f"layer {index} of the cache holds {cache.get_seq_length(index)} tokens and should hold {expected}, "
                f"since layer 0 holds {num_seen}; the call that filled it failed half way, or followed another "
                "schedule: start a new cache"
            )
    return found


def await_update(cache: Cache, layer_index: int, held: Held | None) -> None:
    """Let a layer take the keys and values of one call, and remember what it will hold then if that is less.

    Args:
        cache: of the call.
        layer_index: where a schedule drops.
        held: what the layer and its followers hold after the call; None to leave it as it is.
    """
    while len(cache.layers) <= layer_index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_index]
    if held is not None:
        short_type = _short_type(cache, layer)
        short = short_type.__new__(short_type)
        short.__dict__ |= layer.__dict__ | {"held": held}
        cache.layers[layer_index] = layer = short
    layer.awaits_update = True


def _short_type(cache: Cache, layer: object) -> type:
    """Return the type that a cache layer changes to when it remembers what it holds."""
    if type(layer) not in SHORT_LAYERS:
        raise ValueError(
            f"{type(cache).__name__} keeps its layers as {type(layer).__name__}, and dropping visual tokens leaves "
            "layers of different lengths; use a DynamicCache (cache_implementation='dynamic') and a decoder with "
            "attention in every layer"
        )
    return SHORT_LAYERS[type(layer)]
