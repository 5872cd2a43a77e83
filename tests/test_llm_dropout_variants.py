"""Settings of decoders that change how they attend, and copies of patched models."""

import copy
import pickle

import pytest
import torch
from decoder_zoo import build_tiny, masked, quietly
from test_llm_dropout_zoo import LENGTH, SPAN, close, kept_after

from hico.compat import UnsupportedDecoder
from hico.llm_dropout import find_handle, patch
from hico.llm_dropout.patch import find_decoder

SCHEDULE = "uniform@1:0.5,uniform@2:0.3"
SCALED = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 1.0,
}


def call():
    visual = torch.zeros(1, LENGTH, dtype=torch.long)
    visual[:, SPAN] = 1
    return {"inputs_embeds": torch.randn(1, LENGTH, 32), "visual_mask": visual, "use_cache": False}


@pytest.mark.parametrize("name", ["GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_a_decoder_that_sees_what_comes_after_is_refused_under_any_policy(name):
    with pytest.raises(UnsupportedDecoder, match="those after them"):
        patch(quietly(build_tiny, name, use_bidirectional_attention=True), SCHEDULE)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"is_causal": False}, "those after them"),
        ({"sliding_window": 9}, r"sliding window of 9 .* set config\.sliding_window = None"),
    ],
)
def test_settings_that_a_decoder_follows_by_half_are_refused(setting, words):
    model = quietly(build_tiny, "LlamaForCausalLM")
    for name, value in setting.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedDecoder, match=words):
        patch(model, SCHEDULE)


@torch.no_grad()
def test_a_layer_that_adds_to_its_mask_is_given_one():
    model = quietly(build_tiny, "DogeForCausalLM", sliding_window=None)
    model.set_attn_implementation("sdpa")
    inputs = call()
    later = inputs["inputs_embeds"].clone()
    later[:, -1] += 3
    stock = [
        model(inputs_embeds=embeds, use_cache=False).logits[:, :-1] for embeds in (inputs["inputs_embeds"], later)
    ]
    if not torch.equal(*stock):  # transformers 5.17; to be deleted with it
        pytest.skip("the stock model sees what comes after, too")
    with patch(model, SCHEDULE):
        logits = model(**inputs).logits
        changed = model(**{**inputs, "inputs_embeds": later}).logits
    assert torch.equal(logits[:, :-1], changed[:, :-1])


@torch.no_grad()
def test_queries_scaled_by_position_keep_the_scale_of_their_rotary_embedding_or_are_refused():
    model = quietly(build_tiny, "Ministral3ForCausalLM", rope_parameters=SCALED)
    inputs = call()
    with patch(model, SCHEDULE, positions="renumber"):
        decoder, _ = find_decoder(model)
        out = model(**inputs)
    kept = kept_after(out.drop_plan)
    close(out.logits[0], masked(model, decoder, inputs["inputs_embeds"], kept, renumber=True)[kept[2]])
    with patch(model, SCHEDULE, positions="keep"):
        with pytest.raises(UnsupportedDecoder, match="positions='renumber'"):
            model(**inputs)
        short = {name: value[:, :8] if torch.is_tensor(value) else value for name, value in inputs.items()}
        model(**short)  # none of these is scaled


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_a_copy_of_a_patched_model_has_hooks_of_its_own(duplicate):
    model = quietly(build_tiny, "Qwen2ForCausalLM")
    inputs = call()
    handle = patch(model, SCHEDULE)
    expected = model(**inputs).logits
    twin = duplicate(model)
    assert torch.equal(twin(**inputs).logits, expected)
    find_handle(twin.model).remove()
    assert find_handle(twin.model) is None
    assert not hasattr(twin.loss_function, "__self__")
    assert find_handle(model.model) is handle
    assert model.loss_function.__self__ is handle
    assert torch.equal(model(**inputs).logits, expected)
