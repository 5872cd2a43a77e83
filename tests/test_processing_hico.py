"""The processor: messages in, model inputs out."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from hico import HicoConfig, HicoProcessor
from hico.processing_hico import split_clips
from hico.tokenizer import byte_tokenizer

VIDEO, IMAGE = 260, 259


@pytest.fixture
def processor():
    return HicoProcessor.from_config(HicoConfig.preset("tiny"), byte_tokenizer())


def frames(count, size=48):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


def test_byte_tokenizer_gives_every_text_back():
    tokenizer = byte_tokenizer()
    for words in ("plain", "snow \u2603 and \u4f60\u597d", "\n\t\x00\x7f", "<|im_start|>user"):
        assert tokenizer.decode(tokenizer(words)["input_ids"]) == words
    assert tokenizer("A\n")["input_ids"] == [65, 10]
    assert len(tokenizer) == 261


def test_a_video_becomes_placeholders_and_a_time_message(processor):
    inputs = processor.apply_chat_template(
        user({"type": "video", "video": frames(8)}, text("What?")),
        tokenize=True,
        add_generation_prompt=True,
        video_metadata={"total_num_frames": 8, "fps": 1.0},
    )
    assert (inputs["input_ids"] == VIDEO).sum() == 32
    assert inputs["pixel_values_videos"].shape == (2, 4, 3, 48, 48)
    assert inputs["pixel_values_videos"].dtype == torch.uint8
    assert inputs["video_num_clips"].tolist() == [2]
    words = processor.decode(inputs["input_ids"][0]).replace("<|video_pad|>", "")
    assert words == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n\n"
        "The video lasts for 8.00 seconds, and 8 frames are uniformly sampled from it. \nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_frames_fill_their_last_clip_by_repeating_the_last_frame(processor):
    video = frames(6)
    inputs = processor("<|video_pad|>", videos=video)
    clips = inputs["pixel_values_videos"]
    assert clips.shape[0] == 2
    assert torch.equal(clips.flatten(0, 1)[:6], video)
    assert torch.equal(clips[1, 2], video[5])
    assert torch.equal(clips[1, 3], video[5])
    assert torch.equal(split_clips(video[:4], 4)[0], video[:4])


def test_an_image_is_tiled_behind_its_thumbnail(processor):
    inputs = processor("a <|image_pad|> b", images=picture(96, 48))
    rows, columns = inputs["image_grids"][0].tolist()
    assert (rows, columns) == (1, 2)
    assert inputs["pixel_values"].shape == (3, 3, 48, 48)
    assert (inputs["input_ids"] == IMAGE).sum() == 48
    left, right = np.asarray(picture(96, 48))[:, :48], np.asarray(picture(96, 48))[:, 48:]
    assert np.array_equal(inputs["pixel_values"][1].permute(1, 2, 0), left)
    assert np.array_equal(inputs["pixel_values"][2].permute(1, 2, 0), right)
    processor.image_tiling = "single"
    inputs = processor("<|image_pad|>", images=picture(96, 48))
    assert inputs["image_grids"].tolist() == [[0, 0]]
    assert (inputs["input_ids"] == IMAGE).sum() == 16


def test_a_batch_is_left_padded_and_keeps_the_order_of_its_media(processor):
    first, second = frames(4), frames(8)
    inputs = processor.apply_chat_template(
        [
            [{"role": "user", "content": "no picture"}],
            user({"type": "video", "video": first}, {"type": "image", "image": picture(48, 48)}, text("both")),
            user({"type": "video", "video": second}, text("one")),
        ],
        tokenize=True,
    )
    assert inputs["video_num_clips"].tolist() == [1, 2]
    assert torch.equal(inputs["pixel_values_videos"].flatten(0, 1), torch.cat([first, second]))
    assert (inputs["attention_mask"][:, -1] == 1).all()
    assert (inputs["input_ids"] == VIDEO).sum(1).tolist() == [0, 16, 32]
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [0, 32, 0]


def test_a_list_of_pictures_is_a_video_and_a_path_is_opened(processor, tmp_path):
    pictures = [picture(50 + i, 40) for i in range(4)]
    inputs = processor("<|video_pad|>", videos=[pictures])
    assert inputs["pixel_values_videos"].shape == (1, 4, 3, 48, 48)
    for i, image in enumerate(pictures):
        image.save(tmp_path / f"{i}.png")
    settings = {"mode": "middle", "num_frames": 4, "scaler": "exact"}
    from_folder = processor("<|video_pad|>", videos=tmp_path, video_kwargs=settings)
    assert torch.equal(from_folder["pixel_values_videos"], inputs["pixel_values_videos"])


def test_save_and_load_round_trip(processor, tmp_path):
    processor.time_message = "long"
    processor.video = {"max_frames": 16}
    processor.save_pretrained(tmp_path)
    HicoConfig.preset("tiny").save_pretrained(tmp_path)
    for again in (HicoProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is HicoProcessor
        assert again.vision == processor.vision
        assert (again.time_message, again.video, again.image_tiling) == ("long", {"max_frames": 16}, "anyres_nopad")
        assert again.tokenizer.padding_side == "left"
        video = frames(4)
        before, after = processor("<|video_pad|> x", videos=video), again("<|video_pad|> x", videos=video)
        assert torch.equal(before["input_ids"], after["input_ids"])
        assert again.apply_chat_template(user(text("hi"))) == processor.apply_chat_template(user(text("hi")))


def test_wrong_input_is_named(processor, tmp_path):
    with pytest.raises(ValueError, match=r"2 were given for the 1 <\|video_pad\|> of the text"):
        processor("<|video_pad|>", videos=[frames(4), frames(4)])
    with pytest.raises(ValueError, match=r"missing\.png: no such image file"):
        processor("<|image_pad|>", images=str(tmp_path / "missing.png"))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png: not an image that Pillow can read"):
        processor("<|image_pad|>", images=tmp_path / "text.png")
    with pytest.raises(ValueError, match="names no file"):
        processor.apply_chat_template(user({"type": "video"}), tokenize=True)
    with pytest.raises(Exception, match="unknown content type audio"):
        processor.apply_chat_template(user({"type": "audio", "path": "x.wav"}))
    with pytest.raises(ValueError, match="unknown time message 'shrot'"):
        HicoProcessor.from_config(HicoConfig.preset("tiny"), byte_tokenizer(), time_message="shrot")
    with pytest.raises(TypeError, match="unknown video setting 'nframes'; did you mean 'num_frames'"):
        HicoProcessor.from_config(HicoConfig.preset("tiny"), byte_tokenizer(), video={"nframes": 3})
    with pytest.raises(ValueError, match="unknown image_tiling 'anyres'"):
        HicoProcessor.from_config(HicoConfig.preset("tiny"), byte_tokenizer(), image_tiling="anyres")


def test_a_placeholder_typed_into_a_question_is_not_taken_for_a_video(processor):
    question = text("what does <|video_pad|> mean?")
    for batch in ([user(question)], [user({"type": "video", "video": frames(4)}, question)]):
        with pytest.raises(ValueError, match="and none into a question"):
            processor.apply_chat_template(batch, tokenize=True)


def test_any_character_may_stand_in_a_prompt(processor):
    prompts = ["a\0b", "", "\\1 \u00e9\U0001f600"]
    inputs = processor(prompts)
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == prompts


def test_a_damaged_image_file_is_named(processor, tmp_path):
    path = tmp_path / "cut.jpg"
    picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    for bad in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"{bad.name}: not an image that Pillow can read \("):
            processor("<|image_pad|>", images=bad)


def test_arrays_are_videos_too(processor):
    video = frames(4)
    for same in (video.numpy(), video.permute(0, 2, 3, 1).numpy()):
        inputs = processor("<|video_pad|>", videos=same)
        assert torch.equal(inputs["pixel_values_videos"].flatten(0, 1), video)


@pytest.mark.parametrize("shape", [(0, 3, 48, 48), (3, 48, 48), (2, 4, 3, 48, 48)])
def test_frames_of_another_shape_are_refused(processor, shape):
    with pytest.raises(ValueError, match=r"frames of shape .* are not \(F, 3, H, W\)"):
        processor("<|video_pad|>", videos=torch.zeros(shape, dtype=torch.uint8))


def test_settings_without_effect_are_refused(processor):
    with pytest.raises(TypeError, match=r"unknown arguments num_frames; .* video_kwargs"):
        processor.apply_chat_template(user(text("hi")), tokenize=True, num_frames=4)
    with pytest.raises(TypeError, match="unknown arguments videos"):
        processor.apply_chat_template(user(text("hi")), videos=[frames(4)])
    with pytest.raises(ValueError, match="end, start have no effect on frames"):
        processor.apply_chat_template(
            user({"type": "video", "video": frames(8), "num_frames": 4, "end": 2.0, "start": 1.0}), tokenize=True
        )


def test_arguments_of_the_processor_may_stand_in_a_dict(processor):
    settings = {"padding": "max_length", "max_length": 80}
    inputs = processor.apply_chat_template(user(text("hi")), tokenize=True, processor_kwargs=settings)
    assert inputs["input_ids"].shape == (1, 80)


def test_a_conversation_without_messages_is_refused(processor):
    with pytest.raises(ValueError, match="no messages"):
        processor.apply_chat_template([])


def test_an_answer_can_be_continued(processor):
    messages = [*user(text("Count.")), {"role": "assistant", "content": "One, two"}]
    assert processor.apply_chat_template(messages, continue_final_message=True).endswith("\nOne, two")


def test_a_longva_processor_writes_no_time_message_and_crops_frames():
    for video in ({}, {"num_frames": 8}):
        processor = HicoProcessor.from_config(HicoConfig.preset("longva-7b"), byte_tokenizer(), video=video)
        assert (processor.time_message, processor.image_tiling) == (None, "unires")
        assert processor.video == {"fit": "crop", **video}


def test_what_the_model_says_is_not_asked_of_a_video(processor):
    with pytest.raises(TypeError, match=r"clip_len = 8 cannot be asked .* has 4 frames; .* set multiple_of"):
        processor("<|video_pad|>", videos="a.mp4", video_kwargs={"clip_len": 8})
    with pytest.raises(TypeError, match="size = 24 cannot be asked of a video: the model takes one size"):
        processor.video_settings({"size": 24})
    with pytest.raises(TypeError, match="clip_len = 8 cannot be asked"):
        HicoProcessor.from_config(HicoConfig.preset("tiny"), byte_tokenizer(), video={"clip_len": 8})


def test_a_user_changes_the_multiple_and_a_bound_gives_way(processor, tmp_path):
    for number in range(40):
        picture(48, 48).save(tmp_path / f"{number}.png")
    processor.video = {"mode": "dynamic_fps1", "min_frames": 4, "max_frames": 512, "multiple_of": 16}

    def num_frames(**asked):
        return len(processor("<|video_pad|>", videos=tmp_path, video_kwargs=asked)["pixel_values_videos"]) * 4

    assert [num_frames(), num_frames(multiple_of=8), num_frames(multiple_of=4)] == [32, 40, 40]
    assert num_frames(fps=1) == 40  # and no multiple of 16
    assert num_frames(num_frames=7) == 8
    processor.video["min_frames"] = 64
    assert num_frames(max_frames=16) == 16
    processor.video = {"mode": "linspace", "num_frames": 32, "bounds": "published"}
    assert processor.video_settings({"num_frames": 16}) == {**processor.video, "num_frames": 16}
    assert num_frames(max_frames=16) == 16


def test_the_question_of_a_chat_follows_the_sentence_in_its_line(processor):
    metadata = {"total_num_frames": 8, "fps": 1.0}
    turns = [*user({"type": "video", "video": frames(8)}, text("What?")), {"role": "assistant", "content": "That."}]
    turns += user(text("Why?"))
    sentence = "\nThe video lasts for 8.00 seconds, and 8 frames are uniformly sampled from it. "
    for style, between in (("short", "\n"), ("chat", "")):
        processor.time_message = style
        for messages, rest in ((turns[:1], ""), (turns, "<|im_start|>assistant\nThat.<|im_end|>\n")):
            expected = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                f"{'<|video_pad|>' * 32}{sentence}{between}What?<|im_end|>\n{rest}"
            )
            expected += "<|im_start|>user\nWhy?<|im_end|>\n" if rest else ""
            inputs = processor.apply_chat_template(messages, tokenize=True, video_metadata=metadata)
            assert inputs["input_ids"].tolist() == [processor.tokenizer(expected)["input_ids"]]
