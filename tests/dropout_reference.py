"""Tiny decoders, prompts with visual tokens, and progressive visual dropout written out by hand, row by row."""

from dataclasses import dataclass

import pytest
import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from hico.llm_dropout import DropSchedule

NUM_LAYERS = 4
WIDTH = 32
TINY = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
DECODERS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY)),
    "qwen2_sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**TINY, use_sliding_window=True, sliding_window=9, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=None)),
    "mistral_sliding": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=9)),
}


def build(name: str = "qwen2", attention: str = "sdpa", *, seed: int = 0):
    """Build a decoder with weights large enough for attention to differ from token to token."""
    torch.manual_seed(seed)
    model = DECODERS[name]().eval()
    model.set_attn_implementation(attention)
    return model


@dataclass
class Prompt:
    """A batch: embeddings, masks and what each row looks like without padding."""

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    visual_mask: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def valid(self, row: int) -> torch.Tensor:
        """Positions of the row's real tokens."""
        if self.attention_mask is None:
            return torch.arange(self.inputs_embeds.shape[1])
        return self.attention_mask[row].nonzero()[:, 0]

    def row(self, row: int) -> "Prompt":
        """The row alone, without padding."""
        valid = self.valid(row)
        return Prompt(self.inputs_embeds[row : row + 1, valid], None, self.visual_mask[row : row + 1, valid])

    def __len__(self) -> int:
        return len(self.inputs_embeds)


def prompt(*rows: list[int], side: str = "left", seed: int = 0) -> Prompt:
    """Make rows from counts of text and visual tokens in turn: ``[4, 10, 3]`` is text, a video, text.

    Padding, where lengths differ, holds noise: nothing may read it.
    """
    generator = torch.Generator().manual_seed(seed)
    length = max(map(sum, rows))
    embeds = torch.randn(len(rows), length, WIDTH, generator=generator)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    visual = torch.zeros(len(rows), length, dtype=torch.long)
    for row, counts in enumerate(rows):
        start = length - sum(counts) if side == "left" else 0
        mask[row, start : start + sum(counts)] = 1
        for place, count in enumerate(counts):
            if place % 2:
                visual[row, start : start + count] = place // 2 + 1
            start += count
    return Prompt(embeds, None if mask.all() else mask, visual)


def written_out(model, embeds_SE: torch.Tensor, kept: dict[int, torch.Tensor], *, positions: str) -> torch.Tensor:
    """Run one row through the stock layers, selecting tokens by hand.

    Args:
        model: a causal LM with ``sdpa`` attention, not patched.
        embeds_SE: all tokens of the row, without padding.
        kept: layer -> positions in the row of the tokens that enter it, for each layer that drops some.
        positions: "renumber" or "keep".

    Returns:
        Logits of the tokens that leave the last layer.
    """
    decoder, config = model.model, model.config
    hidden, columns = embeds_SE[None], torch.arange(len(embeds_SE))
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(decoder.layers)
    for index, layer in enumerate(decoder.layers):
        if index in kept:
            stays = torch.isin(columns, kept[index])
            hidden, columns = hidden[:, stays], columns[stays]
        places = torch.arange(len(columns))
        distance = places[:, None] - places[None]
        mask = distance >= 0
        if kinds[index] == "sliding_attention" and getattr(config, "sliding_window", None):
            mask &= distance < config.sliding_window
        rotary = (places if positions == "renumber" else columns)[None]
        hidden = layer(
            hidden,
            attention_mask=mask[None, None],
            position_ids=places[None],
            position_embeddings=decoder.rotary_emb(hidden, position_ids=rotary),
        )
    return model.lm_head(decoder.norm(hidden))[0]


def slowly(model, embeds_SE: torch.Tensor, spans_S: torch.Tensor, schedule: str) -> tuple[torch.Tensor, dict]:
    """Run one row through stock layers and choose, drop and merge token by token, in float64.

    Args:
        model: a causal LM with ``eager`` attention in float64, not patched.
        embeds_SE: all tokens of the row, without padding; the last one asks.
        spans_S: 0 is text, k the k-th video.
        schedule: of policies that ask for scores, and ratios.

    Returns:
        Logits of the tokens that leave the last layer, and which tokens of the row enter each stage.
    """
    decoder, spans = model.model, spans_S.tolist()
    stages = {stage.layer: stage for stage in DropSchedule.parse(schedule).stages}
    hidden, columns, kept = list(embeds_SE), list(range(len(spans))), {}
    asked = None  # the attention that the last token paid in the layer before

    def run(layer):
        states, places = torch.stack(hidden)[None], torch.arange(len(hidden))[None]
        seen = torch.full((len(hidden),) * 2, -1e300, dtype=torch.float64).triu(1)[None, None]
        weights = []
        hook = layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
        cos_sin = decoder.rotary_emb(states, position_ids=places)
        out = layer(states, attention_mask=seen, position_ids=places, position_embeddings=cos_sin)
        hook.remove()
        return list(out[0]), [sum(heads) / len(heads) for heads in weights[0][0, :, -1].T.tolist()]

    for index, layer in enumerate(decoder.layers):
        if index in stages:
            stage = stages[index]
            scores = asked if stage.scores_from == "previous" else run(layer)[1]
            stays, merged = set(range(len(hidden))), {}
            for span in sorted(set(spans) - {0}):
                members = [place for place in stays if spans[columns[place]] == span]
                budget = max(1, int(spans.count(span) * stage.keep))
                best = sorted(members, key=lambda place: (-scores[place], place))[:budget]
                for place in set(members) - set(best):
                    stays.remove(place)
                    alike = {b: torch.cosine_similarity(hidden[place], hidden[b], dim=0).item() for b in sorted(best)}
                    merged.setdefault(max(alike, key=alike.get), []).append(place)
            if stage.policy == "attention_merge":
                means = {
                    to: sum([hidden[p] for p in goes], hidden[to]) / (1 + len(goes)) for to, goes in merged.items()
                }
                hidden = [means.get(place, state) for place, state in enumerate(hidden)]
            hidden = [state for place, state in enumerate(hidden) if place in stays]
            columns = [column for place, column in enumerate(columns) if place in stays]
            kept[index] = torch.tensor(columns)
        hidden, asked = run(layer)
    return model.lm_head(decoder.norm(torch.stack(hidden))), kept


def kept_in_row(plan, prompt: Prompt, row: int, layers: list[int]) -> dict[int, torch.Tensor]:
    """Read from a plan which tokens of a row entered some layers, counted without padding."""
    valid = prompt.valid(row)
    kept = {}
    for layer in layers:
        columns = plan.kept_at(layer)[row]
        kept[layer] = torch.searchsorted(valid, columns[torch.isin(columns, valid)])
    return kept


def unpadded(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Attention with the contract of flash attention: a 2-D mask, unpadded row by row, causal from the end."""
    batch, num_heads, num_queries, _ = query.shape
    key, value = (part.repeat_interleave(num_heads // part.shape[1], 1) for part in (key, value))
    num_keys = key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(batch, num_keys, dtype=torch.bool)
    assert attention_mask.shape == (batch, num_keys)
    output = torch.zeros(batch, num_queries, num_heads, query.shape[-1])
    for row in range(batch):
        keys = attention_mask[row].nonzero()[:, 0]
        queries = attention_mask[row, -num_queries:].nonzero()[:, 0]
        distance = torch.arange(len(queries))[:, None] - torch.arange(len(keys))[None] + len(keys) - len(queries)
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        weights = (query[row, :, queries] @ key[row, :, keys].transpose(1, 2) * scaling).masked_fill(~seen, -1e9)
        output[row, queries] = (weights.softmax(-1) @ value[row, :, keys]).transpose(0, 1)
    return output, None


AttentionInterface.register("unpadded", unpadded)
AttentionMaskInterface.register("unpadded", flash_attention_mask)


SCHEDULES = {
    "two_stages": "uniform@1:0.6,attention@3:0.3",
    "attention_twice": "attention@1:0.5,attention@2:0.25",
    "random": "random@2:0.4",
    "budget": "attention@1:9,uniform@3:5",
    "none_between": "uniform@1:0.5,none@2:0.5,random@3:0.2",
}
ROWS = {
    "even": ([4, 12, 3], [4, 12, 3]),
    "one_length": ([4, 12, 5], [6, 5, 10]),  # no padding before the drop, some after it
    "ragged": ([5, 14, 4], [3, 6, 2], [9]),  # the last row is text alone
    "many_spans": ([2, 7, 1, 8, 3], [3, 3, 0, 9, 4, 5, 2], [2, 11, 4]),
    "ends_visual": ([3, 12], [4, 6, 3]),
}
BOTH_SIDES = pytest.mark.parametrize("side", ["left", "right"])
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
EVERY_BATCH = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
EVERY_POSITION = pytest.mark.parametrize("positions", ["renumber", "keep"])


def stage_layers(schedule):
    """Return the layers that a schedule drops before."""
    return [stage.layer for stage in DropSchedule.parse(schedule).stages]


def close(actual, expected):
    """Assert that two ways to compute the same agree."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
