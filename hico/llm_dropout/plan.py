"""What one forward pass drops, and what its later layers need to go on with fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hico.compat import (
    UnsupportedDecoder,
    arguments,
    causal_mask,
    find_cache,
    query_scale_start,
    rotary_embeddings,
    sliding_window,
)
from hico.llm_dropout.cache import Held, await_update, check_layers, read_held
from hico.llm_dropout.call import check_given, read_mask, read_positions, read_spans
from hico.llm_dropout.merging import average_into, find_targets
from hico.llm_dropout.policies import DropPolicy
from hico.llm_dropout.queries import IGNORED_LABEL, QUERY_ROWS
from hico.llm_dropout.schedule import DropSchedule
from hico.llm_dropout.scoring import score_tokens
from hico.llm_dropout.survivors import Survivors
from hico.ops.dropping import gather_rows, pack_rows

POSITIONS = ("renumber", "keep")


@dataclass(frozen=True)
class DropRules:
    """The settings of `hico.llm_dropout.patch`, with the policies built."""

    schedule: DropSchedule
    policies: tuple[DropPolicy, ...]
    positions: str
    queries: str
    scope: str
    seed: int


@dataclass
class Segment:
    """Some tokens of the call, as the layers from one stage up to the next see them.

    Args:
        columns_BN: positions of its tokens in the call, -1 at padding; None if it has all of them.
        held: what its cache layers held before the call; None if everything.
        position_ids: ``(B or 1, N)`` without gaps.
        valid_BM: bool, True at real tokens, cached ones first.
        padded: whether there may be a False.
        gather_BN: positions of its tokens in the segment before, -1 at padding; None if nothing was dropped between.
        into_BN: into which token of the segment before each of its tokens is averaged; None if none is.
        scores_BS: scores that the policy saw, by position in the call; None if it asked for none.
        layout: `hico.parallel.Layout` of its tokens, if several processes share them.
        memo: attention masks and rotary embeddings, by kind of layer.
    """

    columns_BN: Tensor | None
    held: Held | None
    position_ids: Tensor
    valid_BM: Tensor
    padded: bool
    gather_BN: Tensor | None = None
    into_BN: Tensor | None = None
    scores_BS: Tensor | None = None
    layout: Any = None
    memo: dict[tuple, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether its layers see what they would see without dropping."""
        return self.columns_BN is None and self.held is None


class DropPlan:
    """The drops of one forward pass of a decoder.

    It travels in the keyword arguments of the layers, decides each stage once, when the stage's layer is first
    reached, and repeats that decision if the layer runs again for gradient checkpointing.

    Args:
        rules: settings.
        decoder: the patched decoder.
        inputs: the call's token ids ``(B, S)`` or embeddings ``(B, S, E)``.
        visual_mask: ``(B, S)``, see `hico.llm_dropout`; None if no token of this call may be dropped.
        labels: ``(B, S)``, or None.
        attention_mask: ``(B, seen + S)``, or None.
        position_ids: ``(B or 1, S)``, or None.
        cache: what the call continues or fills, or None.

    Raises:
        ValueError: if shapes do not fit, or the call cannot be combined with dropping.
    """

    def __init__(
        self,
        rules: DropRules,
        decoder: nn.Module,
        *,
        inputs: Tensor,
        visual_mask: Tensor | None,
        labels: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ):
        self.rules = rules
        self.num_layers_reached, self.saw_cache, self.is_finished = 0, False, False
        self._decoder = decoder
        self._batch, self._length = inputs.shape[:2]
        self._device = inputs.device
        self._num_seen = cache.get_seq_length() if cache is not None else 0
        check_layers(cache)
        scaled_from = query_scale_start(decoder.config)
        if scaled_from is not None and rules.positions == "keep" and self._num_seen + self._length > scaled_from:
            raise UnsupportedDecoder(
                decoder,
                f"scales queries by their position beyond {scaled_from} tokens, which positions='keep' would number "
                "otherwise than their rotary embedding; use positions='renumber'",
            )
        self._is_masked = attention_mask is not None
        self._valid_BM = read_mask(attention_mask, (self._batch, self._num_seen + self._length), self._device)
        self._valid_BS = self._valid_BM[:, self._num_seen :]
        self._layers = [stage.layer for stage in rules.schedule.stages]
        self._held = read_held(cache, self._layers, len(decoder.layers), self._valid_BM)
        self._position_ids = read_positions(
            position_ids,
            self._length,
            self._device,
            num_seen=self._num_seen,
            may_be_packed=cache is None and attention_mask is None,
        )
        self._survivors: Survivors | None = None
        if visual_mask is not None:
            spans_BS, self._answer_BS = read_spans(visual_mask, labels, self._valid_BS)
            self._survivors = Survivors(spans_BS, self._valid_BS, scope=rules.scope, seed=rules.seed)
        self._segments = {-1: self._segment(None, None)}
        self._ranks: dict[int, tuple[Tensor, list[int]]] = {}

    # What callers read

    @property
    def layout(self) -> Any:
        """`hico.parallel.Layout` of what left the last layer; None if one process has all."""
        segment = self._segments.get(self._place(len(self._decoder.layers) - 1))
        return segment and segment.layout

    @property
    def kept_indices(self) -> Tensor:
        """``(B, S')``: which tokens of the call left the last layer, in order; -1 at padding."""
        return self.kept_at(len(self._decoder.layers) - 1)

    def kept_at(self, layer: int) -> Tensor:
        """``(B, N)``: which tokens of the call a layer works on, in order; -1 at padding."""
        segment = self._segments.get(self._place(layer))
        if segment is None or segment.columns_BN is None:
            return torch.arange(self._length, device=self._device).expand(self._batch, -1)
        return segment.columns_BN

    def scores_at(self, layer: int) -> Tensor | None:
        """``(B, S)`` float32: the scores by which tokens were chosen before a layer; None if there are none.

        Tokens that were dropped earlier have score 0.
        """
        segment = self._segments.get(self._place(layer))
        return segment and segment.scores_BS

    def gather(self, values: Tensor, *, fill: float | int | bool = 0) -> Tensor:
        """Shorten something laid out as the call, ``(B, S, ...)``, as the decoder's output is: ``(B, S', ...)``."""
        return gather_rows(values, self.kept_indices, fill=fill)

    def shift_labels(self, labels: Tensor) -> Tensor:
        """Shorten labels ``(B, S)`` and shift them by one: ``(B, S')``, what each kept token should predict."""
        kept = self.kept_indices.to(labels.device)
        shifted = nn.functional.pad(gather_rows(labels, kept, fill=IGNORED_LABEL)[:, 1:], (0, 1), value=IGNORED_LABEL)
        return shifted.masked_fill(kept < 0, IGNORED_LABEL)

    def valid_at(self, layer: int) -> Tensor:
        """``(B, N)`` bool: which tokens that a layer works on are real, and not padding."""
        return gather_rows(self._valid_BS, self.kept_at(layer), fill=False)

    # What the hooks call

    def enter_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, dict]:
        """Prepare the inputs of a layer.

        Args:
            index: of the layer.
            layer: the layer.
            args: what the decoder passes to it by position, first the hidden states ``(B, N, E)``.
            kwargs: what it passes by name.

        Returns:
            Shortened hidden states and matching keyword arguments.
        """
        if not self.is_finished:  # a backward pass may run layers again, one by one
            if index != self.num_layers_reached:
                raise UnsupportedDecoder(self._decoder, "runs its layers in another order than it lists them")
            self.num_layers_reached += 1
        given = arguments(layer.forward, args, kwargs) if len(args) != 1 else kwargs
        hidden_states = args[0] if args else given["hidden_states"]
        given = {name: value for name, value in given.items() if value is not hidden_states}
        _, cache = find_cache(given)
        self.saw_cache |= cache is not None
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            cache = None  # the layer will not fill it
        if index == 0:
            self._segments[-1].layout = given.get("sequence_layout")
        place = self._place(index)
        if place not in self._segments:
            check_given(layer, given)
            self._segments[place] = self._decide(place, layer, hidden_states, given, cache)
        segment = self._segments[place]
        if index in self._layers:
            if segment.into_BN is not None:
                hidden_states = average_into(hidden_states, segment.into_BN)
            if segment.gather_BN is not None:
                hidden_states = self._shorten(place, hidden_states)
            if cache is not None:
                await_update(cache, index, self._holds_next(segment))
        ranks_next = [stage.scoring_layer for stage in self.rules.schedule.stages[place + 1 : place + 2]] == [index]
        if ranks_next and self._survivors is not None and place + 1 not in self._ranks:
            self._ranks[place + 1] = self._rank(segment, index, layer, hidden_states, given, cache)
        if segment.is_whole:
            return hidden_states, given
        mask = None
        if segment.layout is None:
            mask = self._mask(segment, index, hidden_states, cache, required=given["attention_mask"] is not None)
        return hidden_states, self._at_positions(segment, index, hidden_states, given) | {"attention_mask": mask}

    def _shorten(self, place: int, hidden_states: Tensor) -> Tensor:
        segment, layout = self._segments[place], self._segments[place - 1].layout
        if layout is None:
            return gather_rows(hidden_states, segment.gather_BN)
        hidden_states, segment.layout = layout.move(hidden_states, segment.gather_BN)
        return hidden_states

    def finish(self) -> None:
        """Forget masks and rotary embeddings, unless a backward pass may run the layers again."""
        self.is_finished = True
        if not torch.is_grad_enabled():
            for segment in self._segments.values():
                segment.memo.clear()

    # Deciding

    def _decide(
        self, place: int, layer: nn.Module, hidden_states: Tensor, given: dict, cache: Cache | None
    ) -> Segment:
        """Make the segment that starts at a stage."""
        columns_BN = self._segments[place - 1].columns_BN
        segment = self._segment(columns_BN, self._held[place])  # what enters the layer, as its cache numbers it
        segment.layout = self._segments[place - 1].layout
        if self._survivors is None:
            return segment
        stage, policy = self.rules.schedule.stages[place], self.rules.policies[place]
        if policy.merges and segment.layout is not None:
            raise ValueError(
                f"{stage.policy!r} averages tokens of which every process has a part; use 'attention', or switch "
                "sequence parallelism off"
            )
        if policy.needs_scores and place not in self._ranks:
            self._ranks[place] = self._rank(segment, stage.layer, layer, hidden_states, given, cache)
        scores_BS, skip_rows = self._ranks.get(place, (None, []))
        if self._survivors.drop(stage, policy, scores_BS=scores_BS, skip_rows=skip_rows):
            alive_BN = self._of(columns_BN, self._survivors.alive_BS)
            gather_BN = pack_rows(alive_BN, max(self._survivors.num_alive), pad_left=self._survivors.pad_left)
            into_BN = None
            if policy.merges:
                groups_BN = self._of(columns_BN, self._survivors.groups_BS)
                into_BN = find_targets(policy, hidden_states, groups_BN, alive_BN)
            columns_BN = gather_BN if columns_BN is None else gather_rows(columns_BN, gather_BN, fill=-1)
            segment = self._segment(columns_BN, self._held[place])
            segment.gather_BN, segment.into_BN = gather_BN, into_BN
        segment.scores_BS = scores_BS
        return segment

    def _rank(
        self, segment: Segment, index: int, layer: nn.Module, hidden_states: Tensor, given: dict, cache: Cache | None
    ) -> tuple[Tensor, list[int]]:
        """Score the tokens that enter a layer, ``(B, S)`` by their positions in the call; and list rows without query.

        Args:
            segment: the tokens.
            index: of the layer.
            layer: the layer.
            hidden_states: ``(B, N, E)`` entering it.
            given: what the decoder passes to it.
            cache: of the call.
        """
        is_query_BN = self._query_rows(segment.columns_BN)
        num_queries = is_query_BN.sum(1).tolist()
        if not segment.is_whole:
            given = self._at_positions(segment, index, hidden_states, given)
        scores_BN = score_tokens(
            layer,
            hidden_states,
            given,
            pack_rows(is_query_BN, max(num_queries), pad_left=False),
            key_mask_BM=segment.valid_BM,
            past_keys_BGMC=cache.layers[index].keys if self._num_seen else None,
            window=sliding_window(self._decoder.config, index),
            layout=segment.layout,
        ).to(self._device)
        scores_BS = scores_BN
        if segment.columns_BN is not None:
            padding_BN = segment.columns_BN < 0
            scores_BS = scores_BN.new_zeros(self._batch, self._length).scatter_add(
                1, segment.columns_BN.clamp(min=0), scores_BN.masked_fill(padding_BN, 0.0)
            )
        return scores_BS, [row for row, number in enumerate(num_queries) if number == 0]

    def _query_rows(self, columns_BN: Tensor | None) -> Tensor:
        marks = self._valid_BS, self._survivors.groups_BS <= 0, self._answer_BS
        in_segment = [part if part is None else self._of(columns_BN, part) for part in marks]
        return QUERY_ROWS[self.rules.queries](*in_segment)

    # Segments

    def _segment(self, columns_BN: Tensor | None, held: Held | None) -> Segment:
        """Number tokens without gaps behind what the cache holds, and mark the real ones among both."""
        past_BP, padded, position_ids = self._valid_BM[:, : self._num_seen], self._is_masked, self._position_ids
        if held is not None:
            past_BP, padded = held.real_BM, padded or held.padded
            position_ids = position_ids - held.dropped_B[:, None]
        if columns_BN is not None:
            padded |= self._is_padded
            dropped_BS = self._survivors.dropped_BS.int()
            position_ids = gather_rows(position_ids - (dropped_BS.cumsum(1) - dropped_BS), columns_BN)
        valid_BM = torch.cat([past_BP, self._of(columns_BN, self._valid_BS)], 1)
        return Segment(columns_BN, held, position_ids, valid_BM, padded)

    def _holds_next(self, segment: Segment) -> Held | None:
        """Say what the cache layers hold after the call; None if that need not be remembered anew."""
        if segment.columns_BN is None:
            return None
        dropped_B = self._survivors.dropped_BS.sum(1)
        if segment.held is not None:
            dropped_B = dropped_B + segment.held.dropped_B
        return Held(segment.valid_BM, dropped_B, self._num_seen + self._length, segment.padded)

    def _at_positions(self, segment: Segment, index: int, hidden_states: Tensor, given: dict) -> dict:
        """Replace the positions that the decoder hands to a layer by those of a segment."""
        kind, whole = ("rotary", self._kind(index)), given["position_embeddings"]
        if whole is not None and kind not in segment.memo:
            if segment.layout is not None:
                true = self._of(segment.columns_BN, self._position_ids)
                used = segment.position_ids if self.rules.positions == "renumber" else true
                used = segment.layout.shard(used.to(hidden_states.device))
                segment.memo[kind] = rotary_embeddings(self._decoder, hidden_states, used, index)
            elif self.rules.positions == "renumber":
                segment.memo[kind] = rotary_embeddings(self._decoder, hidden_states, segment.position_ids, index)
            elif isinstance(whole, Tensor):
                segment.memo[kind] = self._of(segment.columns_BN, whole)
            else:
                segment.memo[kind] = tuple(self._of(segment.columns_BN, part) for part in whole)
        changed = {"position_ids": segment.position_ids}
        if segment.layout is not None:
            changed = {"position_ids": segment.layout.shard(segment.position_ids), "sequence_layout": segment.layout}
        if whole is not None:  # a layer without rotary embedding is given none
            changed["position_embeddings"] = segment.memo[kind]
        return {name: changed.get(name, value) for name, value in given.items()}

    def _mask(
        self, segment: Segment, index: int, hidden_states: Tensor, cache: Cache | None, *, required: bool
    ) -> Any:
        window = sliding_window(self._decoder.config, index)
        if window is not None and self._num_seen and self._is_padded and window < self._num_seen + self._length:
            raise ValueError(
                f"rows that keep different numbers of tokens would be padded after what the cache holds, and the "
                f"sliding window of {window} of layer {index} would count the padding; give every row alone"
            )
        kind = "mask", window
        if kind not in segment.memo:
            valid_BM = segment.valid_BM if segment.padded else None
            segment.memo[kind] = causal_mask(
                self._decoder.config, hidden_states, valid_BM, cache, index, required=required
            )
        return segment.memo[kind]

    # Facts

    @staticmethod
    def _of(columns_BN: Tensor | None, values: Tensor) -> Tensor:
        """Take from values ``(B or 1, S, ...)`` those of a segment; zero at padding."""
        return values if columns_BN is None else gather_rows(values, columns_BN)

    @property
    def _is_padded(self) -> bool:
        return self._survivors is not None and len(set(self._survivors.num_alive)) > 1

    def _place(self, layer: int) -> int:
        """Return the stage that a layer comes after; -1 before the first."""
        return sum(first <= layer for first in self._layers) - 1

    def _kind(self, layer: int) -> str | None:
        kinds = getattr(self._decoder.config, "layer_types", None)
        return kinds and kinds[layer]
