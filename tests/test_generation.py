"""Generation: what users of transformers ask for is honoured, or refused by its name."""

import pytest
import torch
from test_modeling_hico import IMAGE, VIDEO, pixels, prompt
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from hico import HicoConfig, HicoForConditionalGeneration

PAD, END = 256, 258
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = HicoForConditionalGeneration(HicoConfig.preset("tiny")).eval()
    with torch.no_grad():
        model.lm_head.weight *= 30  # so that greedy tokens do not all repeat the last one
    return model


@pytest.fixture
def own_settings(model):
    before, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=PAD, eos_token_id=END)
    yield model.generation_config
    model.generation_config = before


def video_prompt():
    return {"input_ids": prompt(1, "v", 2, 3)[None], "pixel_values_videos": pixels(1, 4, 3, 48, 48)}


def by_embeddings(model, inputs, **settings):
    """What transformers generates where it sees embeddings alone: the answer, without the prompt."""
    embeds, mask = model.model.embed(**inputs)
    return model.generate(inputs_embeds=embeds, visual_mask=mask, **settings)


@pytest.mark.parametrize("where", ["arguments", "config", "model"])
def test_a_repetition_penalty_counts_generated_tokens_only(model, own_settings, where):
    penalty, has_effect = 1.9, []
    for inputs in (video_prompt(), {"input_ids": prompt(*range(40, 80), 205)[None]}):
        expected = by_embeddings(model, inputs, repetition_penalty=penalty, **SETTINGS)
        if where == "arguments":
            answer = model.generate(**inputs, repetition_penalty=penalty, **SETTINGS)
        elif where == "config":
            given = GenerationConfig(repetition_penalty=penalty, **SETTINGS)
            answer = model.generate(**inputs, generation_config=given)
        else:
            own_settings.repetition_penalty = penalty
            answer = model.generate(**inputs, **SETTINGS)
        assert answer[0, inputs["input_ids"].shape[1] :].tolist() == expected[0].tolist()
        plain = model.generate(**inputs, **SETTINGS, repetition_penalty=1.0)
        has_effect.append(plain[0, -12:].tolist() != expected[0].tolist())
    assert any(has_effect)


def test_beams_are_penalised_for_generated_tokens_only(model):
    inputs, settings = video_prompt(), {**SETTINGS, "num_beams": 3, "repetition_penalty": 3.0}
    expected = by_embeddings(model, inputs, **settings)
    assert model.generate(**inputs, **settings)[0, -12:].tolist() == expected[0].tolist()


def test_sampling_with_a_penalty_draws_what_embeddings_draw(model):
    inputs, drawn = video_prompt(), []
    settings = {
        **SETTINGS,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.3,
    }
    for generate in (by_embeddings, lambda model, inputs, **settings: model.generate(**inputs, **settings)):
        torch.manual_seed(3)
        drawn.append(generate(model, inputs, **settings)[0, -12:].tolist())
    assert drawn[0] == drawn[1]


def test_a_penalty_that_the_caller_built_counts_what_it_was_made_to(model):
    inputs = video_prompt()
    whole = RepetitionPenaltyLogitsProcessor(1.9)
    expected = model.generate(**inputs, **SETTINGS, logits_processor=LogitsProcessorList([whole]))
    both = model.generate(**inputs, **SETTINGS, repetition_penalty=1.2, logits_processor=[whole])
    assert torch.equal(both, expected)


def test_settings_of_the_model_hold_beside_a_config_of_the_callers(model, own_settings):
    inputs = video_prompt()
    first = int(model.generate(**inputs, **SETTINGS)[0, -12])
    own_settings.suppress_tokens = [first]
    given = GenerationConfig(**SETTINGS)
    assert first not in model.generate(**inputs, generation_config=given)[0, -12:].tolist()
    assert given.suppress_tokens is None
    assert model.generate(**inputs, generation_config=given, max_new_tokens=2).shape[1] == 19 + 2


@pytest.mark.parametrize(
    "setting",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"prefill_chunk_size": 8},
        {"cache_implementation": "paged"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_would_not_see_a_video_is_refused_by_its_name(model, own_settings, setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=rf"^{name}.* cannot be used with videos or images"):
        model.generate(**video_prompt(), **SETTINGS, **setting)
    with pytest.raises(ValueError, match=rf"^{name}.* cannot be used with videos or images"):
        model.generate(**video_prompt(), generation_config=GenerationConfig(**SETTINGS, **setting))
    setattr(own_settings, name, value)
    with pytest.raises(ValueError, match=rf"^{name}.* cannot be used with videos or images"):
        model.generate(**video_prompt(), **SETTINGS)


def test_an_assistant_that_would_not_see_a_video_is_refused_by_its_name(model):
    with pytest.raises(ValueError, match=r"^assistant_model cannot be used with videos or images"):
        model.generate(**video_prompt(), **SETTINGS, assistant_model=model)


@pytest.mark.parametrize("penalty", [1.0, 1.9])
def test_without_a_video_guesses_change_no_answer(model, penalty):
    torch.manual_seed(1)
    assistant = HicoForConditionalGeneration(HicoConfig.preset("tiny")).eval()
    ids, settings = prompt(1, 7, 8, 9, 1, 7, 8)[None], {**SETTINGS, "max_new_tokens": 6, "repetition_penalty": penalty}
    greedy = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(model.generate(ids, **settings, assistant_model=assistant), greedy)


def test_right_padding_is_refused_without_a_mask_too(model, own_settings):
    ids = torch.tensor([[1, 2, PAD], [1, 2, 3]])
    for settings in ({}, {"generation_config": GenerationConfig(max_new_tokens=1)}):
        with pytest.raises(ValueError, match=r"1 of 2 rows end in token 256.* no attention_mask.*padding_side='left'"):
            model.generate(ids, **settings)
    with pytest.raises(ValueError, match="1 of 1 rows end in token 256"):
        model.generate(ids[:1], max_new_tokens=1)
    own_settings.pad_token_id = None  # then rows are padded with the token that ends a text
    with pytest.raises(ValueError, match="1 of 2 rows end in token 3"):
        model.generate(ids, eos_token_id=[3, END], max_new_tokens=1)
    assert model.generate(ids[:1], attention_mask=torch.ones(1, 3), max_new_tokens=1).shape == (1, 4)
    assert model.generate(torch.tensor([[PAD]]), pad_token_id=PAD, max_new_tokens=1).shape == (1, 2)


def test_left_padding_without_a_mask_is_found_or_refused(model, own_settings):
    row = prompt(1, 2, 3)
    ids = torch.stack([row, torch.tensor([PAD, 2, 3])])
    clip = pixels(1, 4, 3, 48, 48)
    seen = torch.stack([prompt(5, "v", 6), prompt(PAD, "v", 6)])
    for batch, inputs in ((ids, {}), (seen, {"pixel_values_videos": clip.repeat(2, 1, 1, 1, 1)})):
        videos = {name: torch.cat([value[:1]] * 2) for name, value in inputs.items()}
        if videos:
            videos["video_num_clips"] = torch.tensor([1, 1])
        mask = (batch != PAD).long()
        found = model.generate(batch, **videos, **SETTINGS)
        assert torch.equal(found, model.generate(batch, attention_mask=mask, **videos, **SETTINGS))
        with pytest.raises(ValueError, match=r"rows begin with \[0, 1\] times token 256"):
            model.generate(batch, **videos, max_new_tokens=2, eos_token_id=[END, PAD])


def test_a_static_cache_and_a_continued_one_change_no_answer(model):
    inputs, cache = video_prompt(), DynamicCache(config=model.config.get_text_config())
    greedy = model.generate(**inputs, **SETTINGS)
    assert torch.equal(model.generate(**inputs, **SETTINGS, cache_implementation="static"), greedy)
    assert torch.equal(model.generate(**inputs, **SETTINGS, past_key_values=cache), greedy)
    inputs["input_ids"] = torch.cat([greedy, torch.tensor([[9, 10]])], 1)
    again = model.generate(**inputs, **SETTINGS, past_key_values=cache)
    assert torch.equal(again, model.generate(**inputs, **SETTINGS))


def test_several_answers_of_one_prompt_see_its_video(model):
    inputs = video_prompt()
    torch.manual_seed(0)
    answers = model.generate(**inputs, **{**SETTINGS, "do_sample": True}, num_return_sequences=3)
    assert answers.shape == (3, inputs["input_ids"].shape[1] + 12)
    assert not {VIDEO, IMAGE} & set(answers[:, -12:].flatten().tolist())
