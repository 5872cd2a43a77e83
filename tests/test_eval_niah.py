"""``hico niah text``, as a user meets it."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from published import tiny_llm

from hico.cli import main
from hico.eval.haystack import read_haystack
from hico.eval.needles import TextNeedles, sentence_ends
from hico.eval.niah import KEY, PERPLEXITY_TOKENS, format_table, measure_text, scores_of, text_cells
from hico.eval.results import ResultsFile
from hico.tokenizer import byte_tokenizer


class Reader(torch.nn.Module):
    """Stands for an LLM that finds the number in the needle, if that stands in reach."""

    device = torch.device("cpu")

    def __init__(self, reach: int = 10**9):
        super().__init__()
        self.reach = reach

    def forward(self, input_ids, use_cache, logits_to_keep):
        text = bytes(input_ids[0].tolist())
        logits = torch.zeros(1, logits_to_keep, 512)
        found = re.search(rb"\nThe special magic Singapore number is: (\d+)\.\n", text)
        if found and found.start() >= len(text) - self.reach:
            for place, digit in enumerate(found[1][:logits_to_keep]):
                logits[0, place, digit] = 1
        return SimpleNamespace(logits=logits)


def measure(tmp_path, model):
    tokenizer = byte_tokenizer()
    needles = TextNeedles(tokenizer, sentence_ends(tokenizer), num_distractors=3)
    haystack = read_haystack(tokenizer, 2000 + PERPLEXITY_TOKENS)
    results = ResultsFile(tmp_path / "results.jsonl", {}, key=KEY)
    cells = text_cells([500, 2000], [0.0, 0.5, 1.0])
    measure_text(model, needles, haystack, cells, samples=2, add=results.add)
    return scores_of(results)


def test_a_reader_finds_every_needle(tmp_path):
    scores, perplexities = measure(tmp_path, Reader())
    assert scores == {(length, depth): 1.0 for length in (500, 2000) for depth in (0.0, 0.5, 1.0)}
    assert perplexities == {500: pytest.approx(512), 2000: pytest.approx(512)}


def test_a_reader_of_little_reach_finds_the_last_needle_only(tmp_path):
    scores, _ = measure(tmp_path, Reader(reach=400))
    assert scores == {(length, depth): float(depth == 1) for length in (500, 2000) for depth in (0.0, 0.5, 1.0)}
    assert "50.0%" not in format_table(scores, trained=500)
    assert format_table(scores, trained=500).endswith("beyond the trained 500 tokens: 33.3%")


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    """A plain causal LM of 4,096 positions and its tokenizer."""
    folder = tmp_path_factory.mktemp("llm")
    tiny_llm(vocab_size=320, max_position_embeddings=4096).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


SMALL = ["--lengths", "300,900", "--depths", "0:1:0.5", "--samples", "1", "--device", "cpu", "--sentence-ends", "46"]


def test_the_command_writes_lines_a_picture_and_a_table(llm_folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["niah", "text", "--model", str(llm_folder), *SMALL, "--output", str(output)]) == 0
    first, *lines = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    assert [line["test"] for line in lines] == ["perplexity", "needle", "needle", "needle"] * 2
    assert first["settings"]["sentence_ends"] == [46]
    assert first["notes"]["versions"]["torch"] == torch.__version__
    assert (output / "heatmap.png").is_file()
    printed = capsys.readouterr().out
    assert "up to the trained 4,096 tokens:" in printed
    assert "perplexity" in printed


def test_a_stopped_run_goes_on_and_other_settings_are_refused(llm_folder, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["niah", "text", "--model", str(llm_folder), *SMALL, "--output", str(output)]
    assert main(command) == 0
    whole = (output / "results.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (output / "results.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    assert main(command) == 0
    assert (output / "results.jsonl").read_text() == whole
    assert main([*command, "--distractors", "3"]) == 1
    assert "distractors was 0 and is 3" in capsys.readouterr().err


def test_a_model_that_was_trained_on_is_another_model(llm_folder, tmp_path, capsys):
    folder, output = tmp_path / "llm", tmp_path / "out"
    model = tiny_llm(vocab_size=320)
    for _ in range(2):
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        status = main(["niah", "text", "--model", str(folder), *SMALL, "--output", str(output)])
        model.lm_head.weight.data[0] += 1
    assert status == 1
    assert re.search("other settings \\(model was '.{64}' and is", capsys.readouterr().err)


def test_a_checkpoint_of_hico_is_tested_by_its_llm(tmp_path):
    from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor

    config = HicoConfig.preset("tiny")
    model = HicoForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "model")
    HicoProcessor.from_config(config, byte_tokenizer()).save_pretrained(tmp_path / "model")
    own = ["niah", "text", "--model", str(tmp_path / "model"), *SMALL, "--output", str(tmp_path / "own")]
    assert main(own) == 0
    from transformers import Qwen2ForCausalLM

    llm = Qwen2ForCausalLM(config.text_config)
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.lm_head.load_state_dict(model.lm_head.state_dict())
    llm.save_pretrained(tmp_path / "llm")
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    alone = ["niah", "text", "--model", str(tmp_path / "llm"), *SMALL, "--output", str(tmp_path / "alone")]
    assert main(alone) == 0
    results = [
        [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()[1:]]
        for name in ("own", "alone")
    ]
    for ours, theirs in zip(*results, strict=True):
        assert ours.pop("perplexity", 0) == pytest.approx(theirs.pop("perplexity", 0), rel=1e-4)
        assert ours == theirs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "9000"], "9,000 tokens makes a prompt of 9,256, but the model's configuration names 4,096"),
        (["--depths", "0,1.5"], "--depths has 1.5; it must be from 0 to 1"),
        (["--lengths", "0"], "--lengths has 0; it must be at least 1"),
        (["--lengths", "10.5"], "lengths are whole numbers of tokens"),
        (["--distractors", "7"], "there are 7 distractors; use 0 to 6"),
        (["--samples", "0"], "--samples is 0; give at least 1"),
        (["--sentence-ends", "dots"], "--sentence-ends is 'dots'; give 'tokenizer', 'published', or ids below 261"),
        (["--model", "/nowhere"], "there is no folder '/nowhere'"),
        (["--haystack", "."], ". holds no .txt or .md files"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used"),
        (["--sequence-parallel", "2"], "--sequence-parallel is 2, but there are 1 process(es)"),
    ],
)
def test_bad_input_is_one_line(llm_folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["niah", "text", "--model", str(llm_folder), *SMALL, *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "niah").exists()


def test_beyond_the_positions_on_purpose(llm_folder, tmp_path, capsys):
    words = ["--lengths", "4000,4200", "--depths", "1", "--beyond", "--output", str(tmp_path)]
    assert main(["niah", "text", "--model", str(llm_folder), *SMALL, *words]) == 0
    assert "beyond the trained 4,096 tokens" in capsys.readouterr().out


def test_processes_that_share_rows_find_what_one_finds(llm_folder, tmp_path):
    command = ["niah", "text", "--model", str(llm_folder), *SMALL]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shared = [*torchrun, "-m", "hico.cli", *command, "--sequence-parallel", "2", "--output", str(tmp_path / "two")]
    done = subprocess.run(shared, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("beyond") + done.stdout.count("up to the trained") == 1, "one process speaks"
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()[1:]]
        for name in ("one", "two")
    )
    for alone, together in zip(one, two, strict=True):
        assert together.pop("perplexity", 0) == pytest.approx(alone.pop("perplexity", 0), rel=1e-4)
        assert together == alone
