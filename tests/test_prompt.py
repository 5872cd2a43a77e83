"""Prompts and labels against the published behaviour."""

import pytest
from helpers import golden_cases

from hico.prompt import expand_placeholders, label_mask, llava_turn, time_message


def cases_with(key):
    return [case for case in golden_cases("C") if key in case.facts]


@pytest.mark.golden
@pytest.mark.parametrize("case", cases_with("messages"), ids=lambda case: case.name)
def test_time_messages_match_the_published_ones(case):
    for row in case.facts["messages"]:
        seconds = [index / row["fps"] for index in row["indices"]]
        for style in ("short", "long"):
            assert time_message(style, duration=row["duration"], seconds=seconds) == row[style]
    for row in case.facts["train_prompt_values"]:
        assert llava_turn(row["value_in"], message=row["msg"]) == row["value_out"]


@pytest.mark.golden
@pytest.mark.parametrize("case", cases_with("examples"), ids=lambda case: case.name)
def test_labels_match_the_published_ones(case):
    for example in case.facts["examples"]:
        for system, scheme in (("videochat_flash", "published"), ("longva", "longva")):
            pieces = example[system]["pieces"]
            vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
            labelled = label_mask(
                [vocabulary[piece] for piece in pieces],
                start_id=vocabulary["<|im_start|>"],
                end_id=vocabulary["<|im_end|>"],
                newline_id=vocabulary["\n"],
                assistant_ids=[vocabulary["assistant"]],
                scheme=scheme,
            )
            assert [int(flag) for flag in labelled] == example[system]["labelled"], scheme


def test_only_answers_and_their_end_are_learned_by_default():
    # start=1 end=2 newline=3 assistant=(4, 5) user=6; the answer itself holds a newline
    ids = [1, 6, 3, 9, 2, 3, 1, 4, 5, 3, 8, 3, 7, 2, 3, 1, 6, 3, 4, 5, 3, 2, 3]
    mask = label_mask(ids, start_id=1, end_id=2, newline_id=3, assistant_ids=[4, 5])
    assert [token for token, flag in zip(ids, mask, strict=True) if flag] == [8, 3, 7, 2]


def test_unknown_schemes_and_styles_name_the_choices():
    with pytest.raises(ValueError, match="'assistant', 'published' or 'longva'"):
        label_mask([1], start_id=1, end_id=2, newline_id=3, assistant_ids=[4], scheme="all")
    with pytest.raises(ValueError, match="'short', 'long' or None"):
        time_message("tiny", duration=1.0, seconds=[0.0])


def test_no_style_says_nothing():
    assert time_message(None, duration=1.0, seconds=[0.0]) == ""


def test_placeholders_are_replaced_in_order_and_counted():
    assert expand_placeholders(["a.b.c", "\0", ".d"], ".", ["1", "\\2", "."]) == ["a1b\\2c", "\0", ".d"]
    with pytest.raises(ValueError, match=r"2 were given for the 1 \. of the text; put one where"):
        expand_placeholders(["a.", "b"], ".", ["1", "2"])
