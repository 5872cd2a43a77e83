"""Images and frames from wherever people have them."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata

from hico import HicoConfig, HicoProcessor, media
from hico.media import flat_videos, open_image
from hico.tokenizer import byte_tokenizer
from hico.video_io import Video, read_video

SENTENCE = "The video lasts for {:.2f} seconds, and {} frames are uniformly sampled from it."


@pytest.fixture
def processor():
    return HicoProcessor.from_config(HicoConfig.preset("tiny"), byte_tokenizer())


def frames(count, size=48):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def picture(seed=0, size=(20, 14)):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "a picture.png"
    picture().save(path)
    return path


def test_an_image_is_loaded_from_wherever_transformers_loads_it(png):
    data = png.read_bytes()
    text = base64.b64encode(data).decode()
    expected = np.asarray(load_image(str(png)))
    ways = [png, str(png), png.as_uri(), f"data:image/png;base64,{text}", text, base64.encodebytes(data).decode()]
    for way in [*ways, data, bytearray(data), memoryview(data)]:
        assert np.array_equal(np.asarray(open_image(way)), expected)
    assert open_image(picture()) == picture()


def test_an_image_is_fetched_by_transformers_within_a_time(monkeypatch):
    asked = {}
    monkeypatch.setattr(media, "load_image", lambda address, **settings: asked.update({address: settings}))
    open_image("https://example.org/a.png")
    assert asked == {"https://example.org/a.png": {"timeout": 60.0}}

    def fail(address, timeout):
        raise OSError("no route")

    monkeypatch.setattr(media, "load_image", fail)
    with pytest.raises(ValueError, match=r"http://x/a\.png: no image could be fetched \(OSError\('no route'\)\)"):
        open_image("http://x/a.png")


@pytest.mark.parametrize("key", ["url", "base64", "path", "image"])
def test_a_part_may_hold_its_image_under_any_key(processor, png, key):
    value = base64.b64encode(png.read_bytes()).decode() if key == "base64" else str(png)
    messages = [{"role": "user", "content": [{"type": "image", key: value}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True)
    assert torch.equal(inputs["pixel_values"], processor("<|image_pad|>", images=picture())["pixel_values"])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("/no/such/file.png", r"/no/such/file\.png: no such image file; check the path"),
        ("data:image/png;base64,AAAA", "AAAA: no such image file; check the path, or give whole base64"),
        ("QUFB" * 400, r"^QUFBQUFB.{52}\.\.\.: no such image file"),
        (b"no image", r"<8 bytes>: not an image that Pillow can read"),
        (b"", r"<0 bytes>: not an image"),
    ],
)
def test_what_is_no_image_is_named(image, words):
    with pytest.raises(ValueError, match=words):
        open_image(image)


def prompt(processor, *args, **kwargs):
    return processor.decode(processor("<|video_pad|>", *args, **kwargs)["input_ids"][0])


def test_frames_bring_their_clock(processor):
    video, indices = frames(4), [0, 30, 60, 90]
    metadata = VideoMetadata(total_num_frames=120, fps=30.0, duration=4.0, frames_indices=np.array(indices))
    for given in (
        {"videos": video, "video_metadata": metadata},
        {"videos": [video], "video_metadata": [metadata]},
        {"videos": [[video]], "video_metadata": [[metadata]]},
        {"videos": video, "video_metadata": {"total_num_frames": 120, "fps": 30.0, "frames_indices": indices}},
        {"videos": video, "video_metadata": {"total_num_frames": 120, "duration": 4.0, "frames_indices": indices}},
        {"videos": (video.permute(0, 2, 3, 1).numpy(), metadata)},
        {"videos": [(list(video), metadata)]},
    ):
        assert SENTENCE.format(4, 4) in prompt(processor, **given)
    processor.time_message = "long"
    assert "4 frames are uniformly sampled at 0.0, 1.0, 2.0, 3.0 seconds." in prompt(
        processor, videos=(video, metadata)
    )


def test_what_load_video_of_transformers_returns_is_a_video(processor):
    shown = frames(4).permute(0, 2, 3, 1).numpy()
    metadata = VideoMetadata(total_num_frames=100, fps=25.0, frames_indices=[0, 25, 50, 75], video_backend="pyav")
    messages = [{"role": "user", "content": [{"type": "video", "video": (shown, metadata)}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True)
    assert SENTENCE.format(4, 4) in processor.decode(inputs["input_ids"][0])
    assert torch.equal(inputs["pixel_values_videos"][0], torch.from_numpy(shown).permute(0, 3, 1, 2))


def test_frames_without_a_clock_count_as_in_transformers_and_are_told_of(processor, caplog):
    media._warn_once.cache_clear()
    assert VideoMetadata(total_num_frames=12).sampled_fps == media.USUAL_FPS
    for _ in range(2):
        assert SENTENCE.format(0.5, 12) in prompt(processor, videos=frames(12))
    [record] = caplog.records
    assert record.message.startswith("frames without a clock are taken for 24 per second; give video_metadata")


def test_a_list_of_files_is_a_video_where_lists_are_not_several(processor, tmp_path):
    paths = []
    for number in range(4):
        paths.append(str(tmp_path / f"{number}.png"))
        picture(number, size=(48, 48)).save(paths[-1])
    expected = processor("<|video_pad|>", videos=[[picture(n, size=(48, 48)) for n in range(4)]])
    messages = [{"role": "user", "content": [{"type": "video", "video": paths}]}]
    for inputs in (
        processor.apply_chat_template(messages, tokenize=True),
        processor("<|video_pad|>", videos=[[paths]]),
    ):
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert flat_videos(paths) == flat_videos([paths]) == paths
    assert flat_videos([["a"], ["b", "c"]]) == ["a", "b", "c"]


def test_settings_choose_among_given_frames_by_their_clock(processor):
    video, metadata = frames(60), {"total_num_frames": 60, "fps": 30.0}

    def chosen(given, **settings):
        inputs = processor("<|video_pad|>", videos=given, video_kwargs=settings)
        shown = inputs["pixel_values_videos"].flatten(0, 1)
        return [int((video == frame).all(dim=(1, 2, 3)).nonzero()[0]) for frame in shown]

    assert chosen((video, metadata), num_frames=4) == [7, 22, 37, 52]
    assert chosen((video, metadata), fps=2) == [7, 22, 37, 52]
    assert chosen((video, metadata), mode="fps2") == [8, 22, 38, 52]
    assert chosen(video, num_frames=4) == [7, 22, 37, 52]
    third = {"total_num_frames": 180, "fps": 90.0, "frames_indices": list(range(0, 180, 3))}
    assert chosen((video, third), fps=4) == chosen((video, metadata), fps=4)
    assert SENTENCE.format(2, 4) in prompt(processor, videos=(video, metadata), video_kwargs={"num_frames": 4})
    messages = [{"role": "user", "content": [{"type": "video", "video": (video, metadata), "fps": 2}]}]
    assert len(processor.apply_chat_template(messages, tokenize=True)["pixel_values_videos"]) == 1


@pytest.mark.parametrize(
    ("video", "metadata", "settings", "words"),
    [
        (
            frames(4),
            None,
            {"fps": 2},
            "fps choose frames by their times, but these have no clock; give video_metadata",
        ),
        (frames(4), None, {"scaler": "fast", "start": 1}, "scaler, start have no effect on frames that are given"),
        (frames(4), {"total_num_frames": 8, "fps": 2}, {}, "of a video of 8 frames, of which 4 are given; say which"),
        (frames(4), {"total_num_frames": 8, "frames_indices": [1]}, {}, "names 1 frames, but 4 are given"),
        (frames(4), {"total_num_frames": 4, "fps": -1.0}, {}, r"fps -1\.0; it must be a positive number"),
        (frames(4), [None, None], {}, "2 video_metadata were given for 1 videos"),
        ((frames(4), {"total_num_frames": 4}), {"total_num_frames": 4}, {}, "frames that come with their own"),
        ("a.mp4", {"total_num_frames": 4}, {}, r"video_metadata has no effect on 'a\.mp4', which brings its own"),
        ([[["/no/a.png"]]], None, {}, r"/no/a\.png: no such image file"),
        ([np.zeros((8, 8, 3))], None, {}, r"pixels are float64 \(8, 8, 3\); give uint8"),
    ],
)
def test_frames_and_metadata_that_do_not_go_together_are_refused(processor, video, metadata, settings, words):
    with pytest.raises(ValueError, match=words):
        processor("<|video_pad|>", videos=video, video_metadata=metadata, video_kwargs=settings)


def test_unknown_settings_and_keys_are_refused_whatever_a_video_is(processor):
    for video in (frames(4), "a.mp4"):
        with pytest.raises(TypeError, match="unknown video setting 'frames'"):
            processor("<|video_pad|>", videos=video, video_kwargs={"frames": 4})
    with pytest.raises(TypeError, match="start_second"):
        processor("<|video_pad|>", videos=frames(4), video_metadata={"total_num_frames": 4, "start_second": 1})


def test_a_video_that_is_read_already_takes_no_settings(processor, tmp_path):
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    video = read_video(tmp_path, num_frames=4)
    assert isinstance(video, Video)
    with pytest.raises(ValueError, match="num_frames have no effect on frames that are sampled already"):
        processor("<|video_pad|>", videos=video, video_kwargs={"num_frames": 2})
    assert SENTENCE.format(4, 4) in prompt(processor, videos=video)


def test_frames_are_cropped_where_the_processor_says_so(processor):
    wide = torch.randint(0, 256, (4, 3, 48, 80), dtype=torch.uint8)
    processor.video = {"fit": "crop"}
    cropped = processor("<|video_pad|>", videos=wide)["pixel_values_videos"][0]
    assert torch.equal(cropped, wide[..., 16:64])
    stretched = processor("<|video_pad|>", videos=wide, video_kwargs={"fit": "stretch"})["pixel_values_videos"][0]
    assert not torch.equal(stretched, cropped)


def test_an_encoded_image_may_be_in_any_form_that_pillow_reads():
    file = io.BytesIO()
    picture().save(file, format="webp", lossless=True)
    assert np.array_equal(np.asarray(open_image(file.getvalue())), np.asarray(picture()))
