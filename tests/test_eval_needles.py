"""Prompts of the text needle test against the published ones, and what they are put together of."""

import itertools
import json
import string

import numpy as np
import pytest
from helpers import GOLDEN

from hico.eval.haystack import folder_texts, haystack_digest, prose, read_haystack
from hico.eval.needles import CITIES, LLAMA2_ENDS, NEEDLE, PREFIX, QUESTION, Pieces, TextNeedles, plant, sentence_ends
from hico.eval.niah import parse_grid
from hico.tokenizer import byte_tokenizer, word_tokenizer

H1 = json.loads((GOLDEN / "H1_text_niah.json").read_text())
PERIOD = ord(".")


@pytest.mark.golden
@pytest.mark.parametrize("case", H1["cases"], ids=lambda case: f"depth {case['depth']:.1f}")
def test_prompts_are_the_published_ones(case):
    pieces = Pieces(case["prefix"], case["postfix"], LLAMA2_ENDS)
    chance = np.random.RandomState(case["np_random_seed_before_call"])
    haystack = case["haystack"][: case["context_length"]]
    where = {"depth": case["depth"], "distractors": case["distractors"], "chance": chance}
    prompt = pieces.prompt(haystack, case["needle"], **where)
    assert prompt == case["prompt"]
    assert prompt.index(case["needle"][0]) == case["needle_index_in_prompt"]


@pytest.mark.golden
def test_sentences_and_depths_are_the_published_ones():
    texts = H1["pieces"]
    assert NEEDLE.format("Singapore", "{}") == texts["needle"]
    assert [NEEDLE.format(city, "{}") for city in CITIES] == texts["distractors"]
    assert (texts["prefix"], texts["question"]) == (PREFIX, QUESTION)
    assert frozenset(H1["period_token_ids"]) == LLAMA2_ENDS
    for step in ("0.1", "0.2", "0.25"):
        depths = parse_grid(f"0:1:{step}", name="--depths", low=0, high=1)
        assert depths == pytest.approx(H1[f"depth_grid_{step}"], abs=1e-12)


def test_a_needle_stands_behind_the_next_sentence_end():
    tokens = [1, 9, 2, 3, 9, 4]
    assert plant(tokens, [0], 2, ends={9}) == [1, 9, 2, 3, 9, 0, 4]
    assert plant(tokens, [0], 4, ends={9}) == [1, 9, 2, 3, 9, 0, 4]
    assert plant(tokens, [0], 5, ends={9}) == [1, 9, 2, 3, 9, 0, 4], "no sentence ends from there on"


def test_depths_are_exact_where_floating_point_is_not():
    prompt = Pieces([], [], ()).prompt(list(range(100)), [-1], depth=0.29, chance=None)
    assert prompt.index(-1) == 29


def test_sentence_ends_are_those_of_the_tokenizer_at_hand():
    assert sentence_ends(byte_tokenizer()) == {ord(mark) for mark in ".!?"}
    words = word_tokenizer({"end", ".", "?", "\n"})
    assert sentence_ends(words) == set(words.convert_tokens_to_ids([".", "?"]))
    with pytest.raises(ValueError, match="no token that ends a sentence"):
        sentence_ends(word_tokenizer({"word"}))


def test_tokens_that_hold_more_than_the_mark_end_sentences_too():
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text) for text in ('."', ".\n\n", "done.", ".com", "。")])
    found = {tokenizer.decode([number]) for number in sentence_ends(tokenizer)}
    assert found == {".", "!", "?", '."', ".\n\n", "done.", "。"}


def test_a_prompt_holds_its_answer_once_and_ends_with_the_question():
    tokenizer = byte_tokenizer()
    needles = TextNeedles(tokenizer, sentence_ends(tokenizer), num_distractors=5)
    haystack = read_haystack(tokenizer, 3000)
    numbers = set()
    for depth, sample in itertools.product((0, 0.5, 1), range(4)):
        prompt, answer = needles.write(haystack, depth=depth, sample=sample)
        text, number = tokenizer.decode(prompt), tokenizer.decode(answer)
        assert text.startswith(PREFIX)
        assert text.endswith(QUESTION)
        assert text.count(NEEDLE.format("Singapore", number)) == 1
        assert sum(text.count(f"special magic {city} number") for city in CITIES) == 5
        assert 0 <= int(number) < 10**7
        numbers.add(number)
    assert len(numbers) == 12
    assert needles.write(haystack, depth=0.5, sample=1) == needles.write(haystack, depth=0.5, sample=1)


def test_needles_stand_between_sentences():
    tokenizer = byte_tokenizer()
    needles = TextNeedles(tokenizer, sentence_ends(tokenizer), num_distractors=3)
    haystack = read_haystack(tokenizer, 3000)
    for depth in (0.1, 0.4, 0.7):
        text = tokenizer.decode(needles.write(haystack, depth=depth)[0])
        assert text[: text.index(NEEDLE.partition("{}")[0] + "Singapore")].rstrip().endswith(".")


def test_a_tokenizer_without_digits_is_refused():
    with pytest.raises(ValueError, match="knows no digits"):
        TextNeedles(word_tokenizer({"a", "."}), {5})
    with pytest.raises(ValueError, match="there are 7 distractors; use 0 to 6"):
        TextNeedles(byte_tokenizer(), {5}, num_distractors=7)


def test_texts_begin_as_the_tokenizer_begins_them():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    assert TextNeedles(tokenizer, {PERIOD}).begin == []
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    template = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)])
    tokenizer.backend_tokenizer.post_processor = template
    needles = TextNeedles(tokenizer, {PERIOD})
    prompt, answer = needles.write([PERIOD] * 9, depth=0.5)
    assert prompt[0] == bos
    assert bos not in prompt[1:] + answer


def test_bundled_prose_is_the_same_everywhere_and_does_not_repeat():
    paragraphs = list(itertools.islice(prose(), 400))
    assert len(set(paragraphs)) == 400
    assert paragraphs[0] == next(prose(0)) != next(prose(1))
    assert haystack_digest([ord(char) for char in paragraphs[0]])[:8] == "5f546d97"
    assert set("".join(paragraphs)) <= set(string.ascii_letters + " .,'\n")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name, text in {"b.txt": "second.", "a/z.md": "first.", "c.png": "no text"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert "".join(folder_texts(tmp_path)) == "first.\n\nsecond.\n\n"


def test_text_that_is_too_short_is_refused_or_repeated(tmp_path):
    (tmp_path / "a.txt").write_text("one. two.")
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"has 11 tokens, but 25 are needed; .* --repeat-haystack"):
        read_haystack(tokenizer, 25, folder=tmp_path)
    repeated = read_haystack(tokenizer, 25, folder=tmp_path, repeat=True)
    assert tokenizer.decode(repeated) == ("one. two.\n\n" * 3)[:25]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no \.txt or .md files"):
        read_haystack(tokenizer, 25, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1000:224000:16000", [1000.0 + 16000 * n for n in range(14)]),
        ("0:1:0.2", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("0.5", [0.5]),
        ("3,1,2,2", [1, 2, 3]),
    ],
)
def test_grids_are_ranges_or_lists(text, values):
    assert parse_grid(text, name="--x", low=0) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1.5:0.5", "--depths has 1.5; it must be from 0 to 1"),
        ("-0.1", "--depths has -0.1; it must be from 0 to 1"),
        ("0:1", "--depths is '0:1'; give FROM:TO:STEP"),
        ("0:1:0", "--depths 0:1:0 is empty; the step must be positive"),
        ("1:0:0.1", "--depths 1:0:0.1 is empty"),
        ("a few", "--depths is 'a few'; give FROM:TO:STEP"),
        ("nan", "--depths is 'nan'; give"),
    ],
)
def test_grids_that_mean_nothing_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_grid(text, name="--depths", low=0, high=1)
