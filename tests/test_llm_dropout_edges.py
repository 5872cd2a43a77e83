"""Progressive visual dropout where calls meet: caches cut or half filled, windows, guesses, chance in the layers."""

import copy
from functools import partial

import pytest
import torch
from dropout_reference import TINY, WIDTH, build, prompt
from torch import nn
from transformers import (
    DynamicCache,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from hico.llm_dropout import patch

SCHEDULE = "attention@1:0.5,uniform@3:0.2"


class NoisyLinear(nn.Module):
    """A projection with dropout, as an adapter in training has it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.weight = linear.weight
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.linear(self.dropout(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_dropout_of_a_projection(reentrant):
    batch = prompt([4, 12, 3], [6], side="right")
    labels = torch.full(batch.visual_mask.shape, -100)
    labels[0, -2:], labels[1, 3:6] = 3, 2
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        for layer in model.model.layers:
            layer.self_attn.q_proj = NoisyLinear(layer.self_attn.q_proj)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        patch(model, SCHEDULE)
        embeds = batch.inputs_embeds.clone().requires_grad_()
        torch.manual_seed(0)
        model(**{**batch.inputs, "inputs_embeds": embeds}, labels=labels, use_cache=False).loss.backward()
        grads.append(embeds.grad)
    assert torch.equal(*grads)


class QuantisedLinear(nn.Module):
    """A projection whose weights are stored as whole numbers."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_parameter("weight", nn.Parameter((linear.weight / scale).round().to(torch.int8), False))
        self.scale, self.bias = scale, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@torch.no_grad()
def test_quantised_projections_are_scored_by_what_they_compute():
    model, batch = build(attention="eager"), prompt([4, 12, 3], [2, 6, 5])
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, QuantisedLinear(getattr(layer.self_attn, name)))
    weights = model(
        inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, output_attentions=True
    ).attentions[1]
    patch(model, SCHEDULE)
    scores = model(**batch.inputs).drop_plan.scores_at(1)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(scores[real], weights[:, :, -1].mean(1)[real], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", [pytest.param("model", marks=pytest.mark.slow), "layer", "attention", "mlp"])
@torch.no_grad()
def test_what_is_compiled_drops_as_before(part):
    model, batch = build(), prompt([4, 12, 3])
    compiled = partial(torch.compile, backend="eager")
    with patch(model, SCHEDULE):
        expected = model(**batch.inputs).logits
    attributes = {*vars(model), "_is_torch_compile"}
    if part == "layer":
        model.model.layers[1] = compiled(model.model.layers[1])
    elif part == "attention":
        model.model.layers[1].self_attn = compiled(model.model.layers[1].self_attn)
    elif part == "mlp":
        model.model.layers[1].mlp = compiled(model.model.layers[1].mlp)
    whole = compiled(model) if part == "model" else model
    with patch(whole, SCHEDULE):
        torch.testing.assert_close(whole(**batch.inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert set(vars(model)) <= attributes


@torch.no_grad()
def test_scoring_draws_no_chance():
    model, batch = build().train(), prompt([4, 12, 3])
    model.model.layers[1].self_attn.q_proj = NoisyLinear(model.model.layers[1].self_attn.q_proj)
    states = []
    for schedule in ("uniform@1:0.5", "attention@1:0.5"):
        with patch(model, schedule):
            torch.manual_seed(0)
            model(**batch.inputs)
            states.append(torch.rand(1))
    assert torch.equal(*states)


@torch.no_grad()
def test_a_cache_cut_into_its_prompt_is_refused():
    model, batch = build(), prompt([4, 12, 3])
    patch(model, SCHEDULE)
    step = torch.randn(1, 1, WIDTH)
    cache = model(**batch.inputs, use_cache=True).past_key_values
    expected = model(inputs_embeds=step, past_key_values=cache).logits
    cache.crop(-1)
    assert torch.equal(model(inputs_embeds=step, past_key_values=cache).logits, expected)
    cache.crop(-3)
    with pytest.raises(RuntimeError, match="cut back to 17 tokens, into the 19"):
        model(inputs_embeds=step, past_key_values=cache)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@torch.no_grad()
def test_a_cache_that_a_call_left_half_filled_is_refused(layer):
    model, batch, cache = build(), prompt([4, 12, 3]), DynamicCache()
    patch(model, "attention@1:0.5")

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**batch.inputs, past_key_values=cache)
    hook.remove()
    step = torch.randn(1, 1, WIDTH)
    if layer == 3:  # every layer is filled
        model(inputs_embeds=step, past_key_values=cache)
    else:
        with pytest.raises(RuntimeError, match="failed half way"):
            model(**batch.inputs, past_key_values=cache)


@pytest.mark.parametrize("name", ["qwen2_sliding", "mistral_sliding"])
@torch.no_grad()
def test_a_window_over_padding_between_turns_is_refused(name):
    model, first, second = build(name), prompt([4, 12, 3], [4, 12, 3]), prompt([2, 10, 4], [2, 6, 8])
    patch(model, "attention@1:0.5,uniform@3:0.25")
    cache = model(**first.inputs, use_cache=True).past_key_values
    even = model(**first.inputs, past_key_values=copy.deepcopy(cache))
    alone = [model(**first.row(row).inputs, use_cache=True).past_key_values for row in range(2)]
    for row in range(2):
        single = model(**first.row(row).inputs, past_key_values=alone[row])
        torch.testing.assert_close(even.logits[row], single.logits[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="sliding window of 9"):
        model(**second.inputs, past_key_values=cache)


def test_candidates_in_the_prefill_are_refused():
    model, assistant = build(), build(seed=1)
    ids = torch.randint(1, 60, (1, 20))
    ids[0, -4:] = torch.tensor([1, 2, 1, 2])
    visual_mask = torch.zeros_like(ids)
    visual_mask[:, 4:16] = 1
    patch(model, SCHEDULE)
    patch(assistant, SCHEDULE)
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens and assistant_model unset"):
            model.generate(ids, visual_mask=visual_mask, max_new_tokens=8, **how)


def test_layers_with_a_state_of_another_kind_are_refused_before_any_cache_exists():
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = Qwen3NextConfig(
        **TINY, **linear, **experts, linear_value_head_dim=8, head_dim=8, shared_expert_intermediate_size=16
    )
    with pytest.raises(ValueError, match=r"Qwen3NextModel of transformers .* has layers of type linear_attention"):
        patch(Qwen3NextForCausalLM(config), "uniform@1:0.5")
