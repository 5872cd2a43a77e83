"""Laws of progressive visual dropout on every decoder class of the installed transformers, or a clear refusal."""

import contextlib
from pathlib import Path

import pytest
import torch
import transformers
from decoder_zoo import build_tiny, causal_lms, masked, quietly, text_decoders, write_page

from hico.compat import UnsupportedDecoder
from hico.llm_dropout import patch
from hico.llm_dropout.patch import find_decoder

LENGTH, SPAN = 23, slice(4, 18)
SCHEDULE = "attention@1:0.5,attention@2:0.3"


def close(actual, expected):
    """Assert that two ways to compute the same logits in float32 agree."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-4 * max(1.0, expected.abs().max().item()))


def kept_after(plan, row=0):
    """Mark the tokens that enter each stage."""
    kept = {}
    for layer in (1, 2):
        columns = plan.kept_at(layer)[row]
        kept[layer] = torch.zeros(LENGTH, dtype=torch.bool)
        kept[layer][columns[columns >= 0]] = True
    return kept


@pytest.mark.parametrize("name", [*causal_lms(), *text_decoders()])
@torch.no_grad()
def test_every_decoder_drops_rightly_or_is_refused(name):
    try:
        model = quietly(build_tiny, name)
    except Exception as error:
        pytest.skip(f"cannot be built tiny: {type(error).__name__}: {str(error)[:80]}")
    with contextlib.suppress(UnsupportedDecoder):
        quietly(check_laws, model)


def test_the_page_about_decoders_is_true():
    page = (Path(__file__).parents[1] / "docs" / "decoders.md").read_text()
    if f"of transformers {transformers.__version__}," not in page:
        pytest.skip("the page is about another version of transformers")
    assert page == write_page()


def check_laws(model):
    with patch(model, SCHEDULE):
        decoder, _ = find_decoder(model)
    embeds = torch.randn(1, LENGTH, model.get_input_embeddings().weight.shape[1])
    visual = torch.zeros(1, LENGTH, dtype=torch.long)
    visual[:, SPAN] = 1
    stock = model(inputs_embeds=embeds, output_attentions=True, use_cache=False)
    with patch(model, SCHEDULE):
        renumbered = model(inputs_embeds=embeds, visual_mask=visual, use_cache=False)
    with patch(model, "uniform@1:0.5,attention@2:0.3", positions="keep"):
        kept_positions = model(inputs_embeds=embeds, visual_mask=visual, use_cache=False)

    # Keeping everything is the stock model.
    with patch(model, "attention@1:1.0"):
        whole = model(inputs_embeds=embeds, visual_mask=visual, use_cache=False)
    assert torch.equal(whole.logits, stock.logits)
    # Scores are the attention of the layer's own eager attention, and the highest stay.
    weights = stock.attentions[1][0, :, -1, :LENGTH].mean(0)
    torch.testing.assert_close(renumbered.drop_plan.scores_at(1)[0], weights.float(), rtol=1e-4, atol=1e-6)
    best = weights[SPAN].sort(descending=True, stable=True).indices[:7] + SPAN.start
    assert set(best.tolist()) == set(renumbered.drop_plan.kept_at(1)[0].tolist()) & set(range(LENGTH)[SPAN])
    # Taking tokens out is hiding them.
    for out, renumber in ((renumbered, True), (kept_positions, False)):
        kept = kept_after(out.drop_plan)
        expected = masked(model, decoder, embeds, kept, renumber=renumber)
        close(out.logits[0], expected[kept[2]])
    # A padded batch is its rows, and cached decoding is one call over prompt and answer.
    with patch(model, SCHEDULE):
        check_batch(model, embeds, visual)
        check_cache(model, embeds, visual, renumbered)


def check_batch(model, embeds, visual):
    short = embeds[:, 2:17]  # a shorter row, with a video of 13 and no text after it
    batch = torch.cat([embeds, torch.cat([torch.randn_like(embeds[:, :8]), short], 1)])
    spans = torch.cat([visual, torch.cat([torch.zeros(1, 8, dtype=torch.long), visual[:, 2:17]], 1)])
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :8] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(
        inputs_embeds=batch, attention_mask=mask, position_ids=positions, visual_mask=spans, use_cache=False
    )
    alone = model(inputs_embeds=short, visual_mask=visual[:, 2:17], use_cache=False)
    close(together.logits[1, together.drop_plan.valid_at(2)[1]], alone.logits[0])


def check_cache(model, embeds, visual, prefilled):
    answer = torch.randn(1, 2, embeds.shape[2])
    spans = torch.cat([visual, torch.full((1, 2), -1)], 1)
    whole = model(inputs_embeds=torch.cat([embeds, answer], 1), visual_mask=spans, use_cache=False)
    cached = model(inputs_embeds=embeds, visual_mask=visual, use_cache=True)
    assert torch.equal(cached.drop_plan.kept_indices, prefilled.drop_plan.kept_indices)
    for step in range(2):
        cached = model(inputs_embeds=answer[:, step : step + 1], past_key_values=cached.past_key_values)
        close(cached.logits[0, -1], whole.logits[0, step - 2])
