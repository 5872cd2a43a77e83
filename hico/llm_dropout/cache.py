"""Cache layers that remember which tokens they hold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True)
class Held:
    """What a cache layer, and those after it up to the next stage, hold of the full sequence.

    Args:
        columns_BM: positions in the full sequence, -1 at padding.
        dropped_B: tokens of each row that are missing.
        num_seen: length of the full sequence that this describes.
        padded: whether there is a -1.
    """

    columns_BM: Tensor
    dropped_B: Tensor
    num_seen: int
    padded: bool

    def select(self, rows: Tensor) -> Held:
        """Return what other rows hold, as beam search asks."""
        rows = rows.to(self.columns_BM.device)
        return replace(self, columns_BM=self.columns_BM[rows], dropped_B=self.dropped_B[rows])

    def extend(self, num_seen: int) -> Held:
        """Return the same after more tokens came, of which none was dropped."""
        more = torch.arange(self.num_seen, num_seen, device=self.columns_BM.device).expand(len(self.columns_BM), -1)
        return replace(self, columns_BM=torch.cat([self.columns_BM, more], 1), num_seen=num_seen)


class _RemembersTokens:
    """Keep `held` in step with the keys and values when rows move."""

    held: Held | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.held = self.held and self.held.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.held = self.held and self.held.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.held is not None:
            rows = torch.arange(len(self.held.columns_BM)).repeat_interleave(repeats)
            self.held = self.held.select(rows)

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


def check_cache(cache: Cache, stage_layers: Collection[int], num_layers: int) -> None:
    """Check that a cache can go on with a schedule.

    Args:
        cache: empty or filled.
        stage_layers: layers at which the schedule drops.
        num_layers: of the decoder.

    Raises:
        ValueError: if the layers of the cache cannot differ in length.
        RuntimeError: if it was filled with another schedule, or by a call that failed half way.
    """
    for index, layer in enumerate(cache.layers):
        _short_type(cache, layer)
        if getattr(layer, "held", None) is not None and index not in stage_layers:
            raise RuntimeError(
                f"tokens were dropped at layer {index} when the cache was filled, and this schedule drops none there; "
                "continue a cache with the schedule that filled it"
            )
    for index in set(range(1, num_layers)) - set(stage_layers):
        before, length = (cache.get_seq_length(layer) for layer in (index - 1, index))
        if length != before:
            raise RuntimeError(
                f"layer {index} of the cache holds {length} tokens and layer {index - 1} holds {before}; the call "
                "that filled it failed half way: start a new cache"
            )


def read_held(cache: Cache, layer_index: int) -> Held | None:
    """Return what a layer holds of the tokens seen so far, or None if it holds them all.

    Raises:
        RuntimeError: if the layer's length does not fit, as after a call that failed half way, or the cache was cut
            back into a call that dropped tokens.
    """
    num_seen = cache.get_seq_length()
    length = cache.get_seq_length(layer_index)
    held = getattr(cache.layers[layer_index], "held", None) if layer_index < len(cache.layers) else None
    if held is not None and num_seen < held.num_seen:
        raise RuntimeError(
            f"the cache was cut back to {num_seen} tokens, into the {held.num_seen} of a call that dropped some at "
            f"layer {layer_index}; cut off later tokens only, or start a new cache"
        )
    expected = num_seen if held is None else held.columns_BM.shape[1] + num_seen - held.num_seen
    if length != expected:
        raise RuntimeError(
            f"layer {layer_index} of the cache holds {length} tokens and should hold {expected}, since layer 0 holds "
            f"{num_seen}; the call that filled it failed half way, or followed another schedule: start a new cache"
        )
    return held and held.extend(num_seen)


def write_held(cache: Cache, layer_index: int, held: Held) -> None:
    """Let a layer remember what it is about to hold, beside the keys and values that it has.

    Raises:
        ValueError: if the layer cannot differ in length from others.
    """
    while len(cache.layers) <= layer_index:
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[layer_index]
    short_type = _short_type(cache, old)
    layer = short_type.__new__(short_type)
    layer.__dict__.update(old.__dict__)
    layer.held = held
    cache.layers[layer_index] = layer


def _short_type(cache: Cache, layer: object) -> type:
    """Return the type that a cache layer changes to when it remembers what it holds."""
    if type(layer) not in SHORT_LAYERS:
        raise ValueError(
            f"{type(cache).__name__} keeps its layers as {type(layer).__name__}, and dropping visual tokens leaves "
            "layers of different lengths; use a DynamicCache (cache_implementation='dynamic') and a decoder with "
            "attention in every layer"
        )
    return SHORT_LAYERS[type(layer)]
