"""The command line, as a user meets it."""

import io

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
        (["chat", "CLIP", "What?", "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_line_on_standard_error(arguments, words, clip, capsys):
    assert main([clip if argument == "CLIP" else argument for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hico chat: ")
    assert words in error
    assert "Traceback" not in error
