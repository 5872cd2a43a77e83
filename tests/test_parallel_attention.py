"""Attention by blocks, its backward, and what a decoder must be like."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from dropout_reference import TINY, build
from parallel_worker import Case, videos
from parallel_worker import build as build_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from hico.compat import UnsupportedDecoder
from hico.parallel import Layout, SequenceMesh, patch
from hico.parallel import attention as implementation
from hico.parallel.kernels import attend, attend_backward, attend_by_formula, backward_by_formula
from hico.parallel.ring import ring_attention

ALONE = SequenceMesh()


def parts(*, heads=4, groups=2, length=11, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(2, heads, length, 8), (2, groups, length, 8), (2, groups, length, 8)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def masked(query, key, value, documents, scaling):
    length = query.shape[2]
    seen = torch.zeros(len(query), 1, length, length, dtype=torch.bool)
    for row, intervals in enumerate(documents or [[(0, length)]] * len(query)):
        for begin, end in intervals:
            seen[row, :, begin:end, begin:end] = True
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
    return output.masked_fill(~seen.any(-1)[..., None], 0.0)


@pytest.mark.parametrize("documents", [None, [[(0, 3), (3, 4), (4, 11)], [(5, 11)]]], ids=["one", "several"])
def test_blocks_make_up_attention_and_its_gradients(documents):
    given, layout = parts(), Layout(ALONE, 12, documents)
    padded = [torch.nn.functional.pad(part, (0, 0, 0, 1)) for part in given]
    output = ring_attention(*padded, layout, scaling=0.3)[:, :, :11]
    expected = masked(*given, documents, 0.3)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((output * weight).sum(), given)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), given))


def test_the_backward_passes_gradcheck():
    layout, given = Layout(ALONE, 4, [[(0, 1), (1, 4)]]), parts(heads=2, groups=1, length=4)
    small = [part[:1, ..., :2].detach().requires_grad_() for part in given]
    assert torch.autograd.gradcheck(lambda *given: ring_attention(*given, layout, scaling=0.3), small)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_formula_does_what_the_operators_of_torch_do(causal, device, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    monkeypatch.setattr("hico.parallel.kernels.TILE_ELEMENTS", 200)  # several tiles
    given = [part.detach().to(device) for part in parts(heads=6, length=40, dtype=dtype)]
    if not causal:
        given[0] = given[0][:, :, :17]
    how = {"causal": causal, "scaling": 0.3}
    output, log_sum = attend(*given, **how)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close((output, log_sum), attend_by_formula(*given, **how), **tolerance)
    whole = torch.randn_like(output), *given, output, log_sum
    torch.testing.assert_close(attend_backward(*whole, **how), backward_by_formula(*whole, **how), **tolerance)


def test_ring_flash_attn_gets_what_it_asks_for(monkeypatch):
    calls = []
    module = ModuleType("ring_flash_attn")
    module.zigzag_ring_flash_attn_func = lambda *given, **how: calls.append((given, how)) or given[0]
    monkeypatch.setitem(sys.modules, "ring_flash_attn", module)
    query, key, value = parts()
    output = implementation.zigzag_flash_attention(query, key, value, Layout(ALONE, 11), scaling=0.3)
    ((given, how),) = calls
    assert torch.equal(output, query)
    assert [tuple(part.shape) for part in given] == [(2, 11, 4, 8), (2, 11, 2, 8), (2, 11, 2, 8)]
    assert how == {"softmax_scale": 0.3, "causal": True, "group": None}


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("local", ["sdpa", "eager"])
@torch.no_grad()
def test_a_group_of_one_changes_nothing(name, local):
    model = build(name, local)
    ids, positions = torch.randint(1, 60, (1, 19)), torch.cat([torch.arange(12), torch.arange(7)])[None]
    batches = [{"input_ids": ids}, {"input_ids": ids, "position_ids": positions}]
    batches.append({"input_ids": ids.repeat(2, 1), "attention_mask": torch.tensor([[1] * 19, [0] * 6 + [1] * 13])})
    expected = [model(**batch, use_cache=False).logits for batch in batches]
    handle = patch(model, ALONE)
    for batch, logits in zip(batches, expected, strict=True):
        valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        torch.testing.assert_close(model(**batch).logits[valid], logits[valid], rtol=1e-4, atol=1e-4)
    assert model(**batches[0], logits_to_keep=2).logits.shape[1] == 2
    handle.remove()
    handle.remove()
    assert torch.equal(model(**batches[0], use_cache=True).logits, model(**batches[0], use_cache=False).logits)


@torch.no_grad()
def test_a_model_that_sees_can_be_patched_like_any_other():
    model, batch = build_model(Case()).eval(), videos(0)
    expected = model(**batch, logits_to_keep=3).logits
    with pytest.raises(ValueError, match="keeps no cache"):
        patch(model, ALONE) and model(**{**batch, "use_cache": True})
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_model_is_spread_too():
    model = build()
    handle = patch(model, ALONE)
    twin, ids = copy.deepcopy(model), torch.randint(1, 60, (1, 9))
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    handle.remove()
    with pytest.raises(ValueError, match="keeps no cache"):
        twin(input_ids=ids, use_cache=True)


def test_half_precision_stays_near():
    model, ids = build().train(), torch.randint(1, 60, (1, 19))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.cat([torch.arange(12), torch.arange(7)])[None]}
    expected = model(**batch, use_cache=False).loss
    patch(model, ALONE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_cannot_be_spread_is_refused_by_name():
    with pytest.raises(UnsupportedDecoder, match=r"Qwen2Config .*sliding_attention \(of 9 tokens\)"):
        patch(build("qwen2_sliding"), ALONE)
    linear = build()
    linear.config.layer_types = ["linear_attention"] + ["full_attention"] * 3
    with pytest.raises(UnsupportedDecoder, match="linear_attention"):
        patch(linear, ALONE)
    scaled = Qwen2ForCausalLM(
        Qwen2Config(**TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    )
    with pytest.raises(UnsupportedDecoder, match="dynamic"):
        patch(scaled, ALONE)
    dropping = Qwen2ForCausalLM(Qwen2Config(**TINY, attention_dropout=0.1)).train()
    patch(dropping, ALONE)
    with pytest.raises(UnsupportedDecoder, match="dropout"):
        dropping(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_calls_that_cannot_be_spread_are_refused():
    model = build()
    patch(model, ALONE)
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="already"):
        patch(model, ALONE)
    with pytest.raises(ValueError, match="keeps no cache"):
        model(input_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match="keeps no cache"):
        model.generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 3\) for rows of \(2, 4\)"):
        model(input_ids=ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"position_ids is \(3, 2, 4\)"):
        model(input_ids=ids, position_ids=torch.zeros(3, 2, 4, dtype=torch.long))
    with pytest.raises(RuntimeError, match="without the layout"):
        model.model.layers[0](
            torch.zeros(1, 4, 32), position_embeddings=model.model.rotary_emb(torch.zeros(1), torch.arange(4)[None])
        )
