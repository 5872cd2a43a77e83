"""The memory of a step is counted without numbers, and is what a real step takes."""

import json
from dataclasses import replace

import pytest
import torch
from text_corpus import write_documents, write_lm
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

from hico.train.__main__ import main
from hico.train.footprint import Footprint, MemoryKeys, footprint
from hico.train.lm_head import with_text_loss
from hico.train.memory import chunk_mlps

CONFIG = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
CONFIG |= {"num_key_value_heads": 1, "vocab_size": 2000, "max_position_embeddings": 8192}
KEYS = {
    "plain": MemoryKeys(loss_chunk=128, gradient_checkpointing=False),
    "checkpointed": MemoryKeys(loss_chunk=128),
    "chunked": MemoryKeys(loss_chunk=128, mlp_chunk=128),
    "autocast": MemoryKeys(loss_chunk=64, autocast=True),
}


def measured(config, keys, length):
    """Return the most bytes that a real step has allocated at once, beside weights and gradients."""
    model = with_text_loss(AutoModelForCausalLM.from_config(config).train(), loss_chunk=keys.loss_chunk)
    if keys.mlp_chunk:
        chunk_mlps(model, keys.mlp_chunk)
    if keys.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(2000, (1, length))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=keys.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "autocast")) for n in KEYS])
def test_what_is_counted_is_what_a_step_takes(name):
    config, length = Qwen2Config(**CONFIG), 4000
    counted = footprint(config, KEYS[name]).at(length)
    # Where gradients of chunks meet, autograd may hold one more of them than it does for tensors without numbers.
    assert counted == pytest.approx(measured(config, KEYS[name], length), rel=0.08 if name == "chunked" else 0.02)


def test_offloading_leaves_the_layers_inputs_out():
    keys = MemoryKeys(loss_chunk=512)  # counted at lengths whose tensors are large enough to be moved
    for offload, per_layer in ((False, 64 * 4), (True, 0)):
        few, many = (
            footprint(
                Qwen2Config(**{**CONFIG, "num_hidden_layers": depth}), replace(keys, offload_activations=offload)
            )
            for depth in (4, 24)
        )
        assert many.lines[0][1] - few.lines[0][1] == pytest.approx(20 * per_layer, abs=20)


def test_a_larger_vocabulary_costs_the_same_for_every_token():
    small, large = (
        footprint(Qwen2Config(**{**CONFIG, "vocab_size": size}), MemoryKeys(loss_chunk=32)) for size in (2000, 10_000)
    )
    assert small.lines[0][1] == pytest.approx(large.lines[0][1], rel=1e-3)
    assert small.at(50_000) == pytest.approx(large.at(50_000), rel=0.01)


def test_layers_of_several_types_are_counted():
    counted = footprint(Gemma2Config(**CONFIG, head_dim=32), MemoryKeys(loss_chunk=64))
    assert counted.lines[0][1] > 4 * 64 * 4


def test_the_longest_length_fits_and_no_longer_one():
    counted = Footprint(((1e6, 10.0), (5e6, 1.0)))
    assert counted.longest(2e6) == 0
    assert counted.longest(1.1e7) == 1_000_000
    assert counted.at(1_000_000) == 1.1e7


def test_a_dry_run_says_which_length_fits(tmp_path, capsys):
    write_lm(tmp_path / "lm")
    write_documents(tmp_path)
    recipe = {"extends": "text", "model": str(tmp_path / "lm"), "data": str(tmp_path / "text.yaml"), "max_length": 128}
    recipe |= {"output_dir": str(tmp_path / "out"), "rope_parameters": {"rope_theta": 1e6}, "report_to": "none"}
    recipe |= {"long_documents": 64, "long_share": 0.7, "bf16": False, "loss_chunk": 64}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["--config", str(tmp_path / "recipe.yaml"), "--dry_run", "--world_size", "2"]) == 0
    text = capsys.readouterr().out
    assert "tokens per step: 512" in text
    assert "steps: 1,000" in text
    rows = [line.split() for line in text.splitlines()]
    assert [row[-1][:3] for row in rows if row[:1] in (["books"], ["web"])] == ["70.", "70."]
    plain, saving = (next(row for row in rows if row[:1] == [name]) for name in ("this", "with"))
    assert int(saving[-1].replace(",", "")) > int(plain[-1].replace(",", "")) > 1e6
    assert not (tmp_path / "out").exists()
