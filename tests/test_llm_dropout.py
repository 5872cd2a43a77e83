"""Laws of progressive visual dropout, on stock decoders of several kinds."""

import copy
import warnings

import pytest
import torch
from dropout_reference import (
    BOTH_SIDES,
    DECODERS,
    EVERY_BATCH,
    EVERY_POSITION,
    EVERY_SCHEDULE,
    NUM_LAYERS,
    ROWS,
    WIDTH,
    build,
    close,
    kept_in_row,
    prompt,
    stage_layers,
    written_out,
)

from hico.llm_dropout import patch


@pytest.fixture
def in_eager_flex():
    """Run flex attention without compiling it, which takes minutes on a CPU."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Dropping nothing


@pytest.mark.parametrize("attention", ["sdpa", "eager", "unpadded"])
@pytest.mark.parametrize("schedule", ["none@1:0.5", "attention@1:1.0,uniform@2:1.0", "uniform@2:999", None])
@BOTH_SIDES
@torch.no_grad()
def test_dropping_nothing_equals_the_plain_llm(schedule, side, attention):
    model, batch = build(attention=attention), prompt([5, 14, 4], [3, 6, 2], [9], side=side)
    visual_mask = batch.visual_mask
    plain = model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask)
    with patch(model, schedule):
        dropped = model(**batch.inputs)
    assert torch.equal(dropped.logits, plain.logits)
    for layer in range(NUM_LAYERS):
        assert torch.equal(dropped.past_key_values.layers[layer].keys, plain.past_key_values.layers[layer].keys)
    assert visual_mask is batch.visual_mask


@torch.no_grad()
def test_text_alone_is_untouched():
    model, batch = build(), prompt([5, 14, 4], [3, 6, 2])
    plain = model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask).logits
    with patch(model, "uniform@1:0.5"):
        for mask in (None, torch.zeros_like(batch.visual_mask), torch.zeros_like(batch.visual_mask, dtype=torch.bool)):
            out = model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, visual_mask=mask)
            assert torch.equal(out.logits, plain)
            assert not hasattr(out, "drop_plan")


# Rows, batches, padding and caches


@EVERY_SCHEDULE
@EVERY_BATCH
@BOTH_SIDES
@EVERY_POSITION
@torch.no_grad()
def test_a_batch_equals_its_rows_written_out(schedule, rows, side, positions):
    model, batch = build(), prompt(*rows, side=side)
    reference = copy.deepcopy(model)
    patch(model, schedule, positions=positions)
    out = model(**batch.inputs)
    for row in range(len(batch)):
        real = out.drop_plan.kept_indices[row] >= 0
        alone = batch.row(row)
        kept = kept_in_row(out.drop_plan, batch, row, stage_layers(schedule))
        expected = written_out(reference, alone.inputs_embeds[0], kept, positions=positions)
        close(out.logits[row, real][-len(expected) :], expected)  # a row that lost nothing may still be padded
        single = model(**alone.inputs)
        close(single.logits[0], expected)
        if hasattr(single, "drop_plan"):
            for layer, columns in kept.items():
                assert torch.equal(single.drop_plan.kept_at(layer)[0], columns)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "unpadded", "flex_attention"])
@pytest.mark.parametrize("name", DECODERS)
@EVERY_POSITION
@BOTH_SIDES
@torch.no_grad()
def test_every_decoder_and_attention_equals_the_row_written_out(name, attention, positions, side, in_eager_flex):
    model, batch = build(name, attention), prompt([5, 14, 4], [3, 6, 2], [4, 7, 1, 8, 1], side=side)
    reference = build(name)
    schedule = "attention@1:0.5,uniform@3:0.25"
    patch(model, schedule, positions=positions)
    out = model(**batch.inputs)
    for row in range(len(batch)):
        kept = kept_in_row(out.drop_plan, batch, row, [1, 3])
        expected = written_out(reference, batch.row(row).inputs_embeds[0], kept, positions=positions)
        close(out.logits[row, out.drop_plan.kept_indices[row] >= 0], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "unpadded", "flex_attention"])
@pytest.mark.parametrize("rows", [ROWS["one_length"], ROWS["ragged"]], ids=["one_length", "ragged"])
@EVERY_POSITION
@BOTH_SIDES
@torch.no_grad()
def test_cached_decoding_equals_a_full_forward(rows, positions, side, attention, in_eager_flex):
    check_cached_decoding(build(attention=attention), "attention@1:0.5,uniform@3:0.2", rows, positions, side)


@EVERY_SCHEDULE
@EVERY_POSITION
@torch.no_grad()
def test_cached_decoding_equals_a_full_forward_for_every_schedule(schedule, positions):
    check_cached_decoding(build(), schedule, ROWS["many_spans"], positions, "left")


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_cached_decoding_equals_a_full_forward_for_every_decoder(name):
    check_cached_decoding(build(name), "attention@1:0.5,uniform@3:0.2", ROWS["ragged"], "renumber", "left")


def check_cached_decoding(model, schedule, rows, positions, side, num_steps=3):
    """Decode with explicit positions, so that right padding works too, and compare with the row written out."""
    batch = prompt(*rows, side=side)
    reference = build(next(name for name in DECODERS if same_config(model, name)))
    patch(model, schedule, positions=positions)
    out = model(**batch.inputs, use_cache=True)
    plan, cache = out.drop_plan, out.past_key_values
    lengths = [plan.kept_at(layer).shape[1] for layer in range(NUM_LAYERS)]
    assert lengths[-1] < lengths[0]

    mask = batch.attention_mask
    counts = torch.tensor([len(batch.valid(row)) for row in range(len(batch))])
    # Without positions of its own a prefill numbers the columns, left padding included.
    after_prefill = torch.where(torch.tensor(side == "left"), batch.inputs_embeds.shape[1], counts)[:, None]
    steps = torch.randn(num_steps, len(batch), 1, WIDTH, generator=torch.Generator().manual_seed(1))
    logits = []
    for step, embeds in enumerate(steps):
        assert [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)] == [n + step for n in lengths]
        mask = None if mask is None else torch.cat([mask, torch.ones(len(batch), 1, dtype=torch.long)], 1)
        out = model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=after_prefill + step, past_key_values=cache
        )
        logits.append(out.logits[:, 0])
    for row in range(len(batch)):
        num_prompt = counts[row].item()
        new = torch.arange(num_prompt, num_prompt + num_steps)
        kept = kept_in_row(plan, batch, row, stage_layers(schedule))
        kept = {layer: torch.cat([columns, new]) for layer, columns in kept.items()}
        embeds_SE = torch.cat([batch.row(row).inputs_embeds[0], steps[:, row, 0]])
        expected = written_out(reference, embeds_SE, kept, positions=positions)
        close(torch.stack(logits)[:, row], expected[-num_steps:])


def same_config(model, name):
    other = DECODERS[name]().config
    keys = ("model_type", "sliding_window", "layer_types")
    return all(getattr(model.config, key, None) == getattr(other, key, None) for key in keys)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "unpadded"])
@EVERY_POSITION
@torch.no_grad()
def test_a_second_prefill_equals_one_over_both(positions, attention):
    """Two turns with a video each: the second call drops its own tokens and sees what the first left."""
    model, first, second = (
        build(attention=attention),
        prompt([4, 12, 3], [5, 9, 5]),
        prompt([2, 10, 4], [2, 8, 6], seed=1),
    )
    reference = build()
    schedule = "attention@1:0.5,uniform@3:0.25"
    patch(model, schedule, positions=positions)
    out = model(**first.inputs, use_cache=True)
    again = model(**second.inputs, past_key_values=out.past_key_values, use_cache=True)
    step = torch.randn(2, 1, WIDTH)
    last = model(inputs_embeds=step, past_key_values=again.past_key_values)
    for row in range(2):
        kept = {}
        for layer in stage_layers(schedule):
            before = out.drop_plan.kept_at(layer)[row]
            after = again.drop_plan.kept_at(layer)[row]
            kept[layer] = torch.cat([before[before >= 0], after[after >= 0] + 19, torch.tensor([35])])
        embeds_SE = torch.cat([first.inputs_embeds[row], second.inputs_embeds[row], step[row]])
        expected = written_out(reference, embeds_SE, kept, positions=positions)
        real = again.drop_plan.kept_indices[row] >= 0
        close(again.logits[row, real], expected[-1 - real.sum() : -1])
        close(last.logits[row, 0], expected[-1])


@torch.no_grad()
def test_scores_of_a_second_prefill_count_the_cached_keys():
    model, first, second = build(attention="eager"), prompt([6]), prompt([2, 10, 4], seed=1)
    out = model(inputs_embeds=first.inputs_embeds, use_cache=True)
    whole = torch.cat([first.inputs_embeds, second.inputs_embeds], 1)
    weights = model(inputs_embeds=whole, output_attentions=True).attentions[2][0, :, -1, 6:].mean(0)
    patch(model, "attention@2:0.5")
    out = model(**second.inputs, past_key_values=out.past_key_values, use_cache=True)
    close(out.drop_plan.scores_at(2)[0], weights)


@torch.no_grad()
def test_rows_of_a_cache_can_move():
    model, batch = build(), prompt([5, 14, 4], [3, 6, 2], [4, 7, 1, 8, 1])
    patch(model, "attention@1:0.5,uniform@3:0.25")
    step = {"inputs_embeds": torch.randn(3, 1, WIDTH), "attention_mask": torch.ones(3, 24, dtype=torch.long)}
    step["attention_mask"][:, :-1] = batch.attention_mask
    cache = model(**batch.inputs, use_cache=True).past_key_values
    expected = model(**step, past_key_values=copy.deepcopy(cache)).logits

    order = torch.tensor([2, 0, 1])
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(order)
    close(model(**{k: v[order] for k, v in step.items()}, past_key_values=reordered).logits, expected[order])

    chosen = torch.tensor([2, 1])
    selected = copy.deepcopy(cache)
    selected.batch_select_indices(chosen)
    close(model(**{k: v[chosen] for k, v in step.items()}, past_key_values=selected).logits, expected[chosen])

    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    twice = {k: v.repeat_interleave(2, 0) for k, v in step.items()}
    close(model(**twice, past_key_values=repeated).logits, expected.repeat_interleave(2, 0))

    cache.reset()
    if cache.get_seq_length() == 0:
        assert torch.equal(model(**batch.inputs, past_key_values=cache).logits, model(**batch.inputs).logits)
