"""Laws of progressive visual dropout, on stock decoders of several kinds."""

import copy
import threading
import warnings

import pytest
import torch
from dropout_reference import DECODERS, NUM_LAYERS, WIDTH, build, kept_in_row, prompt, written_out
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from hico.llm_dropout import DropSchedule, patch
from hico.llm_dropout.queries import QUERY_ROWS
from hico.registry import DROP_POLICIES

SCHEDULES = {
    "two_stages": "uniform@1:0.6,attention@3:0.3",
    "attention_twice": "attention@1:0.5,attention@2:0.25",
    "random": "random@2:0.4",
    "budget": "attention@1:9,uniform@3:5",
    "none_between": "uniform@1:0.5,none@2:0.5,random@3:0.2",
}
ROWS = {
    "even": ([4, 12, 3], [4, 12, 3]),
    "one_length": ([4, 12, 5], [6, 5, 10]),  # no padding before the drop, some after it
    "ragged": ([5, 14, 4], [3, 6, 2], [9]),  # the last row is text alone
    "many_spans": ([2, 7, 1, 8, 3], [3, 3, 0, 9, 4, 5, 2], [2, 11, 4]),
    "ends_visual": ([3, 12], [4, 6, 3]),
}
BOTH_SIDES = pytest.mark.parametrize("side", ["left", "right"])
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
EVERY_BATCH = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
EVERY_POSITION = pytest.mark.parametrize("positions", ["renumber", "keep"])


def stage_layers(schedule):
    return [stage.layer for stage in DropSchedule.parse(schedule).stages]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order


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


# Which tokens


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_scores_are_the_attention_of_the_last_prompt_token(name):
    model, batch = build(name, "eager"), prompt([5, 14, 4], [3, 6, 2])
    layer = 2
    weights = model(
        inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, output_attentions=True
    ).attentions[layer]
    patch(model, f"attention@{layer}:0.5")
    plan = model(**batch.inputs).drop_plan
    real = batch.attention_mask.bool()
    close(plan.scores_at(layer)[real], weights[:, :, -1].mean(1)[real])
    for row in range(2):
        visual = batch.visual_mask[row].nonzero()[:, 0]
        # Beyond a sliding window scores tie at zero: then the earlier token stays.
        order = plan.scores_at(layer)[row, visual].argsort(descending=True, stable=True)
        best = visual[order[: len(visual) // 2]].sort().values
        assert torch.equal(kept_visual(plan, batch, row, layer), best)


def kept_visual(plan, batch, row, layer):
    columns = plan.kept_at(layer)[row]
    return columns[(columns >= 0) & (batch.visual_mask[row, columns.clamp(min=0)] > 0)]


@pytest.mark.parametrize("queries", QUERY_ROWS)
@BOTH_SIDES
@torch.no_grad()
def test_scores_are_averaged_over_the_query_rows(queries, side):
    model, batch = build(attention="eager"), prompt([5, 14, 4, 6, 6], [3, 6, 8], side=side)
    labels = torch.full(batch.visual_mask.shape, -100)
    valid = [batch.valid(row) for row in range(2)]
    for row, labelled in enumerate([[0, 19, 25, 26, 31, 32], []]):
        labels[row, valid[row][labelled]] = 7
    expected_rows = {
        "last_prompt": [[30], [16]],
        "before_answers": [[18, 24, 30], [16]],
        "auto": [[18, 24, 30], [16]],
        "published": [[18, 24, 30, 34], []],
        "all_text": [[1, 2, 3, 4, 20, 21, 22, 29, 30, 33, 34], [0, 1, 2, *range(9, 17)]],
    }[queries]
    weights = model(
        inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, output_attentions=True
    ).attentions[1]
    patch(model, "attention@1:0.5", queries=queries)
    plan = model(**batch.inputs, labels=labels).drop_plan
    for row, rows in enumerate(expected_rows):
        if rows:
            close(plan.scores_at(1)[row, valid[row]], weights[row, :, valid[row][rows]].mean((0, 1))[valid[row]])
        else:
            assert len(kept_visual(plan, batch, row, 1)) == (batch.visual_mask[row] > 0).sum()


@torch.no_grad()
def test_span_scope_shares_and_row_scope_competes():
    model, batch = build(), prompt([2, 20, 1, 8, 3])
    with patch(model, "attention@1:0.5") as handle:
        plan = model(**batch.inputs).drop_plan
        spans = batch.visual_mask[0, kept_visual(plan, batch, 0, 1)]
        assert spans.bincount()[1:].tolist() == [10, 4]
        assert handle.schedule == DropSchedule.parse("attention@1:0.5")
    with patch(model, "attention@1:0.5", scope="row"):
        plan = model(**batch.inputs).drop_plan
        visual = batch.visual_mask[0].nonzero()[:, 0]
        best = visual[plan.scores_at(1)[0, visual].topk(14).indices].sort().values
        assert torch.equal(kept_visual(plan, batch, 0, 1), best)
    for scope in ("span", "row"):
        with patch(model, "uniform@1:7", scope=scope):
            assert len(kept_visual(model(**batch.inputs).drop_plan, batch, 0, 1)) == 7


@torch.no_grad()
def test_bool_masks_and_span_numbers_agree():
    model, batch = build(), prompt([2, 9, 1, 8, 3], [1, 5, 4, 12, 1])
    patch(model, "attention@1:0.4")
    by_number = model(**batch.inputs)
    batch.visual_mask = batch.visual_mask > 0
    assert torch.equal(model(**batch.inputs).drop_plan.kept_indices, by_number.drop_plan.kept_indices)


@torch.no_grad()
def test_the_last_token_and_one_of_each_span_always_stay():
    model, batch = build(), prompt([3, 12, 1, 2, 1, 7])
    for policy in DROP_POLICIES.names():
        with patch(model, f"{policy}@1:0.1"):
            kept = kept_visual(model(**batch.inputs).drop_plan, batch, 0, 1)
            assert set(batch.visual_mask[0, kept].tolist()) == {1, 2, 3}
            assert kept[-1] == 25


@torch.no_grad()
def test_random_policy_depends_on_seed_layer_and_span_alone():
    model, batch = build(), prompt([2, 16, 1, 16, 3])
    kept = []
    for schedule, seed in [("random@1:0.5", 0), ("random@1:0.5", 0), ("random@1:0.5", 1), ("random@2:0.5", 0)]:
        with patch(model, schedule, seed=seed):
            kept.append(model(**batch.inputs).drop_plan.kept_indices[0])
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[3])
    spans = [kept[0][batch.visual_mask[0, kept[0]] == span] for span in (1, 2)]
    assert not torch.equal(spans[0], spans[1] - 17)


@torch.no_grad()
def test_one_token_prefills_are_prefills():
    model, reference = build(), build()
    patch(model, "attention@1:0.5")
    embeds = torch.randn(1, 3, WIDTH)
    first = model(inputs_embeds=embeds[:, :1], visual_mask=torch.ones(1, 1, dtype=torch.long), use_cache=True)
    rest = model(inputs_embeds=embeds[:, 1:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, rest.logits], 1), reference(inputs_embeds=embeds).logits)


# generate


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 3}, {"use_cache": False}])
@EVERY_POSITION
def test_generate_over_a_batch_equals_generate_over_its_rows(how, positions):
    model, batch = build(), prompt(*ROWS["ragged"])
    patch(model, "attention@1:0.5,uniform@3:0.2", positions=positions)
    how = {**how, "max_new_tokens": 6, "min_new_tokens": 6}
    if "do_sample" in how:  # rows draw from one stream of chance: give every row the first draw
        singles = [generate(model, batch.row(row), **how) for row in range(len(batch))]
        rows = [prompt_of_one(batch, row) for row in range(len(batch))]
        assert [generate(model, row, **how).tolist() for row in rows] == [single.tolist() for single in singles]
        return
    together = generate(model, batch, **how)
    for row in range(len(batch)):
        assert torch.equal(together[row], generate(model, batch.row(row), **how)[0])


def prompt_of_one(batch, row):
    """A row of a batch with its padding."""
    return type(batch)(batch.inputs_embeds[[row]], batch.attention_mask[[row]], batch.visual_mask[[row]])


def generate(model, batch, **how):
    torch.manual_seed(0)
    return model.generate(**batch.inputs, **how)


def test_greedy_generation_equals_argmax_of_full_forwards():
    model, batch = build(), prompt([4, 12, 3])
    schedule = "attention@1:0.5,uniform@3:0.2"
    reference = copy.deepcopy(model)
    patch(model, schedule)
    tokens = generate(model, batch, max_new_tokens=5)[0]
    kept = kept_in_row(model(**batch.inputs).drop_plan, batch, 0, stage_layers(schedule))
    kept = {layer: torch.cat([columns, torch.arange(19, 24)]) for layer, columns in kept.items()}
    embeds_SE = torch.cat([batch.inputs_embeds[0], model.get_input_embeddings()(tokens)])
    logits = written_out(reference, embeds_SE, kept, positions="renumber")
    assert torch.equal(logits[-6:-1].argmax(-1), tokens)


def test_generate_takes_token_ids_and_a_second_turn():
    model = build()
    patch(model, "attention@1:0.5,uniform@3:0.2")
    ids = torch.randint(1, 60, (1, 20))
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, 4:16] = True
    first = model.generate(ids, visual_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.randint(1, 60, (1, 3))], 1)
    cached = model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=4)
    assert cached.shape[1] == turn.shape[1] + 4
    fresh = model.generate(ids, visual_mask=mask, max_new_tokens=4)
    assert torch.equal(fresh, first.sequences)


def test_generate_refuses_what_would_change_the_answer():
    model, batch = build(), prompt([4, 12, 3])
    patch(model, "attention@1:0.5")
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(
            torch.randint(1, 60, (1, 19)), visual_mask=batch.visual_mask, prefill_chunk_size=8, max_new_tokens=2
        )
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(**batch.inputs, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="visaul_mask"):
        model.generate(inputs_embeds=batch.inputs_embeds, visaul_mask=batch.visual_mask)


# Training


def training_batch(side):
    batch = prompt([5, 14, 4, 6, 6], [3, 6, 9], [9], side=side)
    labels = torch.full(batch.visual_mask.shape, -100)
    for row, labelled in enumerate([[19, 20, 33, 34], [14, 15, 16, 17], [5, 6]]):
        labels[row, batch.valid(row)[labelled]] = torch.tensor(labelled) + 3
    return batch, labels


@BOTH_SIDES
@EVERY_POSITION
def test_loss_and_gradient_equal_the_selection_written_out(side, positions):
    model, (batch, labels) = build(), training_batch(side)
    reference = copy.deepcopy(model)
    schedule = "uniform@1:0.6,attention@3:0.3"
    patch(model, schedule, positions=positions)
    embeds = batch.inputs_embeds.clone().requires_grad_()
    out = model(**{**batch.inputs, "inputs_embeds": embeds}, labels=labels, use_cache=False)
    out.loss.backward()

    by_hand = batch.inputs_embeds.clone().requires_grad_()
    losses, count = [], 0
    for row in range(len(batch)):
        valid = batch.valid(row)
        kept = kept_in_row(out.drop_plan, batch, row, stage_layers(schedule))
        logits = written_out(reference, by_hand[row, valid], kept, positions=positions)
        targets = labels[row, valid][kept[3]][1:]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
        count += (targets != -100).sum()
    loss = sum(losses) / count
    loss.backward()
    close(out.loss, loss)
    close(embeds.grad, by_hand.grad)
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@EVERY_SCHEDULE
def test_gradient_checkpointing_changes_nothing(schedule, reentrant):
    batch, labels = training_batch("right")
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        patch(model, schedule)
        embeds = batch.inputs_embeds.clone().requires_grad_()
        loss = model(**{**batch.inputs, "inputs_embeds": embeds}, labels=labels).loss
        loss.backward()
        grads.append([loss.detach(), embeds.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def test_loss_options_of_transformers_work():
    model, (batch, labels) = build(), training_batch("right")
    patch(model, "uniform@1:0.5")
    out = model(**batch.inputs, labels=labels)
    summed = model(**batch.inputs, labels=labels, num_items_in_batch=torch.tensor(5))
    close(summed.loss, out.loss * (labels != -100).sum() / 5)
    as_tuple = model(**batch.inputs, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)
    assert next(iter(out.keys())) == "loss"
    last = model(**batch.inputs, labels=labels, logits_to_keep=out.logits.shape[1] - 2)
    assert last.logits.shape[1] == out.logits.shape[1] - 2
    text = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask, "labels": labels}
    plain = model(**text).loss
    assert torch.equal(model(**text, visual_mask=torch.zeros_like(batch.visual_mask)).loss, plain)


# State


def test_remove_restores_the_very_same_model():
    model, batch = build(), prompt([4, 12, 3], [6])
    keys, attributes = list(model.state_dict()), set(vars(model)) | set(vars(model.model))
    plain = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
    before, tokens = model(**plain).logits, model.generate(**plain, max_new_tokens=4)
    handle = patch(model, "attention@1:0.5")
    assert list(model.state_dict()) == keys
    model.generate(**batch.inputs, max_new_tokens=4)
    handle.remove()
    handle.remove()
    assert torch.equal(model(**plain).logits, before)
    assert torch.equal(model.generate(**plain, max_new_tokens=4), tokens)
    assert set(vars(model)) | set(vars(model.model)) == attributes
    for module in model.modules():
        assert not [hook for hook in module._forward_pre_hooks.values() if "hico" in repr(hook)]
    with pytest.raises(ValueError, match="visual_mask"):
        model.generate(**batch.inputs, max_new_tokens=4)


def test_a_copy_drops_on_its_own():
    model, batch = build(), prompt([4, 12, 3])
    handle = patch(model, "attention@1:0.5")
    twin = copy.deepcopy(model)
    expected = model.generate(**batch.inputs, max_new_tokens=4)
    handle.remove()
    assert torch.equal(twin.generate(**batch.inputs, max_new_tokens=4), expected)


def decode_step_by_step(model, batch, num_steps):
    """Generate greedily, giving way after every call."""
    mask = torch.ones(batch.visual_mask.shape, dtype=torch.long)
    mask = mask if batch.attention_mask is None else batch.attention_mask
    with torch.no_grad():
        out = model(**{**batch.inputs, "attention_mask": mask}, use_cache=True)
    tokens = []
    for _ in range(num_steps):
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        yield tokens[-1]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        with torch.no_grad():
            out = model(input_ids=tokens[-1], attention_mask=mask, past_key_values=out.past_key_values)


def test_interleaved_generations_do_not_meet():
    model = build()
    patch(model, "attention@1:0.5,uniform@3:0.2")
    batches = [prompt([4, 12, 3], [9]), prompt([2, 20, 5], [3, 4, 2], [3, 9, 1, 9, 3]), prompt([7], [5])]
    alone = [list(decode_step_by_step(model, batch, 5)) for batch in batches]
    together = zip(*(decode_step_by_step(model, batch, 5) for batch in batches), strict=True)
    for step, tokens in enumerate(together):
        for batch, token in enumerate(tokens):
            assert torch.equal(token, alone[batch][step])


def test_threads_do_not_meet():
    model = build()
    patch(model, "attention@1:0.5,uniform@3:0.2")
    batches = [prompt([4, 12 + number, 3], [9], seed=number) for number in range(4)]
    alone = [model.generate(**batch.inputs, max_new_tokens=12) for batch in batches]
    together = [None] * len(batches)

    def work(place):
        together[place] = model.generate(**batches[place].inputs, max_new_tokens=12)

    threads = [threading.Thread(target=work, args=[place]) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_an_exception_leaves_nothing_behind():
    model, batch = build(), prompt([4, 12, 3], [6])
    patch(model, "attention@1:0.5,uniform@3:0.2")
    expected = model(**batch.inputs).logits
    state = {name: set(vars(module)) for name, module in model.named_modules()}

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**batch.inputs)
    hook.remove()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == state
    text = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
    assert torch.equal(model(**text).logits, build()(**text).logits)
    assert torch.equal(model(**batch.inputs).logits, expected)


# Cost


class LargestTensor(TorchDispatchMode):
    """Note the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("queries", ["last_prompt", "before_answers"])
@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_length(queries):
    model = build()
    patch(model, "attention@1:0.5,uniform@3:0.2", queries=queries)
    sizes = []
    for num_visual in (1000, 2000):
        batch = prompt([4, num_visual, 12])
        with LargestTensor() as largest:
            model(**batch.inputs, use_cache=True, logits_to_keep=1)
        sizes.append(largest.numel)
    assert sizes[1] < 2.1 * sizes[0]
    assert sizes[1] < 2000**2 / 10


# Errors


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


def test_decoders_without_the_parts_for_scoring_are_refused():
    model = build()
    del model.model.layers[1].self_attn.q_proj
    with pytest.raises(ValueError, match="lacks q_proj, which scoring by attention needs"):
        patch(model, "attention@1:0.5")
    patch(model, "uniform@1:0.5")


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
    with pytest.raises(ValueError, match="expected 0 for text"):
        model(**{**batch.inputs, "visual_mask": -batch.visual_mask})


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
