"""Which visual tokens stay: scores, query rows, spans, chance."""

import pytest
import torch
from dropout_reference import (
    BOTH_SIDES,
    DECODERS,
    WIDTH,
    build,
    close,
    prompt,
)

from hico.llm_dropout import DropSchedule, patch
from hico.llm_dropout.queries import QUERY_ROWS
from hico.registry import DROP_POLICIES


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
