"""Chat templates: what they are told, what people write into messages, and what an assistant said."""

import pytest
import torch

from hico import HicoConfig, HicoProcessor
from hico.messages import normalize, source_of
from hico.prompt import label_mask, mark_answers, runs, take_answers
from hico.tokenizer import byte_tokenizer, word_tokenizer


@pytest.fixture
def processor():
    return HicoProcessor.from_config(HicoConfig.preset("tiny"), byte_tokenizer())


def frames(count):
    return torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8)


def say(role, content):
    return {"role": role, "content": content}


def text(words):
    return {"type": "text", "text": words}


THINKING = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if tools -%}tools: {{ tools | length }} {{ tools[0].function.name }}{%- endif -%}"
    "{%- if documents -%}{{ documents[0].text }}{%- endif -%}"
    "{%- if enable_thinking is defined and not enable_thinking -%}<think>\n\n</think>{%- endif -%}"
)


def look_up(place: str):
    """
    Look a place up.

    Args:
        place: its name
    """


@pytest.mark.parametrize("tokenize", [False, True])
def test_variables_reach_the_template(processor, tokenize):
    def written(**kwargs):
        out = processor.apply_chat_template([say("user", "hi")], THINKING, tokenize=tokenize, **kwargs)
        return processor.decode(out["input_ids"][0]) if tokenize else out

    plain = "<|im_start|>user\nhi<|im_end|>\n"
    assert written(enable_thinking=True) == written() == plain
    assert written(enable_thinking=False) == plain + "<think>\n\n</think>"
    assert written(tools=[look_up]) == plain + "tools: 1 look_up"
    assert written(documents=[{"text": "a page"}]) == plain + "a page"


def test_what_a_template_has_no_place_for_is_refused(processor):
    messages = [say("user", "hi")]
    with pytest.raises(ValueError, match="has no place for tools; give a chat_template that has one"):
        processor.apply_chat_template(messages, tools=[look_up])
    with pytest.raises(ValueError, match="has no place for documents"):
        processor.apply_chat_template(messages, documents=[{"text": "x"}])
    called = [*messages, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    with pytest.raises(ValueError, match="has no place for tool_calls"):
        processor.apply_chat_template(called)
    for tokenize in (False, True):
        with pytest.raises(TypeError, match=r"unknown arguments enable_thinking; .* mentions no such variable"):
            processor.apply_chat_template(messages, enable_thinking=False, tokenize=tokenize)
        with pytest.raises(TypeError, match="unknown arguments sanitize_control_tokens"):
            processor.apply_chat_template(messages, sanitize_control_tokens=True, tokenize=tokenize)


def test_one_of_several_templates_is_taken_by_name(processor):
    messages = [say("user", "hi")]
    processor.chat_template = {"default": "one", "other": "two"}
    assert processor.apply_chat_template(messages) == "one"
    assert processor.apply_chat_template(messages, "other") == "two"
    assert processor.apply_chat_template(messages, "{{ messages[0].content }}") == "hi"
    processor.chat_template = {"other": "two"}
    with pytest.raises(ValueError, match="several chat templates; name one with chat_template: other"):
        processor.apply_chat_template(messages)


WORDS = ["system", "user", "assistant", "what", "that", "and", "snow", "another"]
CONVERSATION = [
    say("user", [{"type": "video", "video": frames(8)}, text("What?")]),
    say("assistant", "That, and\n\u2603 snow."),
    say("user", [{"type": "image", "image": frames(1)[0].numpy()}, text("And this?")]),
    say("assistant", [text("Another.")]),
]


@pytest.mark.parametrize("style", ["short", "chat", None])
@pytest.mark.parametrize("make", [byte_tokenizer, lambda: word_tokenizer(WORDS)])
def test_the_mask_of_what_an_assistant_said_fits_the_tokens(make, style):
    processor = HicoProcessor.from_config(HicoConfig.preset("tiny"), make(), time_message=style)
    batch = [CONVERSATION, [say("user", "Short?"), say("assistant", "Yes.")], [say("user", "None?")]]
    settings = {"tokenize": True, "video_metadata": {"total_num_frames": 8, "fps": 1.0}}
    inputs = processor.apply_chat_template(batch, return_assistant_tokens_mask=True, **settings)
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    assert "offset_mapping" not in inputs
    without = processor.apply_chat_template(batch, **settings)
    assert torch.equal(without["input_ids"], inputs["input_ids"])
    newline, start, end = (processor.tokenizer(mark)["input_ids"][0] for mark in ("\n", "<|im_start|>", "<|im_end|>"))
    assistant = processor.tokenizer("assistant")["input_ids"]
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["assistant_masks"].tolist(), strict=True):
        marks = {"start_id": start, "end_id": end, "newline_id": newline, "assistant_ids": assistant}
        assert mask == [int(flag) for flag in label_mask(ids, **marks)]
    assert inputs["assistant_masks"][1].sum() == len(processor.tokenizer("Yes.<|im_end|>")["input_ids"])


def test_a_mask_that_cannot_be_is_refused(processor):
    with pytest.raises(ValueError, match="needs tokenize=True and return_dict=True"):
        processor.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match=r"does not mark what is generated; put it into \{% generation %\} blocks"):
        processor.apply_chat_template([say("user", "hi")], THINKING, tokenize=True, return_assistant_tokens_mask=True)


def test_parts_in_the_words_of_openai_are_taken(processor, tmp_path):
    from PIL import Image

    for number in range(4):
        Image.fromarray(frames(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    parts = [
        {"type": "image_url", "image_url": {"url": str(tmp_path / "0.png"), "detail": "high"}},
        {"type": "image_url", "image_url": (tmp_path / "0.png").as_uri()},
        {"type": "video_url", "video_url": {"url": str(tmp_path)}},
    ]
    inputs = processor.apply_chat_template([say("user", parts)], tokenize=True)
    assert len(inputs["image_grids"]) == 2
    assert len(inputs["pixel_values_videos"]) == 1


def test_content_none_is_no_content(processor):
    messages = [say("user", "hi"), say("assistant", None)]
    assert processor.apply_chat_template(messages).endswith("<|im_start|>assistant\n<|im_end|>\n")
    assert "content" in messages[1], "the caller's messages stay as they are"
    assert normalize(messages)[0][0][1] == {"role": "assistant"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([say("user", 3)], "the content of a message is 3; it must be text or a list of parts"),
        ([say("user", ["hi"])], "a part of a message is 'hi'; it must be a mapping with a 'type'"),
        ([say("user", "hi"), "hi"], "a message is 'hi'; it must be a mapping with 'role' and 'content'"),
        ([say("user", [{"type": "image"}])], "names no file; give it a 'path'"),
        ([say("user", [{"type": "video", "path": "a", "url": "b"}])], "names url and path; give it one of them"),
        ([say("user", [{"type": "image", "path": "a", "min_pixels": 4}])], "min_pixels have no effect on an image"),
    ],
)
def test_messages_that_say_too_little_or_too_much_are_refused(processor, messages, words):
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(messages, tokenize=True)


def test_a_source_and_its_settings_are_told_apart():
    assert source_of({"type": "video", "url": "a.mp4", "fps": 2}) == ("a.mp4", {"fps": 2})


def test_marks_go_in_and_out():
    marked = mark_answers("ab cd ef", [(3, 5), (6, 8)])
    assert take_answers(marked) == ("ab cd ef", [(3, 5), (6, 8)])
    assert runs([0, 1, 1, 0, 1]) == [(1, 3), (4, 5)]
    assert runs([]) == runs([0]) == []
