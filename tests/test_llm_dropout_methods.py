"""Scores of the layer before, merging of what is dropped, and the schedules of published methods."""

import pytest
import torch
from dropout_reference import BOTH_SIDES, ROWS, WIDTH, build, close, kept_in_row, prompt, slowly, stage_layers

from hico.llm_dropout import DropSchedule, patch
from hico.llm_dropout.merging import average_into, find_targets
from hico.llm_dropout.policies import AttentionMergePolicy

METHODS = {
    "before_layer_1": "attention@1:0.5:previous",
    "fastv": "fastv",
    "previous_after_a_drop": "attention@1:0.6,attention@2:0.3:previous",
    "previous_then_own": "attention@2:0.5:previous,attention@3:0.25",
    "merge": "attention_merge@2:0.5",
    "merge_twice": "attention_merge@1:0.6:previous,attention_merge@2:0.3",
    "pyramiddrop": "pyramiddrop@1/2/3:0.5/0.25/0.125",
}
EVERY_METHOD = pytest.mark.parametrize("schedule", METHODS.values(), ids=METHODS)


def exactly(schedule, **options):
    """Build a patched model in float64 and its stock twin, whose eager attention shows its weights."""
    model, twin = build().double(), build(attention="eager").double()
    patch(model, schedule, **options)
    return model, twin


def in_float64(batch):
    batch.inputs_embeds = batch.inputs_embeds.double()
    return batch


@EVERY_METHOD
@BOTH_SIDES
@torch.no_grad()
def test_every_method_equals_its_slow_restatement(schedule, side):
    (model, twin), batch = exactly(schedule), in_float64(prompt(*ROWS["many_spans"], [9], side=side))
    out = model(**batch.inputs)
    for row in range(len(batch)):
        alone = batch.row(row)
        expected, kept = slowly(twin, alone.inputs_embeds[0], alone.visual_mask[0], schedule)
        for layer, columns in kept_in_row(out.drop_plan, batch, row, stage_layers(schedule)).items():
            assert torch.equal(columns, kept[layer])
        real = out.drop_plan.valid_at(3)[row]
        # Eager attention rounds its weights to float32.
        torch.testing.assert_close(out.logits[row, real], expected, rtol=1e-5, atol=1e-5)


@EVERY_METHOD
def test_gradients_equal_those_of_the_slow_restatement(schedule):
    (model, twin), batch = exactly(schedule), in_float64(prompt([4, 12, 1, 5, 3]))
    model.set_attn_implementation("eager")  # which rounds its weights to float32, as the twin's does
    by_hand = batch.inputs_embeds[0].clone().requires_grad_()
    slowly(twin, by_hand, batch.visual_mask[0], schedule)[0].square().mean().backward()
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        embeds = batch.inputs_embeds.clone().requires_grad_()
        model(inputs_embeds=embeds, visual_mask=batch.visual_mask, use_cache=False).logits.square().mean().backward()
        torch.testing.assert_close(embeds.grad[0], by_hand.grad, rtol=1e-4, atol=1e-7)
        for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-7)


@EVERY_METHOD
@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_generation_is_the_same_with_and_without_a_cache_alone_and_in_a_batch(schedule, positions):
    model, batch = build(), prompt(*ROWS["ragged"])
    patch(model, schedule, positions=positions)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**batch.inputs, **how)
    assert torch.equal(model.generate(**batch.inputs, use_cache=False, **how), cached)
    for row in range(len(batch)):
        assert torch.equal(model.generate(**batch.row(row).inputs, **how)[0], cached[row])


@torch.no_grad()
def test_scores_of_the_layer_before_count_the_keys_that_it_has_cached():
    model, first, second = build(attention="eager"), prompt([6]), prompt([2, 10, 4], seed=1)
    whole = torch.cat([first.inputs_embeds, second.inputs_embeds], 1)
    weights = model(inputs_embeds=whole, output_attentions=True).attentions[1][0, :, -1, 6:].mean(0)
    out = model(inputs_embeds=first.inputs_embeds, use_cache=True)
    patch(model, "attention@2:0.5:previous")
    out = model(**second.inputs, past_key_values=out.past_key_values, use_cache=True)
    close(out.drop_plan.scores_at(2)[0], weights)


@pytest.mark.parametrize("schedule", ["attention_merge@1:1.0:previous", "attention_merge@2:1.0", "fastv@1:1.0"])
@torch.no_grad()
def test_keeping_everything_changes_nothing(schedule):
    model, batch = build(), prompt([5, 14, 4], [3, 6, 2])
    plain = model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask).logits
    patch(model, schedule)
    assert torch.equal(model(**batch.inputs).logits, plain)


@torch.no_grad()
def test_merging_keeps_the_sum_of_each_video_and_what_stays_apart():
    hidden = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    groups = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2, 0], [-1, -1, 0, 1, 1, 1, 0, 2, 2]])
    kept = torch.tensor([[1, 0, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1, 0, 0]]).bool()
    into = find_targets(AttentionMergePolicy(), hidden, groups, kept)
    assert into[1].tolist() == [0, 1, 2, 3, 3, 3, 6, 7, 8]  # nothing stays of the second video: it is not merged
    merged, sizes = average_into(hidden, into), torch.stack([row.bincount(minlength=9) for row in into])
    first = groups[0] == 1
    assert kept[0, into[0]].all()
    assert (groups[0, into[0]] == groups[0]).all()
    total = (merged[0, first] * sizes[0, first, None])[kept[0, first]].sum(0)
    torch.testing.assert_close(total, hidden[0, first].sum(0))
    assert torch.equal(merged[0, ~first], hidden[0, ~first])
    assert find_targets(AttentionMergePolicy(), hidden, groups, torch.ones_like(kept)) is None


@torch.no_grad()
def test_a_budget_that_leaves_nothing_of_a_video_merges_the_others():
    model, batch = build(), prompt([2, 20, 1, 2, 3])
    patch(model, "attention_merge@1:3")
    assert model(**batch.inputs).logits.shape[1] == 2 + 1 + 3 + 3


@pytest.mark.parametrize(
    ("named", "general"),
    [
        ("fastv", "attention@2:0.5:previous"),
        ("fastv@3:64", "attention@3:64:previous"),
        ("fastv@3", "attention@3:0.5:previous"),
        ("pyramiddrop", "attention@8:0.5,attention@16:0.25,attention@24:0.125"),
        ("pyramiddrop@7/14/21:0.5/0.3/0.1", "attention@7:0.5,attention@14:0.3,attention@21:0.1"),
        ("videochat_flash", "uniform@4:0.75,attention@18:0.25"),
        ("fastv , attention_merge@18:0.25", "attention@2:0.5:previous,attention_merge@18:0.25"),
        ([{"policy": "fastv"}], "attention@2:0.5:previous"),
        ([{"policy": "fastv", "layer": 3, "keep": 0.25}], "attention@3:0.25:previous"),
        (["videochat_flash@2/9:0.5/0.1"], "uniform@2:0.5,attention@9:0.1"),
        ([{"policy": "videochat_flash", "layer": [2, 9]}], "uniform@2:0.75,attention@9:0.25"),
    ],
)
def test_named_schedules_expand_to_the_general_form(named, general):
    schedule = DropSchedule.parse(named)
    assert str(schedule) == general
    assert DropSchedule.parse(general) == DropSchedule.parse(schedule.to_list()) == schedule


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("attention@2:0.5:next", "takes scores from 'next'; choose one of own, previous"),
        ("uniform@2:0.5:previous", "takes scores from another layer, and 'uniform' asks for none"),
        ("fastv@2:0.5:own", "cannot read 'fastv@2:0.5:own'"),
        ("attention@2:0.5:own:more", "cannot read 'attention@2:0.5:own:more'"),
        ("pyramiddrop@8:0.5", r"pyramiddrop drops 3 times, and layer is \[8\]; give one for each, or none"),
        ("attention@8/16:0.5", r"layer \[8, 16\]"),
        ("fastvv", "or name one of fastv, pyramiddrop, videochat_flash"),
        ([{"policy": "fastv", "seed": 3}], "cannot read"),
    ],
)
def test_what_cannot_be_read_is_named(spec, words):
    with pytest.raises(ValueError, match=words):
        DropSchedule.parse(spec)
