"""The command line, as a user meets it."""

import io
import re
import subprocess
import sys
import warnings

import pytest
from transformers import GenerationConfig

from hico import HicoForConditionalGeneration, registry
from hico.cli import load, main
from hico.demo import write_moving_square
from hico.session import ANSWER_TOKENS


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "square.mp4"
    write_moving_square(str(path), num_frames=30)
    return str(path)


def test_demo_prints_every_step(clip, capsys):
    assert main(["demo", clip, "--frames", "8", "--question", "Where to?"]) == 0
    printed = capsys.readouterr().out
    for words in ("8 of its frames", "2 clips of 4 frames, 64 tokens each", "128 tokens in, 32 out", "Where to?"):
        assert words in printed
    assert "weights of this model are random" in printed


def test_chat_answers_one_question(clip, capsys):
    arguments = ["chat", clip, "What?", "--frames", "8", "--max-new-tokens", "4", "--device", "cpu", "--no-progress"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first
    assert main([*arguments, "--start", "0.5", "--end", "1.5"]) == 0


def test_chat_reads_questions_until_an_empty_line(clip, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one?\ntwo?\n\n"))
    assert main(["chat", clip, "--frames", "4", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("> ") == 3


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(clip, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("<|video_pad|>?\n\udcff?\n\n"))
    assert main(["chat", clip, "--frames", "4", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("> ") == 3
    assert "hico chat: 1 were given for the 2 <|video_pad|>" in printed.err


def test_without_a_terminal_there_are_no_questions(clip, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", clip, "--frames", "4", "--device", "cpu"]) == 0


def test_any_positive_rate_is_taken(clip):
    for fps in ("0.00001", "29.97"):
        assert main(["chat", clip, "What?", "--fps", fps, "--max-new-tokens", "1", "--device", "cpu"]) == 0


def test_the_same_question_gives_the_same_answer(clip, capsys):
    answers = []
    for _ in range(2):
        assert main(["chat", clip, "What?", "--frames", "8", "--max-new-tokens", "8", "--device", "cpu"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


RELEASED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A model with the generation settings of VideoChat-Flash 7B."""
    folder = tmp_path_factory.mktemp("released")
    model, processor = load("tiny", device="cpu")
    model.generation_config = GenerationConfig(**RELEASED, bos_token_id=256, eos_token_id=[258, 256], pad_token_id=256)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        (
            [],
            {"do_sample": False, "max_new_tokens": 1024},
            "greedy, repetition penalty 1.05 on the answer, at most 1024",
        ),
        (
            ["--greedy", "--max-new-tokens", "7"],
            {"do_sample": False, "max_new_tokens": 7},
            "greedy, .*at most 7 tokens",
        ),
        (
            ["--temperature", "0.5"],
            {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 20},
            r"drawn at temperature 0\.5, top-p 0\.8, top-k 20, repetition penalty 1\.05 on the answer, at most 1024",
        ),
        (["--top-p", "0.1"], {"do_sample": True, "temperature": 0.7, "top_p": 0.1}, r"temperature 0\.7, top-p 0\.1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_chat_says_which_settings_are_in_force(clip, released, capsys, monkeypatch, options, expected, words):
    seen = {}

    def sample(self, input_ids, generation_config, **kwargs):
        seen.update(generation_config.to_dict())
        return input_ids

    monkeypatch.setattr(HicoForConditionalGeneration, "_sample", sample)
    arguments = ["chat", clip, "What?", "--model", released, "--frames", "4", "--device", "cpu", "--no-progress"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*arguments, *options]) == 0
    assert {name: seen[name] for name in expected} == expected
    printed = capsys.readouterr()
    assert re.search(words, printed.err)
    assert "hico chat: " not in printed.out


def test_the_help_names_the_length_that_holds(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    assert f"length of an answer at most ({ANSWER_TOKENS})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "missing.mp4", "What?"], "missing.mp4"),
        (["chat", "CLIP", "What?", "--frames", "8", "--fps", "2"], "--frames and --fps exclude each other"),
        (["chat", "CLIP", "What?", "--start", "90"], "90"),
        (["chat", "CLIP", "What?", "--frames", "0"], "num_frames of at least 1, not 0"),
        (["chat", "CLIP", "What?", "--fps", "0"], "--fps is 0; give a positive number"),
        (["chat", "CLIP", "What?", "--fps", "nan"], "--fps is nan; give a positive number"),
        (["chat", "CLIP", "What?", "--greedy", "--top-p", "0.5"], "--greedy draws no tokens, so it excludes"),
        (["chat", "CLIP", "What?", "--temperature", "0"], "--temperature is 0; give a positive number, or --greedy"),
        (["chat", "CLIP", "What?", "--top-p", "1.5"], "--top-p is 1.5; give a number above 0, at most 1"),
        (["chat", "CLIP", "What?", "--max-new-tokens", "0"], "--max-new-tokens is 0; give at least 1"),
        (["chat", "CLIP", "What?", "--device", "gpu"], "--device gpu cannot be used"),
        (["chat", "CLIP", "What?", "--device", "meta"], "--device meta cannot be used"),
        (["chat", "CLIP", "What?", "--model", "no-such-model"], "there is no model 'no-such-model'"),
        (["chat", "CLIP", "What?", "--model", "/no/such/model"], "there is no model '/no/such/model'"),
    ],
)
def test_bad_input_is_one_line_on_standard_error(arguments, words, clip, capsys):
    assert main([clip if argument == "CLIP" else argument for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hico chat: ")
    assert words in error
    assert "Traceback" not in error


def test_help_waits_for_nothing_heavy():
    code = "import sys, hico.cli\ntry: hico.cli.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_list_names_every_part_in_one_line(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for parts in (registry.ENCODERS, registry.COMPRESSORS, registry.VIDEO_COMPRESSORS, registry.DROP_POLICIES):
        first = printed.index(f"{parts.kind}:") + 1
        lines = printed[first : first + len(parts.names())]
        assert [line.split()[0] for line in lines] == parts.names()
        assert all(len(line.split()) > 3 for line in lines)
