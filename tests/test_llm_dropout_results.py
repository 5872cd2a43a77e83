"""Results that once were wrong without a word, each with what it should be."""

import copy

import pytest
import torch
from dropout_reference import TINY, WIDTH, build, close, prompt
from transformers import MixtralConfig, MixtralForCausalLM

from hico import HicoConfig, HicoForConditionalGeneration
from hico.llm_dropout import find_handle, patch
from hico.llm_dropout.queries import QUERY_ROWS
from hico.ops.dropping import query_row_scores


@torch.no_grad()
def test_where_a_prompt_ends_in_a_video_the_lowest_scored_token_goes():
    model = build()
    patch(model, "attention@1:0.5")
    for seed in range(8):
        plan = model(**prompt([3, 12], seed=seed).inputs).drop_plan
        scores = plan.scores_at(1)[0, 3:14]
        best = scores.topk(5).indices.sort().values + 3
        assert plan.kept_indices[0].tolist() == [0, 1, 2, *best.tolist(), 14]


@torch.no_grad()
def test_random_tokens_before_a_last_one_that_stays_are_all_alike_likely():
    model, batch = build(), prompt([1, 9])
    counts = torch.zeros(10)
    for seed in range(300):
        with patch(model, "random@1:3", seed=seed):
            counts[model(**batch.inputs).drop_plan.kept_indices[0]] += 1
    assert counts[0] == counts[9] == 300
    # Two of eight: 75 of 300 expected, deviation 7.5; five deviations are one in a million.
    assert (counts[1:9] - 75).abs().max() < 38


@pytest.mark.parametrize("queries", QUERY_ROWS)
@pytest.mark.parametrize("rows", [([4, 12, 3],), ([4, 12],), ([4, 12, 3], [2, 6, 5])])
def test_generation_without_a_cache_ranks_as_with_one(queries, rows):
    model = build()
    patch(model, "attention@1:0.5,attention@3:0.2", queries=queries)
    for seed in range(4):
        batch = prompt(*rows, seed=seed)
        how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        cached, whole = (model.generate(**batch.inputs, use_cache=use, **how) for use in (True, False))
        assert torch.equal(cached, whole)


@torch.no_grad()
def test_an_answer_that_is_marked_does_not_rank():
    model, batch = build(), prompt([4, 12, 5])
    patch(model, "attention@2:0.5")
    alone = model(inputs_embeds=batch.inputs_embeds[:, :18], visual_mask=batch.visual_mask[:, :18]).drop_plan
    batch.visual_mask[:, 18:] = -1
    marked = model(**batch.inputs).drop_plan
    labels = torch.full_like(batch.visual_mask, -100)
    labels[:, 18:] = 5
    labelled = model(**{**batch.inputs, "visual_mask": batch.visual_mask.clamp(min=0)}, labels=labels).drop_plan
    for plan in (marked, labelled):
        assert torch.equal(plan.kept_indices[:, :-3], alone.kept_indices)


def test_padding_learns_nothing():
    """Rows of one length keep different numbers of tokens, and are padded before their first, labelled token."""
    model, batch = build().train(), prompt([2, 10, 4], [2, 4, 10])
    labels = torch.randint(0, 60, batch.visual_mask.shape)
    labels[batch.visual_mask > 0] = -100
    patch(model, "uniform@1:0.5")
    loss, total, count = model(**batch.inputs, labels=labels).loss, 0.0, 0
    for row in range(2):
        out = model(**batch.row(row).inputs, labels=labels[row : row + 1])
        learned = (out.drop_plan.shift_labels(labels[row : row + 1]) != -100).sum()
        total, count = total + out.loss * learned, count + learned
    close(loss, total / count)

    hico = HicoForConditionalGeneration(HicoConfig.preset("tiny")).train()
    hico.set_drop_schedule("uniform@1:0.5")
    width = hico.config.text_config.hidden_size
    embeds = torch.randn(2, 16, width)
    given = {"inputs_embeds": embeds, "visual_mask": batch.visual_mask}
    together = hico(**given, labels=labels).loss
    total = 0.0
    for row in range(2):
        out = hico(**{name: value[row : row + 1] for name, value in given.items()}, labels=labels[row : row + 1])
        total = total + out.loss * (out.drop_plan.shift_labels(labels[row : row + 1]) != -100).sum()
    close(together, total / count)


def experts(**settings):
    config = MixtralConfig(
        **{**TINY, "initializer_range": 0.3},
        num_local_experts=4,
        sliding_window=None,
        output_router_logits=True,
        router_aux_loss_coef=5.0,
        **settings,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("rows", [([4, 12, 3],), ([4, 12, 3], [2, 6, 5])])
def test_the_loss_that_balances_experts_stays(rows):
    model, batch = experts(), prompt(*rows)
    labels = torch.randint(0, 60, batch.visual_mask.shape)
    text = {name: value for name, value in batch.inputs.items() if name != "visual_mask"}
    plain = model(**text, labels=labels)
    assert plain.aux_loss > 0
    with patch(model, "uniform@1:1.0"):
        whole = model(**batch.inputs, labels=labels)
        close(whole.loss, plain.loss)
        close(whole.aux_loss, plain.aux_loss)
        no_video = model(**text, labels=labels, visual_mask=torch.zeros_like(batch.visual_mask))
        assert torch.equal(no_video.loss, plain.loss)
    with patch(model, "uniform@1:0.5,uniform@3:0.25"):
        out = model(**batch.inputs, labels=labels)
        singles = [
            model(**batch.row(row).inputs, labels=labels[row : row + 1, batch.valid(row)]) for row in range(len(batch))
        ]
    chosen, probabilities = [], []
    for row in singles:
        for logits in row.router_logits:
            probabilities.append(logits.softmax(-1))
            chosen.append(torch.nn.functional.one_hot(logits.topk(2).indices, 4).float())
    balance = 4 * (torch.cat(chosen).mean(0) * torch.cat(probabilities).mean(0)).sum()
    close(out.aux_loss, balance)
    shifted = out.drop_plan.shift_labels(labels)
    if batch.attention_mask is not None:  # stock transformers learns the labels of padding too
        assert shifted.shape == out.logits.shape[:2]
    answer = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)
    close(out.loss, answer + 5.0 * balance)


@torch.no_grad()
def test_a_cache_filled_with_dropping_is_not_continued_without():
    model, batch, step = build(), prompt([4, 12, 3]), torch.randn(1, 1, WIDTH)
    handle = patch(model, "attention@1:0.5,uniform@3:0.25")
    cache = model(**batch.inputs, use_cache=True).past_key_values
    expected = model(inputs_embeds=step, past_key_values=copy.deepcopy(cache)).logits
    handle.remove()
    with pytest.raises(RuntimeError, match="tokens were dropped when this cache was filled"):
        model(inputs_embeds=step, past_key_values=copy.deepcopy(cache))
    with pytest.raises(RuntimeError, match="tokens were dropped when this cache was filled"):
        build()(inputs_embeds=step, past_key_values=copy.deepcopy(cache))
    patch(model, "attention@1:0.5,uniform@3:0.25")
    assert torch.equal(model(inputs_embeds=step, past_key_values=cache).logits, expected)


def test_a_model_has_one_schedule_whoever_set_it():
    model = HicoForConditionalGeneration(HicoConfig.preset("tiny"))
    decoder = model.model.language_model
    handle = patch(model, "uniform@1:0.5", positions="keep")
    assert model.model.drops_tokens
    with pytest.raises(ValueError, match="unknown scope"):
        model.set_drop_schedule("uniform@1:0.25", scope="all")
    assert str(find_handle(decoder).schedule) == "uniform@1:0.5"
    assert find_handle(decoder).options["positions"] == "keep"
    model.set_drop_schedule("uniform@1:0.25")
    assert str(find_handle(decoder).schedule) == "uniform@1:0.25"
    handle.remove()
    assert str(find_handle(decoder).schedule) == "uniform@1:0.25"
    model.set_drop_schedule(None)
    assert not model.model.drops_tokens


@torch.no_grad()
def test_scores_are_float32_under_autocast():
    queries, keys = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 40, 8)
    index = torch.tensor([[38, 39]])
    plain = query_row_scores(queries, keys, index, scaling=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(query_row_scores(queries, keys, index, scaling=1.0), plain)


@torch.no_grad()
def test_caps_and_sinks_take_part_in_the_softmax():
    queries, keys = torch.randn(1, 4, 1, 8).double(), torch.randn(1, 2, 9, 8).double()
    sinks = torch.randn(4).double()
    logits = (queries.unflatten(1, (2, 2)) @ keys[:, :, None].transpose(3, 4)).flatten(1, 2)[0, :, 0] * 0.7
    capped = 3.0 * (logits / 3.0).tanh()
    weights = torch.cat([capped, sinks[:, None]], 1).softmax(-1)[:, :-1].mean(0)
    scores = query_row_scores(queries, keys, torch.tensor([[8]]), scaling=0.7, softcap=3.0, sinks_A=sinks)
    torch.testing.assert_close(scores[0], weights.float(), rtol=1e-5, atol=1e-6)
