import json
from itertools import pairwise

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from hico.bench import TABLE_7, MemoryWatch, main
from hico.costs import lengths_per_layer
from hico.llm_dropout import DropSchedule, patch

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def one_video(num_visual, num_text=8, width=32):
    visual_mask = torch.zeros(1, num_visual + num_text, dtype=torch.long)
    visual_mask[:, 4 : 4 + num_visual] = 1
    return {"inputs_embeds": torch.randn(1, num_visual + num_text, width), "visual_mask": visual_mask}


@pytest.mark.parametrize("schedule", ["none", "uniform@1:0.5,attention@3:0.3", "attention@2:7", "none@1:0.5"])
@torch.no_grad()
def test_lengths_are_those_that_the_layers_see(schedule):
    model, seen = Qwen2ForCausalLM(Qwen2Config(**TINY)), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, output: seen.append(output.shape[1]))
    patch(model, schedule)
    model(**one_video(33))
    assert lengths_per_layer(DropSchedule.parse(schedule), num_layers=4, num_visual=33, num_text=8) == seen


def test_the_table_and_the_json_hold_every_schedule(tmp_path, capsys):
    sizes = ["--visual-tokens", "40", "--text-tokens", "8", "--new-tokens", "2", "--repeats", "1"]
    assert main(["drop", *sizes, "--json", str(tmp_path / "drop.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "drop.json").read_text())
    assert [line.split()[0] for line in table[1:]] == list(TABLE_7)
    assert [cost["schedule"] for cost in report["costs"]] == list(TABLE_7)
    assert report["settings"]["visual_tokens"] == 40
    first, last = report["costs"][0], report["costs"][-1]
    assert set(first["ratios"].values()) <= {1.0, None}
    for name in ("prefill_flops", "kv_bytes"):
        assert last["ratios"][name] == pytest.approx(last[name] / first[name])
        assert 0.3 < last["ratios"][name] < 0.9
    assert last["kv_bytes"] == 2 * 4 * 128 * (4 * 48 + 14 * 38 + 10 * 18)  # keys and values, 2 heads of 64, float32
    assert all(cost["prefill_seconds"] > 0 and cost["decode_seconds"] > 0 for cost in report["costs"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--schedules", "uniform@28:0.5"], "beyond the decoder"),
        (["--visual-tokens", "0"], "at least 1"),
        (["--preset", "tniy"], "unknown preset"),
    ],
)
def test_settings_that_cannot_be_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        main(["drop", *options])


@pytest.mark.slow
@torch.no_grad()
def test_peak_memory_of_a_prefill_doubles_with_its_length():
    model = Qwen2ForCausalLM(Qwen2Config(**{**TINY, "hidden_size": 512, "intermediate_size": 1024})).eval()
    patch(model, "attention@1:0.75,attention@3:0.25")
    model(**one_video(512, width=512), logits_to_keep=1)
    peaks = []
    for num_visual in (4096, 8192, 16384):
        prompt = one_video(num_visual, width=512)
        with MemoryWatch(torch.device("cpu")) as peak:
            model(**prompt, use_cache=True, logits_to_keep=1)
        peaks.append(peak.rise)
    if None in peaks:
        pytest.skip("this system does not say how much memory was used at most")
    for half, whole in pairwise(peaks):
        assert whole <= 2.2 * half
