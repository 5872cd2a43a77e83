"""What is learned of a conversation, in the languages of five families of LLMs, checked against the text."""

from pathlib import Path

import pytest
import torch
from chat_templates import FAMILIES, family_tokenizer
from train_corpus import losses, make, train, write_model
from transformers import AutoTokenizer

from hico import HicoConfig, HicoProcessor
from hico.data.labels import Labels, label_marks
from hico.prompt import IMAGE_TOKEN, VIDEO_TOKEN, label_mask, take_answers
from hico.tokenizer import add_placeholders

ENDS = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
THOUGHT = {"qwen3": "<think>\n\n</think>\n\n"}
QWEN2_FILES = Path(__file__).parents[2] / "shared" / "releases" / "videochat-flash-7b-448"


def processor_of(family):
    return HicoProcessor.from_config(HicoConfig.preset("tiny"), family_tokenizer(family))


def turns(*texts):
    roles = ("user", "assistant") * len(texts)
    return [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, texts, strict=False)
    ]


def learned_texts(processor, messages, *, scheme="assistant", **media):
    """Return every run of learned tokens as text."""
    labels = Labels(processor, scheme)
    batch = processor([labels.mark(messages)], padding=False, **media)
    ids = batch["input_ids"][0]
    learned = labels.learned(ids, batch["assistant_masks"][0]).tolist()
    runs, previous = [], False
    for token, is_learned in zip(ids.tolist(), learned, strict=True):
        if is_learned:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = is_learned
    return [processor.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_their_ends_are_learned_in_every_language(family):
    end, thought = ENDS.get(family, "<|im_end|>"), THOUGHT.get(family, "")
    space = " " if family == "mistral" else ""
    messages = turns("What?", "Yes. It is.", "Why?", "It\nrains.")
    expected = [f"{space}Yes. It is.{end}", f"{space}{thought}It\nrains.{end}"]
    assert learned_texts(processor_of(family), messages) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_begins_with_a_newline_is_learned(family):
    (run,) = learned_texts(processor_of(family), turns("What?", "\nYes."))
    assert "Yes." + ENDS.get(family, "<|im_end|>") in run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_that_repeats_the_answer_is_not_learned(family):
    messages = turns("Yes.", "Yes.", "assistant\nYes.", "Yes.")
    runs = learned_texts(processor_of(family), messages)
    assert len(runs) == 2
    assert all(run.count("Yes.") == 1 for run in runs)


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_and_images_between_turns_shift_no_label(family):
    messages = turns("Look.", "Yes. One.", "And this?", "Yes. Two.")
    for turn, kind in ((0, "video"), (2, "image")):
        messages[turn]["content"].insert(0, {"type": kind})
    processor = processor_of(family)
    side = processor.vision.image_size
    media = {"videos": [torch.zeros(4, 3, side, side, dtype=torch.uint8)],
             "images": [torch.zeros(3, side, side, dtype=torch.uint8)]}  # fmt: skip
    runs = learned_texts(processor, messages, **media)
    assert [run.strip().removeprefix(THOUGHT.get(family, "")) for run in runs] == [
        f"Yes. {number}.{ENDS.get(family, '<|im_end|>')}" for number in ("One", "Two")
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_without_loss_is_not_learned(family):
    messages = turns("What?", "Wrong.", "Really?", "Right.")
    messages[1]["loss"] = False
    (run,) = learned_texts(processor_of(family), messages)
    assert "Right." in run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_begins_once(family):
    processor = processor_of(family)
    bos = processor.tokenizer.bos_token_id
    ids = processor([Labels(processor).mark(turns("What?", "Yes."))], padding=False)["input_ids"][0].tolist()
    assert bos is None or ids.count(bos) == 1


def test_thoughts_are_learned_where_the_template_keeps_them():
    processor = processor_of("qwen3")
    messages = turns("What?", "<think>\nHm.\n</think>\n\nYes.", "Why?", "<think>\nOh.\n</think>\n\nSo.")
    assert learned_texts(processor, messages) == ["Yes.<|im_end|>", "<think>\nOh.\n</think>\n\nSo.<|im_end|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_cannot_end_its_turn(family):
    end = ENDS.get(family, "<|im_end|>")
    with pytest.raises(ValueError, match="would be read as the border of a turn"):
        Labels(processor_of(family)).mark(turns(f"What?{end}", "Yes."))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n<|im_end|>\n{% endfor %}", "loses What?"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "writes nothing to end an answer"),
        ("{{ raise_exception('no') }}", "cannot be used: no"),
        ("{{ messages[0].content + '<|im_end|>' }}", "loses Yes."),
    ],
)
def test_a_template_from_which_nothing_can_be_learned_is_an_error(template, message):
    processor = processor_of("chatml")
    processor.chat_template = template
    with pytest.raises(ValueError, match=message):
        Labels(processor)


def test_what_a_template_refuses_is_said_of_the_conversation():
    messages = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *turns("What?", "Yes.")]
    with pytest.raises(ValueError, match="refuses the conversation: System role not supported"):
        Labels(processor_of("gemma")).mark(messages)
    (run,) = learned_texts(processor_of("mistral"), messages)
    assert run.strip() == "Yes.</s>"


@pytest.mark.parametrize("scheme", ["published", "longva"])
def test_published_schemes_learn_answers_that_begin_with_a_newline_and_are_otherwise_as_before(scheme):
    processor = processor_of("chatml")
    labels, marks = Labels(processor, scheme), label_marks(processor.tokenizer)
    for answer in ("Yes.", "\nYes."):
        batch = processor([labels.mark(turns("What?", answer))], padding=False)
        ids = batch["input_ids"][0]
        learned = labels.learned(ids, batch["assistant_masks"][0])
        before = torch.tensor(label_mask(ids.tolist(), scheme=scheme, **marks))
        before[0] = False
        if answer == "Yes.":
            assert torch.equal(learned, before)
        else:
            text = processor.tokenizer.decode(ids[learned & ~before])
            assert "Yes." in text


def test_published_schemes_say_that_they_need_chatml():
    with pytest.raises(ValueError, match="published label schemes need ChatML, label_scheme: assistant does not"):
        Labels(processor_of("llama3"), "published")


@pytest.mark.skipif(not QWEN2_FILES.is_dir(), reason="the tokenizer of a release is not here")
def test_qwen2_files_learn_what_the_text_says():
    tokenizer = AutoTokenizer.from_pretrained(QWEN2_FILES)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN, IMAGE_TOKEN]})
    for template in (None, FAMILIES["chatml"][0]):
        processor = HicoProcessor.from_config(HicoConfig.preset("tiny"), tokenizer, chat_template=template)
        messages = turns("What? \u5c71", "\nYes. \u96e8", "Why?", "It \u6c34 rains.")
        runs = learned_texts(processor, messages)
        assert [run.lstrip("\n") for run in runs] == ["Yes. \u96e8<|im_end|>", "It \u6c34 rains.<|im_end|>"]


def test_marks_are_taken_out_where_they_stand():
    assert take_answers("ab") == ("ab", [])
    assert take_answers("a\ufdd0bc\ufdd1d\ufdd0e\ufdd1") == ("abcde", [(1, 3), (4, 5)])


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma"])
def test_a_model_with_the_language_of_its_llm_trains(folder, family):
    tokenizer = family_tokenizer(family)
    write_model(folder / "own", **add_placeholders(tokenizer))
    HicoProcessor.from_config(HicoConfig.from_pretrained(folder / "own"), tokenizer).save_pretrained(folder / "own")
    trainer = train(make(folder, model=str(folder / "own"), max_steps=2))
    assert all(0 < loss < 20 for loss in losses(trainer.state.log_history).values())
