"""Preference rows: two answers to one prompt, in every form that the documentation shows, and nothing else."""

import json
import re

import pytest
import torch
from test_data_forms import DOCUMENT
from test_data_mixture import write_rows
from train_corpus import make, write_pairs

from hico.data.collator import Collator
from hico.data.dataset import BadRow, TrainingRows
from hico.data.decoding import SampleError
from hico.data.forms import Media
from hico.data.lengths import measure_lengths
from hico.data.mixture import Mixture
from hico.data.pairs import parse_pair, split_pair
from hico.data.rowfiles import RowFile
from hico.data.spec import DatasetSpec
from hico.prompt import IGNORE_INDEX
from hico.train.plan import prepare

FORMS = re.findall(r"^\| (.+?) \| `(\{.+\})` \|$", DOCUMENT.partition("## Preference rows")[2], flags=re.MULTILINE)
PAIR = {"video": "a.mp4", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
USER = {"from": "human", "value": "What?"}
CAT, DOG = ({"from": "gpt", "value": f"A {animal}."} for animal in ("cat", "dog"))


def pair(row, tmp_path, **options):
    file = RowFile(write_rows(tmp_path / "rows.json", [row]))
    return parse_pair(file[0], file, 0, **options)


def said(messages):
    return [(turn["role"], "".join(part.get("text", "") for part in turn["content"])) for turn in messages]


@pytest.mark.parametrize(("what", "row"), FORMS)
def test_the_documented_forms_are_read(tmp_path, what, row):
    found = pair(json.loads(row), tmp_path)
    assert len(FORMS) == 8
    before = {"earlier turns": [("user", "Hello"), ("assistant", "Hi.")], "system": [("system", "Be brief.")]}
    expected = [*next((turns for word, turns in before.items() if word in what), []), ("user", "What?")]
    assert said(found.messages) == [*expected, ("assistant", "A cat.")]
    assert said(found.rejected) == [*expected, ("assistant", "A dog.")]
    assert found.media == ([] if "alone" in what else [Media("video", "cat.mp4")])
    for talk in (found.messages, found.rejected):
        learned = [turn.get("loss", True) for turn in talk if turn["role"] == "assistant"]
        assert learned == [False] * (len(learned) - 1) + [True]
        assert [part["type"] for turn in talk for part in turn["content"]].count("video") == len(found.media)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "rejected": None}, "it lacks 'rejected'; a preference row has two answers, 'chosen' and"),
        ({**PAIR, "chosen": ""}, "it lacks 'chosen'"),
        ({"video": "a.mp4", "conversations": [USER, CAT]}, "it lacks 'chosen' and 'rejected'"),
        ({"messages": [{"role": "user", "content": "What?"}], "rejected_response": "A dog."}, "it lacks 'chosen'"),
        ({**PAIR, "rejected": "A cat."}, "'chosen' and 'rejected' are the same answer"),
        ({**PAIR, "rejected": [CAT]}, "are the same answer"),
        ({**PAIR, "rejected": [USER]}, "'rejected' ends with a turn of 'user', not with an answer"),
        ({**PAIR, "prompt": None}, "it has none of 'prompt', 'conversations', 'messages'"),
        ({**PAIR, "conversations": [{"from": "human", "value": "Who?"}]}, "its prompts differ"),
        ({**PAIR, "prompt": None, "chosen": [USER, CAT], "rejected": [DOG, USER, DOG]}, "its prompts differ"),
        ({**PAIR, "prompt": [USER, {"from": "gpt", "value": "A bird."}]}, "its prompt ends with an answer"),
        ({**PAIR, "chosen": {"score": 3}}, r"'chosen' holds \{'score': 3\}; write a text, or turns"),
        ({**PAIR, "chosen": " "}, "an answer is empty"),
        ({**PAIR, "vidoe": "a.mp4"}, "the key 'vidoe', which means nothing here; did you mean 'video'"),
        ({**PAIR, "prompt": [{**USER, "lose": 0}]}, "a turn has the key 'lose'"),
        ({**PAIR, "prompt": "<video> or <video>?"}, r"there are 2 placeholder\(s\)"),
    ],
)
def test_what_a_pair_cannot_be_is_said_with_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"^malformed row at .*rows\.json:\d+: .*{message}"):
        pair(row, tmp_path)


def test_splitting_leaves_the_row_as_it_was():
    row = {**PAIR, "prompt": [USER, CAT, USER], "id": 3, "answer": "Felix", "chosen_score": 5, "rejected_score": 1}
    before = json.loads(json.dumps(row))
    chosen, rejected = split_pair(row)
    assert row == before
    assert set(chosen) == set(rejected) == {"video", "id", "messages"}


# Mixtures ---------------------------------------------------------------------------------------------------------


def test_plain_rows_and_pairs_are_not_taken_for_each_other(tmp_path, caplog):
    plain = {"conversations": [USER, CAT]}
    path = write_rows(tmp_path / "rows.jsonl", [PAIR, plain, {**PAIR, "rejected": ""}])
    spec = DatasetSpec(json_path=str(path))
    with pytest.raises(ValueError, match=r"^2 malformed rows: .*rows\.jsonl:2: it lacks 'chosen' and 'rej.*:3: "):
        Mixture([spec], preferences=True, check_files=False)
    mixture = Mixture([spec], preferences=True, check_files=False, on_bad_sample="skip")
    assert len(mixture) == 1
    assert "left out 2 malformed row(s)" in caplog.text
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: it has two answers, which only preference rows have"):
        Mixture([spec], check_files=False)
    assert len(Mixture([spec], check_files=False, on_bad_sample="skip")) == 1


# Examples and batches ---------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(folder):
    """The rows of the corpus with a second answer each."""
    write_pairs(folder)
    return folder


def recipe_for(folder, **changes):
    return make(folder, objective="preference", data=str(folder / "pairs.yaml"), **changes)


def rows_of(recipe):
    prepared = prepare(recipe)
    return TrainingRows(prepared.mixture, prepared.processor, recipe, seed=3)


def text_of(dataset, example):
    learned = example["input_ids"][example["labels"] != IGNORE_INDEX]
    return dataset.processor.tokenizer.decode(learned)


def test_two_answers_share_a_prompt_and_its_pixels(pairs):
    dataset = rows_of(recipe_for(pairs))
    for number in range(3):
        example = dataset[0, number]
        other = example["rejected"]
        assert set(other) == {"input_ids", "labels"}
        assert text_of(dataset, example) == f"number {number}<|im_end|>"
        assert text_of(dataset, other) == "I " + "do not " * number + "know<|im_end|>"
        start = int((example["labels"] != IGNORE_INDEX).nonzero()[0])
        assert torch.equal(example["input_ids"][:start], other["input_ids"][:start])


def test_a_video_is_read_once_for_both_answers(pairs):
    dataset, read = rows_of(recipe_for(pairs)), []
    real = dataset._read
    dataset._read = lambda *request: (read.append(request), real(*request))[1]
    dataset[0, 0]
    assert len(read) == 1


def test_a_batch_has_the_chosen_answers_and_then_the_others(pairs):
    dataset = rows_of(recipe_for(pairs))
    some = [dataset[0, number] for number in (0, 1, 2, 3)]
    batch = Collator(dataset.processor, preferences=True)(some)
    assert batch["visual_copies"] == 2
    assert batch["num_rows"] == 4
    assert len(batch["input_ids"]) == len(batch["labels"]) == len(batch["modality"]) == 8
    assert batch["video_num_clips"].tolist() == [len(some[n]["pixel_values_videos"]) for n in (0, 3)]
    assert torch.equal(batch["pixel_values"], some[1]["pixel_values"])
    for number, example in enumerate([*some, *(example["rejected"] for example in some)]):
        length = len(example["input_ids"])
        assert torch.equal(batch["input_ids"][number, :length], example["input_ids"])
        assert int(batch["attention_mask"][number].sum()) == length
    assert torch.equal(batch["modality"][:4, 0], batch["modality"][4:, 0])


@pytest.mark.parametrize("needed", ["rows", "pixels", "both"])
def test_what_stands_in_for_missing_rows_has_no_answers(pairs, needed):
    dataset = rows_of(recipe_for(pairs))
    batch = Collator(dataset.processor, needed=needed, preferences=True)([])
    assert len(batch["input_ids"]) == (4 if needed == "both" else 2)
    assert not (batch["labels"] != IGNORE_INDEX).any()


def test_answers_that_are_cut_to_the_same_text_are_a_bad_row(pairs):
    rows = [{"prompt": "What?", "chosen": "It is " + ending, "rejected": "It is not"} for ending in ("red", "nought")]
    write_rows(pairs / "pairs.json", rows)
    dataset = rows_of(recipe_for(pairs))
    length = len(dataset[0, 1]["input_ids"]) - 12
    recipe = recipe_for(pairs, max_length=length)
    with pytest.raises(SampleError, match=rf"its two answers differ only behind max_length {length}"):
        rows_of(recipe)[0, 1]
    recipe.on_bad_sample = "skip"
    assert isinstance(rows_of(recipe)[0, 1], BadRow)
    recipe.on_long_sample = "bad"
    assert "raise it or shorten the row" in rows_of(recipe)[0, 0].reason


def test_a_budget_of_tokens_holds_for_both_answers(pairs):
    recipe = recipe_for(pairs, max_length=300, max_tokens_per_batch=900)
    prepared = prepare(recipe)
    dataset = rows_of(recipe)
    lengths = measure_lengths(prepared.mixture, prepared.processor, recipe)
    sizes = [max(len(e["input_ids"]), len(e["rejected"]["input_ids"])) for e in (dataset[0, n] for n in range(12))]
    assert all(length >= 2 * size for length, size in zip(lengths, sizes, strict=True))
    assert all(length <= 2 * size + 40 for length, size in zip(lengths, sizes, strict=True))
    for devices, needed in ((1, "rows"), (2, "pixels")):
        collator = Collator(dataset.processor, preferences=True, needed=needed)
        for keys in prepared.sampler(world_size=devices):
            assert collator([dataset[key] for key in keys])["input_ids"].numel() <= 900
    with pytest.raises(ValueError, match="max_tokens_per_batch 500 is below max_length of two answers"):
        recipe_for(pairs, max_length=300, max_tokens_per_batch=500)
