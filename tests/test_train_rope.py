"""Other rotary positions do what they say, and what does nothing is refused."""

import pytest
import torch
from transformers import AutoModel, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2Config

from hico.train.rope import extend_positions

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 50, "head_dim": 64, "max_position_embeddings": 512}
QWEN = Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
GEMMA = Gemma3TextConfig(**SIZES, layer_types=["full_attention", "sliding_attention"])
YARN = {"rope_type": "yarn", "factor": 8.0}


@pytest.mark.golden
def test_the_published_base_gives_the_published_frequencies():
    extended = extend_positions(QWEN, {"rope_theta": 1e9}, length=4096)
    found = AutoModel.from_config(extended).rotary_emb.inv_freq
    torch.testing.assert_close(found, 1e9 ** -(torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    assert extended.max_position_embeddings == 4096
    assert QWEN.rope_parameters["rope_theta"] == 1e6
    assert QWEN.max_position_embeddings == 512


def test_settings_of_one_type_of_layer_leave_the_others():
    extended = extend_positions(GEMMA, {"full_attention": {"rope_theta": 1e9}}, length=4096)
    assert extended.rope_parameters["full_attention"]["rope_theta"] == 1e9
    assert extended.rope_parameters["sliding_attention"] == GEMMA.rope_parameters["sliding_attention"]


@pytest.mark.parametrize("rope", [YARN, {**YARN, "beta_fast": 32.0}, {"rope_type": "linear", "factor": 8.0}])
def test_scaling_reaches_as_far_as_its_factor(rope):
    extended = extend_positions(QWEN, rope, length=4096)
    assert extended.rope_parameters["rope_theta"] == 1e6
    assert extended.max_position_embeddings == 4096
    again = type(extended).from_dict(extended.to_dict())
    assert again.rope_parameters == extended.rope_parameters
    with pytest.raises(ValueError, match="max_length 4,097 is beyond the 4,096 positions that rope_type"):
        extend_positions(QWEN, rope, length=4097)


def test_the_dynamic_type_keeps_the_length_that_it_scales_from():
    assert extend_positions(QWEN, {"rope_type": "dynamic", "factor": 2.0}, length=4096).max_position_embeddings == 512


def test_a_length_within_the_positions_needs_no_change():
    assert extend_positions(QWEN, None, length=512) is QWEN
    assert extend_positions(QWEN, {"rope_theta": 1e9}, length=100).max_position_embeddings == 512


LEARNED = GPT2Config(n_positions=128, n_embd=32, n_head=2, n_layer=2)
LLAMA3 = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5})


@pytest.mark.parametrize(
    ("config", "rope", "said"),
    [
        (QWEN, None, "max_length 4,096 is beyond the 512 positions of qwen2; set rope_parameters, such as"),
        (LEARNED, None, "beyond the 128 positions of gpt2; its positions are learned, so lower max_length"),
        (LEARNED, {"rope_theta": 1e9}, "rope_parameters change rotary positions, and gpt2 has none"),
        (QWEN, {"rope_theta": 1e6}, "change nothing: the model has"),
        (QWEN, {"rope_tehta": 1e9}, "change nothing"),
        (QWEN, {"rope_theta": 1e9, "rope_tehta": 1e9}, "sets rope_tehta, which has no effect"),
        (QWEN, {"rope_theta": 1e9, "factor": 4.0}, "sets factor, which has no effect"),
        (QWEN, {"rope_type": "nope", "factor": 4.0}, "nope"),
        (QWEN, {"rope_type": "yarn"}, "do not describe rotary positions"),
        (LLAMA3, {"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        (GEMMA, {"rope_theta": 1e9}, "has such settings per type of layer: give {sliding_attention: {rope_theta"),
        (GEMMA, {"full_atention": {"rope_theta": 1e9}}, "did you mean 'full_attention'"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused(config, rope, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        extend_positions(config, rope, length=4096)
    assert said in str(error.value)
