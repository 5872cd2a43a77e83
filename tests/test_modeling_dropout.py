"""Progressive visual dropout through the whole model; `tests/test_llm_dropout*.py` test the hooks themselves."""

import copy

import pytest
import torch
from test_modeling_hico import VIDEO, flat, left_pad, mixed_batch, pixels, prompt, visual_inputs

from hico import HicoConfig, HicoForConditionalGeneration
from hico.llm_dropout import patch

SCHEDULE = "uniform@1:0.75,attention@3:0.25"


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    config = HicoConfig.preset("tiny")
    config.text_config.num_hidden_layers = 4
    config.text_config.layer_types = None
    return HicoForConditionalGeneration(HicoConfig(**config.to_dict())).eval().double()


@pytest.fixture
def model(plain):
    plain.set_drop_schedule(SCHEDULE)
    yield plain
    plain.set_drop_schedule(None)


def test_switching_off_restores_the_very_same_logits(plain):
    ids = prompt(1, "v", "v", 2)[None]
    inputs = {"pixel_values_videos": pixels(2, 4, 3, 48, 48)}
    with torch.no_grad():
        before = plain(ids, **inputs).logits
        plain.set_drop_schedule(SCHEDULE)
        dropped = plain(ids, **inputs).logits
        plain.set_drop_schedule(None)
        after = plain(ids, **inputs).logits
    assert dropped.shape[1] == 2 + 8
    assert torch.equal(before, after)


def test_a_padded_batch_equals_its_rows_one_by_one(model):
    rows, videos, images = mixed_batch()
    ids, mask = left_pad(rows)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, **visual_inputs(flat(videos), flat(images))).logits
        for i, row in enumerate(rows):
            single = model(row[None], **visual_inputs(videos[i], images[i])).logits[0]
            torch.testing.assert_close(batch[i, -len(single) :], single)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_of_a_batch_equals_its_rows(model, settings):
    rows, videos, images = mixed_batch()
    ids, mask = left_pad(rows)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 256, **settings}
    batch = model.generate(ids, attention_mask=mask, **visual_inputs(flat(videos), flat(images)), **settings)
    for i, row in enumerate(rows):
        single = model.generate(row[None], **visual_inputs(videos[i], images[i]), **settings)[0]
        assert batch[i, -5:].tolist() == single[-5:].tolist()


def test_the_loss_is_that_of_the_tokens_that_are_left(model):
    ids = prompt(1, "v", 2, 3, 4)[None]
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    inputs = {"pixel_values_videos": pixels(1, 4, 3, 48, 48), "labels": labels}
    evaluated = model(ids, **inputs)
    assert evaluated.logits.shape[1] == 4 + 4
    reference = torch.nn.functional.cross_entropy(evaluated.logits[0, -3:-1], ids[0, -2:])
    torch.testing.assert_close(evaluated.loss, reference.float())
    try:
        model.train()
        torch.testing.assert_close(model(ids, **inputs).loss, evaluated.loss)
    finally:
        model.eval()


def test_the_schedule_is_saved_with_the_model(model, tmp_path):
    model.set_drop_schedule(SCHEDULE, positions="keep")
    model.save_pretrained(tmp_path)
    again = HicoForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (again.config.drop_schedule, again.config.drop_options) == (SCHEDULE, {"positions": "keep"})
    assert not any("drop" in name for name in again.state_dict())
    ids = prompt(1, "v", 2)[None]
    inputs = {"pixel_values_videos": pixels(1, 4, 3, 48, 48)}
    with torch.no_grad():
        torch.testing.assert_close(again(ids, **inputs).logits, model(ids, **inputs).logits)


def test_a_copy_drops_by_itself(model):
    other = copy.deepcopy(model)
    model.set_drop_schedule(None)
    ids = prompt(1, "v", 2)[None]
    inputs = {"pixel_values_videos": pixels(1, 4, 3, 48, 48)}
    with torch.no_grad():
        assert other(ids, **inputs).logits.shape[1] == 6
        assert model(ids, **inputs).logits.shape[1] == 18
        other.set_drop_schedule(None)
        assert torch.equal(other(ids, **inputs).logits, model(ids, **inputs).logits)


def test_chunked_prefill_is_refused_and_a_wrong_schedule_is_named(model):
    ids = prompt(1, "v", 2)[None]
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, pixel_values_videos=pixels(1, 4, 3, 48, 48), prefill_chunk_size=8, max_new_tokens=2)
    for schedule, options in (("uniform@4:0.5", {}), ("uniform@1:0.5", {"positions": "both"}), ("unifrm@1:0.5", {})):
        with pytest.raises(ValueError, match=r"beyond the decoder, whose 4 layers|unknown positions|did you mean"):
            model.set_drop_schedule(schedule, **options)
        assert model.config.drop_schedule == SCHEDULE
        with torch.no_grad():
            assert model(ids, pixel_values_videos=pixels(1, 4, 3, 48, 48)).logits.shape[1] == 2 + 4
    with pytest.raises(ValueError, match="beyond the decoder, whose 2 layers"):
        HicoConfig.preset("tiny", drop_schedule="uniform@2:0.5")
    assert (ids == VIDEO).sum() == 16


def test_rotary_frequencies_stay_float32():
    model = HicoForConditionalGeneration(HicoConfig.preset("tiny")).to(torch.bfloat16)
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_patching_the_whole_model_is_setting_its_schedule(plain):
    ids, inputs = prompt(1, "v", 2)[None], {"pixel_values_videos": pixels(1, 4, 3, 48, 48)}
    with torch.no_grad():
        plain.set_drop_schedule(SCHEDULE)
        expected, tokens = plain(ids, **inputs).logits, plain.generate(ids, **inputs, max_new_tokens=4)
        plain.set_drop_schedule(None)
        with patch(plain, SCHEDULE):
            assert torch.equal(plain(ids, **inputs).logits, expected)
            cached = plain.generate(ids, **inputs, max_new_tokens=4, return_dict_in_generate=True)
        assert torch.equal(cached.sequences, tokens)
        lengths = [cached.past_key_values.get_seq_length(layer) for layer in range(4)]
        assert lengths == [n + 3 for n in (18, 14, 14, 6)]
        assert plain(ids, **inputs).logits.shape[1] == 18


def test_an_unknown_option_leaves_the_old_schedule_in_force(model):
    with pytest.raises(TypeError, match="position"):
        model.set_drop_schedule("uniform@1:0.5", position="keep")
    ids = prompt(1, "v", 2)[None]
    with torch.no_grad():
        assert model(ids, pixel_values_videos=pixels(1, 4, 3, 48, 48)).logits.shape[1] == 2 + 4


@torch.no_grad()
def test_logits_are_asked_for_by_position(model):
    ids, inputs = prompt(1, "v", 2)[None], {"pixel_values_videos": pixels(1, 4, 3, 48, 48)}
    whole = model(ids, **inputs).logits
    chosen = model(ids, **inputs, logits_to_keep=torch.tensor([0, 5])).logits
    torch.testing.assert_close(chosen, whole[:, [0, 5]])


@torch.no_grad()
def test_the_output_says_which_tokens_its_logits_belong_to(model):
    rows, videos, images = mixed_batch()
    ids, mask = left_pad(rows)
    inputs = {"attention_mask": mask, **visual_inputs(flat(videos), flat(images))}
    output = model(ids, **inputs)
    assert output.drop_plan.kept_indices.shape == output.logits.shape[:2]
    kept = output.drop_plan.gather(ids, fill=-1)
    assert kept[0, -4:].tolist() == rows[0].tolist()  # a row of text keeps all of it
    assert (kept == VIDEO).sum() < (ids == VIDEO).sum()
    model.set_drop_schedule(None)
    assert model(ids, **inputs).drop_plan is None
