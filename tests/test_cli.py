"""The command line, as a user meets it."""

import io
import subprocess
import sys

import pytest

from hico.cli import main
from hico.demo import write_moving_square


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "missing.mp4", "What?"], "missing.mp4"),
        (["chat", "CLIP", "What?", "--frames", "8", "--fps", "2"], "--frames and --fps exclude each other"),
        (["chat", "CLIP", "What?", "--start", "90"], "90"),
        (["chat", "CLIP", "What?", "--frames", "0"], "num_frames of at least 1, not 0"),
        (["chat", "CLIP", "What?", "--fps", "0"], "--fps is 0; give a positive number"),
        (["chat", "CLIP", "What?", "--fps", "nan"], "--fps is nan; give a positive number"),
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
