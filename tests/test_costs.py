import json
from itertools import accumulate

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hico import HicoConfig, HicoForConditionalGeneration
from hico.cli import main
from hico.compat import CACHE_NAME
from hico.costs import Decoder, Vision, lengths_per_layer
from hico.llm_dropout import DropSchedule, patch
from hico.plan import plan

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def decoder(kind="qwen2", **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**TINY, **changes}, attn_implementation="eager")
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
        ("llama", {}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {}),
        ("starcoder2", {"sliding_window": None}),
    ],
)
@torch.no_grad()
def test_operations_and_cache_of_a_prefill_are_those_that_torch_counts(kind, changes):
    model, length = decoder(kind, **changes), 100
    costs, lengths = Decoder.of(model.config), [length] * 4
    inputs = torch.randn(1, length, 32)
    with FlopCounterMode(display=False) as counter:
        out = model(inputs_embeds=inputs, use_cache=True, logits_to_keep=1)
    upper_half = 2 * length * (length - 1) * costs.query_width * 4  # eager attention computes what it masks
    angles = 2 * length * 16 * 4  # transformers makes those of the rotary embedding by a matrix product
    assert 0 <= counter.get_total_flops() - upper_half - costs.prefill_flops(lengths) <= angles
    values = [part for layer in out[CACHE_NAME].layers for part in (layer.keys, layer.values)]
    assert costs.cache_bytes(lengths, bytes_per_value=4) == sum(part.numel() * 4 for part in values)
    assert costs.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, 1, dtype=torch.long), **{CACHE_NAME: out[CACHE_NAME]}, use_cache=True)
    assert 0 <= counter.get_total_flops() - costs.decode_flops(lengths) <= angles


@torch.no_grad()
def test_dropping_costs_what_the_shortened_layers_cost():
    model, schedule = decoder("qwen2"), DropSchedule.parse("uniform@1:0.5,uniform@3:0.25")
    lengths = lengths_per_layer(schedule, num_layers=4, num_visual=40, num_text=8)
    visual_mask = torch.zeros(1, 48, dtype=torch.long)
    visual_mask[:, 4:44] = 1
    with patch(model, schedule), FlopCounterMode(display=False) as counter:
        out = model(inputs_embeds=torch.randn(1, 48, 32), visual_mask=visual_mask, use_cache=True, logits_to_keep=1)
    costs = Decoder.of(model.config)
    upper_half = sum(2 * length * (length - 1) * costs.query_width for length in lengths)
    assert 0 <= counter.get_total_flops() - upper_half - costs.prefill_flops(lengths) <= 2 * 48 * 16 * 4
    values = [part for layer in out[CACHE_NAME].layers for part in (layer.keys, layer.values)]
    assert costs.cache_bytes(lengths, bytes_per_value=4) == sum(part.numel() * 4 for part in values)


@pytest.mark.parametrize(
    ("kind", "named"), [("gemma2", "sliding_attention"), ("mixtral", "experts"), ("gpt2", "`layers`")]
)
def test_costs_that_are_not_known_are_refused_by_name(kind, named):
    with pytest.raises(ValueError, match=named):
        Decoder.of(decoder(kind, **({"n_embd": 32, "n_layer": 1, "n_head": 4} if kind == "gpt2" else {})).config)


@pytest.mark.parametrize("preset", ["tiny", "resampler", "longva-7b"])
def test_operations_of_a_clip_are_those_of_the_model(preset):
    own = {"compressor": {"name": "resampler", "tokens_per_frame": 4}} if preset == "resampler" else {}
    config = HicoConfig.preset("tiny" if own else preset, **own)
    if preset == "longva-7b":
        config.encoder |= {"image_size": 56, "hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64}
        config.text_config = HicoConfig.preset("tiny").text_config
    model = HicoForConditionalGeneration(config).eval()
    clip = torch.randn(1, config.clip_len, 3, config.vision.image_size, config.vision.image_size)
    # The fused kernel of CPUs is not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.model.encode(clip)
    costs = Vision.of(config)
    assert counter.get_total_flops() == costs.encoder_flops + costs.compressor_flops
    parts = (model.model.encoder, model.model.compressor, model.model.projector)
    assert costs.num_parameters == sum(parameter.numel() for part in parts for parameter in part.parameters())


def test_ten_thousand_frames_cost_what_was_worked_out_by_hand():
    """The figures of the 7B model at 224 pixels: 512.9 GFLOP a clip, 160,000 visual tokens, 28 layers."""
    config = HicoConfig.preset("videochat-flash-7b-224")
    dense, dropped = (
        plan(config, num_frames=10_000, schedule=schedule, num_text=64)
        for schedule in (None, "uniform@4:0.75,attention@18:0.25")
    )
    assert dense.visual_tokens == 160_000
    assert dense.encode_tflop == pytest.approx(1282, abs=1)
    assert (dense.prefill_tflop, dropped.prefill_tflop) == (pytest.approx(7231, abs=5), pytest.approx(3565, abs=5))
    gib = 1e9 / 2**30
    assert (dense.cache_gib, dropped.cache_gib) == (
        pytest.approx(9.18 * gib, abs=0.01),
        pytest.approx(5.57 * gib, abs=0.01),
    )


@pytest.mark.parametrize("num_visual", [2000, 4000])
@torch.inference_mode()
def test_memory_of_a_prefill_is_what_is_measured(num_visual):
    width = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = CONFIG_MAPPING["qwen2"](**{**TINY, **width}, attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_config(config).eval()
    embeds, costs = torch.randn(1, num_visual, 256), Decoder.of(config)
    model(inputs_embeds=embeds[:, :64], logits_to_keep=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    lengths = [num_visual] * 3
    planned = costs.cache_bytes(lengths, bytes_per_value=4) + costs.working_bytes(num_visual, bytes_per_value=4)
    assert max(accumulate(sizes)) == pytest.approx(planned, rel=0.01)


def test_the_command_prints_every_length_and_schedule(capsys):
    schedules = ["none", "uniform@1:0.5"]
    assert main(["plan", "--preset", "tiny", "--frames", "8", "16", "--schedules", *schedules]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in table[1:]] == [
        ["8", "none", "32"],
        ["8", schedules[1], "32"],
        ["16", "none", "64"],
        ["16", schedules[1], "64"],
    ]
    assert main(["plan", "--preset", "tiny", "--frames", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["visual_tokens"] == 32


def test_frames_that_make_no_clips_are_one_line(capsys):
    assert main(["plan", "--preset", "tiny", "--frames", "10"]) == 1
    assert "10 frames do not split into clips of 4" in capsys.readouterr().err
