import copy
import pickle

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from hico.rotary import keep_rotary_in_float32


def tiny_model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.bfloat16().float(),
        lambda model: copy.deepcopy(model).to(torch.bfloat16),
        lambda model: pickle.loads(pickle.dumps(model)).to(torch.bfloat16),
        lambda model: model.to(dtype=torch.bfloat16, device="cpu").half(),
    ],
)
def test_frequencies_survive_casting(cast):
    model = tiny_model()
    expected = model.model.rotary_emb.inv_freq.clone()
    keep_rotary_in_float32(model)
    cast_model = cast(model)
    assert cast_model.model.embed_tokens.weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
    torch.testing.assert_close(cast_model.model.rotary_emb.inv_freq, expected, rtol=0, atol=0)
    torch.testing.assert_close(cast_model.model.rotary_emb.original_inv_freq, expected, rtol=0, atol=0)


def test_frequencies_that_were_cast_are_computed_anew():
    model = tiny_model()
    expected = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16, "transformers keeps it now: the guard can go"
    keep_rotary_in_float32(model)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=0, atol=0)


def test_frequencies_survive_loading_in_half_precision(tmp_path):
    model = tiny_model()
    expected = model.model.rotary_emb.inv_freq.clone()
    keep_rotary_in_float32(model)
    keys = set(model.state_dict())
    model.save_pretrained(tmp_path)

    class Guarded(Qwen2ForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            keep_rotary_in_float32(self)

    loaded = Guarded.from_pretrained(tmp_path, dtype=torch.bfloat16).to(torch.bfloat16)
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, expected, rtol=0, atol=0)
    assert set(loaded.state_dict()) == keys == set(tiny_model().state_dict())


def test_bfloat16_logits_stay_near_float32_at_long_positions():
    model = tiny_model()
    guarded = copy.deepcopy(model)
    keep_rotary_in_float32(guarded)
    inputs = {"input_ids": torch.arange(24).view(1, -1), "position_ids": torch.arange(20_000, 20_024).view(1, -1)}
    with torch.no_grad():
        cos, _ = model.model.rotary_emb(torch.zeros(1), inputs["position_ids"])
        exact, _ = guarded.to(torch.bfloat16).model.rotary_emb(torch.zeros(1), inputs["position_ids"])
        cast, _ = model.to(torch.bfloat16).model.rotary_emb(torch.zeros(1), inputs["position_ids"])
    torch.testing.assert_close(exact, cos)
    assert (cast - cos).abs().max() > 0.5


def test_moving_from_the_meta_device_keeps_the_dtype():
    with torch.device("meta"):
        model = tiny_model()
    keep_rotary_in_float32(model)
    model.to(torch.bfloat16).to_empty(device="cpu")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.device.type == "cpu"
