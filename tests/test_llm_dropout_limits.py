"""What the published system cannot do, or does wrongly, case by case, and what happens here instead.

Golden case by golden case of facts: every fact must have a test here, so that a new one is noticed.
"""

import pytest
import torch
from dropout_reference import WIDTH, build, kept_in_row, prompt, written_out
from helpers import golden_cases

from hico import HicoConfig, HicoForConditionalGeneration
from hico.llm_dropout import DropSchedule, patch
from hico.processing_hico import split_clips

FACTS = [fact for case in golden_cases("D") if "sdpa_generate_batch1" in case.facts for fact in case.facts]
SCHEDULE = "uniform@1:0.75,attention@3:0.25"
FIRST, LAST = [5, 20, 6], [3, 9, 4]
VIDEO = 260  # placeholder of the tiny preset

pytestmark = pytest.mark.golden


def row_logits(model, batch, row, *, attention="sdpa"):
    """Logits of a row written out, with the tokens that a plan kept."""
    model.set_attn_implementation(attention)
    with torch.no_grad():
        out = model(**batch.inputs)
        kept = kept_in_row(out.drop_plan, batch, row, [1, 3])
        expected = written_out(build(), batch.row(row).inputs_embeds[0], kept, positions="renumber")
    return out.logits[row][out.drop_plan.kept_indices[row] >= 0], expected


def prefills(attention, *rows, side="left", schedule=SCHEDULE):
    def check():
        model, batch = build(), prompt(*rows, side=side)
        patch(model, schedule)
        for row in range(len(rows)):
            actual, expected = row_logits(model, batch, row, attention=attention)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    return check


def generates(attention, *rows):
    def check():
        model, batch = build(attention=attention), prompt(*rows)
        patch(model, SCHEDULE)
        together = model.generate(**batch.inputs, max_new_tokens=4)
        exact = build()
        patch(exact, SCHEDULE)
        for row in range(len(rows)):
            assert torch.equal(together[row], exact.generate(**batch.row(row).inputs, max_new_tokens=4)[0])

    return check


def trains(attention, **options):
    def check():
        model, batch = build(attention=attention).train(), prompt(FIRST, LAST, side="right")
        labels = torch.full(batch.visual_mask.shape, -100)
        labels[0, 28:31], labels[1, 14:16] = 5, 7
        patch(model, SCHEDULE)
        out = model(**batch.inputs, labels=labels, **options)
        out.loss.backward()
        single, count = [], 0
        for row in range(2):
            alone, valid = batch.row(row), batch.valid(row)
            targets = labels[row : row + 1, valid]
            single.append(model(**alone.inputs, labels=targets).loss * (targets != -100).sum())
            count += (targets != -100).sum()
        torch.testing.assert_close(out.loss, sum(single) / count, rtol=1e-4, atol=1e-4)
        assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0

    return check


def refuses(make, words):
    def check():
        with pytest.raises(ValueError, match=words):
            make()

    return check


def text_is_plain(num_tokens, *, after_a_video):
    """Text alone, on a patched model, equals the plain model, whatever ran before."""

    def check():
        model, text = build(), torch.randn(1, num_tokens, WIDTH)
        expected = build()(inputs_embeds=text).logits
        patch(model, SCHEDULE)
        if after_a_video:
            model.generate(**prompt(FIRST).inputs, max_new_tokens=2)
        assert torch.equal(model(inputs_embeds=text).logits, expected)
        none_visual = torch.zeros(1, num_tokens, dtype=torch.long)
        assert torch.equal(model(inputs_embeds=text, visual_mask=none_visual).logits, expected)

    return check


def tiny_hico(dropout):
    torch.manual_seed(0)
    model = HicoForConditionalGeneration(HicoConfig.preset("tiny")).eval()
    if dropout:
        model.set_drop_schedule("uniform@1:0.5")
    return model


def answers(model, num_videos, num_clips=2):
    ids = torch.tensor([[1, 2, *([VIDEO] * 16 * num_clips + [3]) * num_videos, 4]])
    videos = torch.randn(num_videos * num_clips, 4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values_videos": videos, "video_num_clips": torch.tensor([num_clips] * num_videos)}
    return model.generate(ids, **(given if num_videos else {}), max_new_tokens=2, min_new_tokens=2)[0, -2:]


def full_model(dropout, check_model):
    return lambda: check_model(tiny_hico(dropout))


def text_before_any_video(model):
    assert torch.equal(answers(model, 0), answers(tiny_hico(False), 0))


def text_after_a_video(model):
    answers(model, 1)
    text_before_any_video(model)


def video_answers(model):
    assert torch.equal(answers(model, 1), answers(model, 1))


def two_videos_answer(model):
    assert len(answers(model, 2)) == 2


def video_without_placeholder_is_refused(model):
    with pytest.raises(ValueError, match="0 video placeholders, but the 1 video"):
        model.generate(torch.tensor([[1, 2]]), pixel_values_videos=torch.randn(2, 4, 3, 48, 48), max_new_tokens=2)


def six_frames_fill_their_last_clip(model):
    frames = torch.randn(6, 3, 48, 48)
    clips = split_clips(frames, model.config.clip_len)
    assert clips.shape[:2] == (2, 4)
    assert torch.equal(clips[1, 2:], frames[[5, 5]])


def small_images_are_refused(model):
    model.model.compressor.tokens_per_image = 64
    with pytest.raises(ValueError, match="cannot merge the 16 tokens of grid"):
        model(torch.tensor([[259] * 64]), pixel_values=torch.randn(1, 3, 48, 48))


INSTEAD = {
    "sdpa_generate_batch1": generates("sdpa", FIRST),
    "eager_impl_name": prefills("eager", FIRST),
    "eager_prefill_with_dropout": prefills("eager", FIRST),
    "eager_prefill_with_dropout_attention_mask_given": prefills("eager", FIRST, LAST),
    "eager_generate_with_dropout": generates("eager", FIRST, LAST),
    "eager_prefill_uniform": prefills("eager", FIRST, LAST, schedule="uniform@1:0.75,uniform@3:0.25"),
    "flash_generate_batch1": generates("unpadded", FIRST),
    "sdpa_generate_batch2_equal_lengths": generates("sdpa", FIRST, FIRST),
    "sdpa_prefill_only_batch2_equal_lengths": prefills("sdpa", FIRST, FIRST),
    "sdpa_train_batch2_padded": trains("sdpa"),
    "flash_train_batch2_padded": trains("unpadded", use_cache=False),
    "flash_train_batch2_padded_use_cache_default": trains("unpadded"),
    "tokenizer_model_max_length_unset": prefills("sdpa", FIRST),  # no tokenizer is asked
    "tokenizer_padding_side_left": prefills("sdpa", FIRST, LAST, side="left"),
    "attention_after_last_layer": refuses(lambda: patch(build(), "attention@4:0.5"), "beyond the decoder"),
    "uniform_after_last_layer": refuses(lambda: patch(build(), "uniform@4:0.5"), "beyond the decoder"),
    "no_dropout_state_set": text_is_plain(20, after_a_video=False),
    "text_only_12_tokens_after_a_video_call_stale_state": text_is_plain(12, after_a_video=True),
    "text_only_40_tokens_after_a_video_call_stale_state_hidden_len_shrinks": text_is_plain(40, after_a_video=True),
    "image_position_minus1_prefill": text_is_plain(40, after_a_video=False),
    "keep_zero_tokens": refuses(lambda: DropSchedule.parse("attention@3:0.0"), "above 0"),
    "keep_zero_tokens_uniform": refuses(lambda: DropSchedule.parse("uniform@3:0.0"), "above 0"),
    "first_ratio_half_prefill_len": refuses(
        lambda: DropSchedule.from_published("attention", [3], [0.5, 0.25]), "must start with 1.0"
    ),
    "unknown_type": refuses(
        lambda: DropSchedule.from_published("atention", [3], [1.0, 0.5]), "did you mean 'attention'"
    ),
    **{
        f"full_model_dropout_{word}_{fact}": full_model(dropout, check_model)
        for word, dropout in (("on", True), ("off", False))
        for fact, check_model in {
            "text_only_generate_before_any_video": text_before_any_video,
            "video": video_answers,
            "text_only_generate_after_a_video": text_after_a_video,
            "two_placeholders_two_videos": two_videos_answer,
            "no_placeholder_but_video_given": video_without_placeholder_is_refused,
            "6_frames_with_clips_of_4": six_frames_fill_their_last_clip,
            "image_of_36_patches": small_images_are_refused,
        }.items()
    },
}


@pytest.mark.parametrize("fact", FACTS)
def test_instead_of(fact):
    INSTEAD[fact]()
