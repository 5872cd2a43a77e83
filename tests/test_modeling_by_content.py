"""Videos whose content decides how many tokens they take: prompts, masks, positions and labels are shortened alike."""

import pytest
import torch
from test_modeling_hico import VIDEO, flat, left_pad, pixels, visual_inputs
from test_modeling_video_compressor import batch_of, model, moving, plain, prompt  # noqa: F401

from hico import HicoConfig
from hico.ops.trimming import trim_rows
from hico.video_compressors.base import refuse_by_content

SPEC = {"name": "dtd", "threshold": 0.6}


@pytest.fixture
def thinning(model):  # noqa: F811
    model.set_video_compressor(SPEC)
    return model


def by_hand(model, row, videos):  # noqa: F811
    """Return the row with as many placeholders as its videos have tokens, and those tokens."""
    with torch.no_grad():
        tokens = model.model.get_video_features(
            torch.cat(videos), torch.tensor([len(clips) for clips in videos], dtype=torch.long)
        )
    runs, ids = iter(tokens), []
    for token in row.tolist():
        if token != VIDEO:
            ids.append(token)
        elif not ids or ids[-1] != VIDEO:
            ids += [VIDEO] * len(next(runs))
    return torch.tensor(ids), tokens


@torch.no_grad()
def test_a_prompt_is_read_as_if_it_had_been_written_for_what_is_left(thinning):
    clips = [moving(4), moving(3)]
    row = prompt(thinning, 1, "4", 2, "3", 3, 4)
    output = thinning(row[None], **visual_inputs(clips, []))
    short, tokens = by_hand(thinning, row, clips)
    assert len(short) < len(row)
    expected = thinning(short[None], visual_embeds=tokens).logits
    torch.testing.assert_close(output.logits, expected)
    assert output.trim.gather(row[None])[0].tolist() == short.tolist()
    torch.testing.assert_close(thinning(row[None], visual_embeds=tokens).logits, expected)
    positions = torch.arange(len(row))[None] + 7
    moved = thinning(row[None], position_ids=positions, **visual_inputs(clips, [])).logits
    torch.testing.assert_close(moved, expected)  # rotary positions are relative, and have no gaps


@torch.no_grad()
def test_rows_padded_on_either_side_or_not_at_all_equal_rows_alone(thinning):
    rows, videos, images = batch_of(thinning)
    inputs = visual_inputs(flat(videos), flat(images))
    singles = [thinning(row[None], **visual_inputs(videos[i], images[i])).logits[0] for i, row in enumerate(rows)]
    ids, mask = left_pad(rows)
    width = ids.shape[1]
    right = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=256) for row in rows])
    right_mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    for given, its_mask, left in ((ids, mask, True), (right, right_mask, False)):
        logits = thinning(given, attention_mask=its_mask, **inputs).logits
        for i, single in enumerate(singles):
            of_row = logits[i, -len(single) :] if left else logits[i, : len(single)]
            torch.testing.assert_close(of_row, single)
    still, lively = pixels(1, 4, 3, 48, 48).repeat(3, 1, 1, 1, 1), pixels(3, 4, 3, 48, 48)
    pair = prompt(thinning, 1, "3", 2).repeat(2, 1)
    output = thinning(pair, **visual_inputs([still, lively], []))
    for i, clips in enumerate((still, lively)):
        single = thinning(pair[:1], **visual_inputs([clips], [])).logits[0]
        torch.testing.assert_close(output.logits[i, -len(single) :], single)
    assert (output.trim.columns_BN[0] == -1).any()


@torch.no_grad()
def test_a_schedule_behind_it_is_right_for_rows_of_any_length(thinning):
    rows, videos, images = batch_of(thinning)
    ids, mask = left_pad(rows)
    thinning.set_drop_schedule("uniform@1:0.5", positions="keep")
    output = thinning(ids, attention_mask=mask, **visual_inputs(flat(videos), flat(images)))
    for i, row in enumerate(rows):
        single = thinning(row[None], **visual_inputs(videos[i], images[i]))
        torch.testing.assert_close(output.logits[i, -single.logits.shape[1] :], single.logits[0])
    left = output.drop_plan.gather(output.trim.gather(ids, fill=-1), fill=-1)
    assert left[0, -4:].tolist() == rows[0].tolist()
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    batch = thinning.generate(ids, attention_mask=mask, **visual_inputs(flat(videos), flat(images)), **settings)
    for i, row in enumerate(rows):
        single = thinning.generate(row[None], **visual_inputs(videos[i], images[i]), **settings)
        assert single[0, -3:].tolist() == batch[i, -3:].tolist()


def test_packed_rows_keep_to_themselves(thinning):
    clips = [moving(4), moving(3)]
    parts = [prompt(thinning, 1, "4", 2, 3), prompt(thinning, 4, "3", 5, 6, 7)]
    ids = torch.cat(parts)[None]
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    labels = torch.where(ids == VIDEO, -100, ids)
    packed = thinning(ids, position_ids=positions, labels=labels, use_cache=False, **visual_inputs(clips, []))
    alone = [
        thinning(part[None], use_cache=False, **visual_inputs([video], [])).logits[0]
        for part, video in zip(parts, clips, strict=True)
    ]
    torch.testing.assert_close(packed.logits[0], torch.cat(alone))
    assert packed.trim.renumber(positions)[0].tolist() == [*range(len(alone[0])), *range(len(alone[1]))]


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}], ids=str
)
def test_generated_sequences_begin_with_the_prompt_that_was_given(thinning, settings):
    rows, videos, images = batch_of(thinning)
    ids, mask = left_pad(rows)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 256, **settings}
    inputs = visual_inputs(flat(videos), flat(images))
    output = thinning.generate(ids, attention_mask=mask, **inputs, **settings, return_dict_in_generate=True)
    count = settings.get("num_return_sequences", 1)
    assert torch.equal(output.sequences[:, :-3], ids.repeat_interleave(count, 0))
    unmasked = thinning.generate(ids, **inputs, **settings)
    assert torch.equal(unmasked, output.sequences)
    for i, row in enumerate(rows):
        single = thinning.generate(row[None], **visual_inputs(videos[i], images[i]), **settings)
        assert single[:, -3:].tolist() == output.sequences[i * count : (i + 1) * count, -3:].tolist()


@torch.no_grad()
def test_videos_back_to_back_are_told_apart_by_their_pixels_and_not_by_their_tokens(thinning):
    clips = [moving(4), moving(3)]
    row = prompt(thinning, 1, "4", "3", 2)
    output = thinning(row[None], **visual_inputs(clips, []))
    tokens = [video.tokens_KD for video in output.videos]
    assert output.logits.shape[1] == 2 + sum(map(len, tokens))
    spans = thinning.model.prepare(row[None], **visual_inputs(clips, [])).visual_mask[0]
    assert spans.bincount().tolist() == [2, len(tokens[0]), len(tokens[1])]
    with pytest.raises(ValueError, match="the prompt has 112 video or image placeholders"):
        thinning(row[None], visual_embeds=tokens)


def test_where_counts_must_be_known_the_place_is_named(thinning):
    row, inputs = prompt(thinning, 1, "4", 2)[None], visual_inputs([moving(4)], [])
    message = r"embed, which returns as many .* must know how many tokens .*DTDVideoCompressor.*use one of divprune"
    with pytest.raises(ValueError, match=message):
        thinning.model.embed(row, **inputs)
    refuse_by_content(None, "nothing")
    thinning.set_video_compressor("uniform")
    refuse_by_content(thinning.model.video_compressor, "nothing")
    config = HicoConfig.preset("tiny", video_compressor=SPEC)
    assert not config.vision.has_exact_counts
    assert HicoConfig.preset("tiny", video_compressor="evs").vision.has_exact_counts
    assert HicoConfig.preset("tiny").vision.has_exact_counts


def test_trimming_pads_on_the_side_where_rows_were_padded():
    keep = torch.tensor([[True, False, True, True], [True, True, True, True]])
    trim, mask = trim_rows(keep, None)
    assert trim.columns_BN.tolist() == [[-1, 0, 2, 3], [0, 1, 2, 3]]
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    trim, mask = trim_rows(keep, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    assert trim.columns_BN.tolist() == [[0, 2, -1, -1], [0, 1, 2, 3]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    trim, mask = trim_rows(keep[:1], None)
    assert mask is None
    assert trim.renumber(torch.tensor([[4, 5, 6, 7]])).tolist() == [[4, 5, 6]]
    assert trim.gather(torch.tensor([[1, 2, 3, 4]])).tolist() == [[1, 3, 4]]
