"""What one forward pass drops, and what its later layers need to go on with fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from hico.llm_dropout.base import DropPolicy
from hico.llm_dropout.cache import Held, check_cache, read_held, write_held
from hico.llm_dropout.queries import IGNORED_LABEL, QUERY_ROWS
from hico.llm_dropout.schedule import DropSchedule
from hico.llm_dropout.scoring import score_tokens
from hico.llm_dropout.survivors import Survivors
from hico.ops.dropping import gather_rows, pack_rows, span_ids

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
    """What the layers from one stage up to the next work on.

    Args:
        columns_BN: positions of its tokens in the call, -1 at padding; None if it has all of them.
        held: what its cache layers held before the call; None if everything.
        position_ids: ``(B or 1, N)`` without gaps, for the layers.
        position_embeddings: cosines and sines, ``(B or 1, N, C)``.
        gather_BN: positions of its tokens in the segment before, -1 at padding; None if nothing was dropped between.
        scores_BS: scores that the policy saw, by position in the call; None if it asked for none.
        mask_BK: bool, True at real tokens, cached ones first; None if all are.
        masks: attention masks of its layers, by whether they slide.
    """

    columns_BN: Tensor | None
    held: Held | None
    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    gather_BN: Tensor | None = None
    scores_BS: Tensor | None = None
    mask_BK: Tensor | None = None
    masks: dict[bool, Any] = field(default_factory=dict)

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
        visual_mask: ``(B, S)``, 0 or False at text; None if no token of this call may be dropped.
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
        self.reached_layers = False
        self._decoder = decoder
        self._batch, self._length = inputs.shape[:2]
        self._device = inputs.device
        self._num_seen = cache.get_seq_length() if cache is not None else 0
        self._labels = labels
        self._segments: dict[int, Segment] = {}
        self._held: list[Held | None] = [None] * len(rules.schedule.stages)
        if cache is not None:
            stage_layers = [stage.layer for stage in rules.schedule.stages]
            check_cache(cache, stage_layers, len(decoder.layers))
            self._held = [read_held(cache, layer) for layer in stage_layers]
        self._attention_mask = self._check_mask(attention_mask)
        self._survivors = None if visual_mask is None else self._find_survivors(visual_mask)
        if position_ids is None:
            position_ids = torch.arange(self._length, device=self._device)[None] + self._num_seen
        elif cache is None and attention_mask is None and (position_ids.diff(dim=-1) != 1).any():
            raise ValueError(
                "position_ids has gaps or restarts, which transformers reads as packed sequences; visual tokens can "
                "be dropped from one sample per row only, so unpack the rows"
            )
        self._position_ids = position_ids

    # What callers read

    @property
    def kept_indices(self) -> Tensor:
        """``(B, S')``: which tokens of the call left the last layer, in order; -1 at padding."""
        return self.kept_at(len(self._decoder.layers) - 1)

    def kept_at(self, layer: int) -> Tensor:
        """``(B, N)``: which tokens of the call a layer works on, in order; -1 at padding."""
        segment = self._segments.get(self._stages_up_to(layer) - 1)
        if segment is None or segment.columns_BN is None:
            return torch.arange(self._length, device=self._device).expand(self._batch, -1)
        return segment.columns_BN

    def scores_at(self, layer: int) -> Tensor | None:
        """``(B, S)`` float32: the scores by which tokens were chosen before a layer; None if there are none.

        Tokens that were dropped earlier have score 0.
        """
        segment = self._segments.get(self._stages_up_to(layer) - 1)
        return segment and segment.scores_BS

    def gather(self, values: Tensor, *, fill: float | int | bool = 0) -> Tensor:
        """Shorten something laid out as the call, ``(B, S, ...)``, as the decoder's output is: ``(B, S', ...)``."""
        return gather_rows(values, self.kept_indices, fill=fill)

    def shift_labels(self, labels: Tensor) -> Tensor:
        """Shorten labels ``(B, S)`` and shift them by one: ``(B, S')``, what each output should predict."""
        shortened = self.gather(labels, fill=IGNORED_LABEL)
        return nn.functional.pad(shortened[:, 1:], (0, 1), value=IGNORED_LABEL)

    # What the hooks call

    def enter_layer(self, index: int, layer: nn.Module, hidden_states: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """Prepare the inputs of a layer.

        Args:
            index: of the layer.
            layer: the layer.
            hidden_states: ``(B, N, E)`` from the layer before.
            kwargs: what the decoder passes to every layer.

        Returns:
            Shortened hidden states and matching keyword arguments.
        """
        self.reached_layers = True
        place = self._stages_up_to(index) - 1
        if place < 0:
            return hidden_states, kwargs
        cache = kwargs.get("past_key_values")
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            cache = None  # the layer will not fill it
        if place not in self._segments:
            self._segments[place] = self._decide(place, layer, hidden_states, kwargs["position_embeddings"], cache)
        segment = self._segments[place]
        if index == self.rules.schedule.stages[place].layer and segment.gather_BN is not None:
            hidden_states = gather_rows(hidden_states, segment.gather_BN)
        if segment.is_whole:
            return hidden_states, kwargs
        window = self._window(index)
        slides = window is not None
        if slides and self._num_seen and self._is_padded and window < self._num_seen + self._length:
            raise ValueError(
                f"rows that keep different numbers of tokens would be padded after what the cache holds, and the "
                f"sliding window of {window} of layer {index} would count the padding; give every row alone"
            )
        if slides not in segment.masks:
            segment.masks[slides] = (create_sliding_window_causal_mask if slides else create_causal_mask)(
                config=self._decoder.config,
                inputs_embeds=hidden_states,
                attention_mask=segment.mask_BK,
                past_key_values=cache,
                layer_idx=index,
            )
        return hidden_states, {
            **kwargs,
            "attention_mask": segment.masks[slides],
            "position_ids": segment.position_ids,
            "position_embeddings": segment.position_embeddings,
        }

    def finish(self) -> None:
        """Forget the attention masks, unless a backward pass may run the layers again."""
        if not torch.is_grad_enabled():
            for segment in self._segments.values():
                segment.masks.clear()

    # Deciding

    def _decide(
        self, place: int, layer: nn.Module, hidden_states: Tensor, whole_embeddings: tuple, cache: Cache | None
    ) -> Segment:
        """Make the segment that starts at a stage: choose its tokens, and note in the cache what it will hold."""
        before = self._segments.get(place - 1)
        if before is None:
            before = Segment(None, None, self._position_ids, whole_embeddings)
        held = self._held[place]
        columns_BN, gather_BN, scores_BS = before.columns_BN, None, None
        if self._survivors is not None:
            dropped, scores_BS = self._drop(place, layer, hidden_states, before, cache)
            if dropped:
                gather_BN = self._pack(before.columns_BN)
                columns_BN = gather_BN if columns_BN is None else gather_rows(columns_BN, gather_BN, fill=-1)

        position_ids, position_embeddings = self._positions(columns_BN, held, hidden_states, whole_embeddings)
        segment = Segment(columns_BN, held, position_ids, position_embeddings, gather_BN, scores_BS)
        if not segment.is_whole:
            segment.mask_BK = self._mask(columns_BN, held)
        if cache is not None and columns_BN is not None:
            write_held(cache, self.rules.schedule.stages[place].layer, self._holds_next(columns_BN, held))
        return segment

    def _drop(
        self, place: int, layer: nn.Module, hidden_states: Tensor, before: Segment, cache: Cache | None
    ) -> tuple[bool, Tensor | None]:
        stage, policy = self.rules.schedule.stages[place], self.rules.policies[place]
        scores_BS, skip_rows = None, ()
        if policy.needs_scores:
            is_query_BN = self._query_rows(before.columns_BN)
            num_queries = is_query_BN.sum(1).tolist()
            skip_rows = [row for row, number in enumerate(num_queries) if number == 0]
            query_index_BQ = pack_rows(is_query_BN, max(num_queries), pad_left=False)
            scores_BS = self._score(place, layer, hidden_states, query_index_BQ, before, cache)
        dropped = self._survivors.drop(stage, policy, scores_BS=scores_BS, skip_rows=skip_rows)
        return dropped, scores_BS

    def _score(
        self,
        place: int,
        layer: nn.Module,
        hidden_states: Tensor,
        query_index_BQ: Tensor,
        before: Segment,
        cache: Cache | None,
    ) -> Tensor:
        """Score the tokens entering a stage, by their positions in the call."""
        stage, held = self.rules.schedule.stages[place], self._held[place]
        columns_BN, embeddings = before.columns_BN, before.position_embeddings
        past_keys = None
        if self._num_seen:
            # The layer's cached keys are numbered by what this segment holds, not by what the one before does.
            _, embeddings = self._positions(columns_BN, held, hidden_states, embeddings, before_stage=True)
            past_keys = cache.layers[stage.layer].keys
        key_mask_BN = self._mask(columns_BN, held)
        if key_mask_BN is not None and past_keys is not None:
            key_mask_BN = key_mask_BN[:, -(past_keys.shape[2] + hidden_states.shape[1]) :]
        scores_BN = score_tokens(
            layer,
            hidden_states,
            embeddings,
            query_index_BQ,
            key_mask_BN=key_mask_BN,
            past_keys_BGMC=past_keys,
            window=self._window(stage.layer),
        )
        if columns_BN is None:
            return scores_BN
        scores_BS = scores_BN.new_zeros(self._batch, self._length)
        return scores_BS.scatter_add(1, columns_BN.clamp(min=0), scores_BN.masked_fill(columns_BN < 0, 0.0))

    def _query_rows(self, columns_BN: Tensor | None) -> Tensor:
        valid_BN, text_BN, labels_BN = self._survivors.valid_BS, ~self._survivors.visual_BS, self._labels
        if columns_BN is not None:
            valid_BN = gather_rows(valid_BN, columns_BN)
            text_BN = gather_rows(text_BN, columns_BN)
            labels_BN = None if labels_BN is None else gather_rows(labels_BN, columns_BN, fill=IGNORED_LABEL)
        return QUERY_ROWS[self.rules.queries](valid_BN, text_BN, labels_BN)

    def _pack(self, columns_BN: Tensor | None) -> Tensor:
        """List the survivors by their positions in the segment before, re-padded on the side that was padded."""
        alive_BN = self._survivors.alive_BS
        if columns_BN is not None:
            alive_BN = gather_rows(alive_BN, columns_BN)
        return pack_rows(alive_BN, max(self._survivors.num_alive), pad_left=self._survivors.pad_left)

    # Positions and masks

    def _positions(
        self,
        columns_BN: Tensor | None,
        held: Held | None,
        hidden_states: Tensor,
        embeddings: tuple[Tensor, Tensor],
        *,
        before_stage: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Number tokens without gaps, and give the rotary embedding the numbers or the true positions.

        Args:
            columns_BN: the tokens.
            held: what the layers hold of earlier calls.
            hidden_states: for dtype and device.
            embeddings: of the true positions, of all tokens of the call.
            before_stage: the stage at hand has decided nothing yet, and ``embeddings`` are of ``columns_BN`` already.
        """
        position_ids = self._position_ids
        if held is not None:
            position_ids = position_ids - held.dropped_B[:, None]
        if columns_BN is not None:
            dropped_BS = self._survivors.dropped_BS.int()
            position_ids = position_ids - (dropped_BS.cumsum(1) - dropped_BS)
            position_ids = gather_rows(position_ids, columns_BN)
        if self.rules.positions == "renumber":
            return position_ids, self._decoder.rotary_emb(hidden_states, position_ids=position_ids)
        if columns_BN is not None and not before_stage:
            embeddings = tuple(gather_rows(part, columns_BN) for part in embeddings)
        return position_ids, embeddings

    def _mask(self, columns_BN: Tensor | None, held: Held | None) -> Tensor | None:
        """Mark real tokens among the cached and the given ones; None if all are."""
        padded = columns_BN is not None and self._is_padded
        if self._attention_mask is None and not padded and (held is None or not held.padded):
            return None
        full_BK = self._full_columns(columns_BN, held)
        if self._attention_mask is None:
            return full_BK >= 0
        return gather_rows(self._attention_mask, full_BK, fill=False)

    def _full_columns(self, columns_BN: Tensor | None, held: Held | None) -> Tensor:
        """List positions in the full sequence of the cached and the given tokens."""
        if held is None:
            past = torch.arange(self._num_seen, device=self._device).expand(self._batch, -1)
        else:
            past = held.columns_BM
        if columns_BN is None:
            columns_BN = torch.arange(self._length, device=self._device).expand(self._batch, -1)
        return torch.cat([past, torch.where(columns_BN < 0, -1, columns_BN + self._num_seen)], 1)

    def _holds_next(self, columns_BN: Tensor, held: Held | None) -> Held:
        dropped_B = self._survivors.dropped_BS.sum(1)
        return Held(
            columns_BM=self._full_columns(columns_BN, held),
            dropped_B=dropped_B if held is None else dropped_B + held.dropped_B,
            num_seen=self._num_seen + self._length,
            padded=self._is_padded or (held is not None and held.padded),
        )

    @property
    def _is_padded(self) -> bool:
        return self._survivors is not None and len(set(self._survivors.num_alive)) > 1

    # Facts

    def _stages_up_to(self, layer: int) -> int:
        return sum(stage.layer <= layer for stage in self.rules.schedule.stages)

    def _window(self, layer: int) -> int | None:
        config = self._decoder.config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            return None
        return getattr(config, "sliding_window", None)

    def _find_survivors(self, visual_mask: Tensor) -> Survivors:
        shape = (self._batch, self._length)
        for name, given in (("visual_mask", visual_mask), ("labels", self._labels)):
            if given is not None and tuple(given.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)} for a call of {shape[0]} rows of {shape[1]} tokens; pass "
                    "the prompt in one piece (no prefill_chunk_size), with one entry per token"
                )
        if self._attention_mask is None:
            valid_BS = torch.ones(shape, dtype=torch.bool, device=self._device)
        else:
            valid_BS = self._attention_mask[:, self._num_seen :]
        spans_BS = span_ids(visual_mask).to(self._device)
        return Survivors(spans_BS, valid_BS, scope=self.rules.scope, seed=self.rules.seed)

    def _check_mask(self, attention_mask: Any) -> Tensor | None:
        expected = (self._batch, self._num_seen + self._length)
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != expected:
            seen = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(
                f"attention_mask is {seen}; where visual tokens are dropped it must be None or {expected}, "
                "1 for real tokens and 0 for padding"
            )
        return attention_mask.to(self._device, torch.bool)
