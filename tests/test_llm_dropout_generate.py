"""Generating while tokens are dropped, and what a patched model keeps between calls."""

import copy
import threading

import pytest
import torch
from dropout_reference import (
    EVERY_POSITION,
    ROWS,
    build,
    kept_in_row,
    prompt,
    stage_layers,
    written_out,
)

from hico.llm_dropout import patch

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
