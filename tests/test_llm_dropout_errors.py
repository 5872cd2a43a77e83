"""What cannot be dropped, and is refused."""

import pytest
import torch
import transformers
from dropout_reference import (
    WIDTH,
    build,
    prompt,
)
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from hico.llm_dropout import patch


def test_settings_that_cannot_be_are_named():
    model = build()
    for settings, words in [
        ({"schedule": "uniform@4:0.5"}, "beyond the decoder, whose 4 layers"),
        ({"schedule": "unifrom@1:0.5"}, "did you mean 'uniform'"),
        ({"positions": "true"}, "unknown positions 'true'; choose one of renumber, keep"),
        ({"queries": "answers"}, "unknown queries 'answers'"),
        ({"scope": "batch"}, "unknown scope 'batch'"),
    ]:
        with pytest.raises(ValueError, match=words):
            patch(model, **{"schedule": "uniform@1:0.5", **settings})
    with pytest.raises(ValueError, match="holds no decoder"):
        patch(torch.nn.Linear(2, 2), "uniform@1:0.5")
    patch(model, "uniform@1:0.5")
    with pytest.raises(RuntimeError, match=r"drops by uniform@1:0\.5 already; remove"):
        patch(model.model, "uniform@2:0.5")


def test_rotary_embeddings_that_depend_on_the_length_keep_positions():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, rope_parameters=rope
    )
    model = Qwen2ForCausalLM(config)
    with pytest.raises(ValueError, match="positions='keep'"):
        patch(model, "uniform@1:0.5")
    patch(model, "uniform@1:0.5", positions="keep")


@torch.no_grad()
def test_attention_that_cannot_be_read_is_refused():
    class Outside(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    class Biased(type(build().model.layers[1].self_attn)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return super().forward(hidden_states=hidden_states, attention_mask=torch.zeros(1, 1, 1, 1), **kwargs)

    batch = prompt([4, 12, 3])
    outside, biased = build(), build()
    outside.model.layers[1].self_attn = Outside()
    biased.model.layers[1].self_attn.__class__ = Biased
    for model, words in (
        (outside, "computes attention outside transformers' AttentionInterface"),
        (biased, "attends by attention_mask too"),
    ):
        with patch(model, "attention@1:0.5"), pytest.raises(ValueError, match=words):
            model(**batch.inputs)
        with patch(model, "uniform@1:0.5"):
            assert model(**batch.inputs).logits.shape[1] == 13


@torch.no_grad()
def test_decoders_that_hand_on_otherwise_are_refused():
    """What a rename in transformers would do: refuse, and never go on."""

    class Renamed(type(build().model.layers[0])):
        def forward(self, hidden_states, mask=None, position_embeddings=None, **kwargs):
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)

    class Backwards(torch.nn.ModuleList):
        def __getitem__(self, index):
            return [*self][::-1] if isinstance(index, slice) else super().__getitem__(index)

    batch = prompt([4, 12, 3])
    renamed, looped, deaf, hidden = build(), build(), build(), build()
    renamed.model.layers[2].__class__ = Renamed
    with pytest.raises(ValueError, match=f"Renamed of transformers {transformers.__version__} takes mask"):
        patch(renamed, "uniform@1:0.5")
    looped.model.layers = Backwards(looped.model.layers)
    with patch(looped, "uniform@1:0.5"), pytest.raises(ValueError, match="runs its layers in another order"):
        looped(**batch.inputs)
    inner = deaf.model.forward
    deaf.model.forward = lambda inputs_embeds, **kwargs: inner(inputs_embeds=inputs_embeds)
    with patch(deaf, "uniform@1:0.5"), pytest.raises(ValueError, match="does not hand its keyword arguments to every"):
        deaf(**batch.inputs)
    around = hidden.model.forward
    hidden.model.forward = lambda **kwargs: around(
        **{name: value for name, value in kwargs.items() if not name.startswith("drop_")}
    )
    with patch(hidden, "uniform@1:0.5"), pytest.raises(ValueError, match="does not hand its keyword arguments"):
        hidden(**batch.inputs)


@torch.no_grad()
def test_calls_that_do_not_fit_are_refused():
    model, batch = build(), prompt([4, 12, 3], [6])
    patch(model, "attention@1:0.5")
    with pytest.raises(ValueError, match=r"visual_mask has shape \(2, 18\) for a call of 2 rows of 19 tokens"):
        model(**{**batch.inputs, "visual_mask": batch.visual_mask[:, 1:]})
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4\)"):
        model(**batch.inputs, labels=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask is"):
        model(**{**batch.inputs, "attention_mask": torch.ones(2, 1, 19, 19)})
    with pytest.raises(ValueError, match="packed sequences"):
        model(
            inputs_embeds=batch.inputs_embeds,
            visual_mask=batch.visual_mask,
            position_ids=torch.cat([torch.arange(9), torch.arange(10)])[None],
            use_cache=False,
        )
    with pytest.raises(ValueError, match=r"position_ids has shape \(3, 2, 19\), with more than one position"):
        model(**batch.inputs, position_ids=torch.arange(19).expand(3, 2, -1))
    merging = build()
    patch(merging, "attention_merge@1:0.5")
    with pytest.raises(ValueError, match="every process has a part"):
        merging(**batch.inputs, sequence_layout=object())
    with pytest.raises(ValueError, match="expected 0 for text"):
        model(**{**batch.inputs, "visual_mask": -2 * batch.visual_mask})


@torch.no_grad()
def test_a_cache_of_another_schedule_is_refused():
    model, batch = build(), prompt([4, 12, 3])
    step = torch.randn(1, 1, WIDTH)
    with patch(model, "attention@1:0.5"):
        cache = model(**batch.inputs, past_key_values=DynamicCache()).past_key_values
    for schedule in ("uniform@2:0.5", None):
        with patch(model, schedule), pytest.raises(RuntimeError, match="dropped at layer 1 when the cache was filled"):
            model(inputs_embeds=step, past_key_values=cache)
    with (
        patch(model, "attention@1:0.5,uniform@2:0.5"),
        pytest.raises(RuntimeError, match="holds 13 tokens and should"),
    ):
        model(inputs_embeds=step, past_key_values=cache)


@torch.no_grad()
def test_text_alone_may_use_a_static_cache():
    model = build()
    patch(model, "attention@1:0.5")
    ids = torch.randint(1, 60, (1, 9))
    static = model.generate(ids, cache_implementation="static", max_new_tokens=3, disable_compile=True)
    assert torch.equal(static, build().generate(ids, max_new_tokens=3))
