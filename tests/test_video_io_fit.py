"""Video in: frames cropped as CLIP crops them, and parts that end before the video does."""

import av.video.stream
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from videos import indices_of, write_images, write_video

from hico.preprocessing import resize_frames
from hico.video_io import VideoError, probe, read_video, stream_video

needs_rotation = pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV 17 reads rotation, 18 writes it"
)


def clip_pixels(frames_FCHW, side):
    """Return the pixels of CLIP's own image processor, before it normalises."""
    process = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_rescale=False, do_normalize=False
    )
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames_FCHW]
    return torch.from_numpy(np.stack([np.asarray(pixels) for pixels in process(images)["pixel_values"]]))


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(48, 80), (97, 41), (50, 50), (33, 200)], ids=str)
def test_crop_gives_the_pixels_of_clips_own_processor(size):
    frames = noise(2, 3, *size)
    assert torch.equal(resize_frames(frames, 36, fit="crop"), clip_pixels(frames, 36))


@pytest.mark.parametrize("size", [(64, 96), (96, 66)], ids=str)
def test_videos_are_cropped_while_they_are_read(tmp_path, size):
    path = write_video(tmp_path / "a.mp4", 8, size=size)
    settings = {"mode": "middle", "num_frames": 8, "scaler": "exact"}
    full = read_video(path, **settings).frames
    expected = clip_pixels(full, 36)
    assert torch.equal(read_video(path, size=36, fit="crop", **settings).frames, expected)
    with stream_video(path, size=36, fit="crop", chunk_frames=4, **settings) as stream:
        assert torch.equal(torch.cat(list(stream)), expected)
    fast = read_video(path, size=36, fit="crop", **settings | {"scaler": "fast"}).frames
    assert (fast.int() - expected.int()).abs().max() <= 2
    assert not torch.equal(read_video(path, size=36, **settings).frames, expected)


@needs_rotation
@pytest.mark.parametrize("scaler", ["exact", "fast"])
def test_a_turned_video_is_cropped_upright(tmp_path, scaler):
    path = write_video(tmp_path / "a.mp4", 4, size=(64, 98), rotation=90)
    full = read_video(path, num_frames=4).frames
    assert full.shape[2:] == (98, 64)
    cropped = read_video(path, num_frames=4, size=36, fit="crop", scaler=scaler).frames
    assert (cropped.int() - clip_pixels(full, 36).int()).abs().max() <= 2 * (scaler == "fast")


def test_every_picture_of_a_folder_keeps_its_own_ratio(tmp_path):
    pictures = [noise(3, 40, 60), noise(3, 60, 40)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    frames = read_video(tmp_path, num_frames=2, clip_len=1, size=36, fit="crop", scaler="exact").frames
    assert torch.equal(frames, torch.cat([clip_pixels(picture[None], 36) for picture in pictures]))


def test_fits_that_cannot_be_are_refused(tmp_path):
    path = write_images(tmp_path / "images", 4)
    with pytest.raises(ValueError, match="unknown fit 'pad'; use one of stretch, crop"):
        read_video(path, num_frames=4, fit="pad")
    for size in (None, (30, 40)):
        with pytest.raises(ValueError, match=r"fit='crop' makes squares, and size is"):
            read_video(path, num_frames=4, size=size, fit="crop")


def test_a_part_ends_a_margin_before_the_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", 48, fps=24)
    assert probe(path).duration == 2.0
    settings = {"mode": "fps24", "clip_len": 1, "end_margin": 0.1}
    whole = read_video(path, **settings)
    assert (whole.num_frames, whole.duration) == (48, 2.0)
    part = read_video(path, start=1.0, end=2.0, **settings)
    assert part.duration == pytest.approx(0.9)
    assert indices_of(part.frames) == list(range(24, 46))
    assert read_video(path, start=1.0, **settings).duration == pytest.approx(0.9)
    assert read_video(path, end=1.5, **settings).duration == 1.5
    with pytest.raises(VideoError, match=r"no frame appears between start 1\.95 s"):
        read_video(path, start=1.95, end=2.0, **settings)


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_a_margin_is_a_time(tmp_path, margin):
    path = write_images(tmp_path / "images", 4)
    with pytest.raises(ValueError, match=r"end_margin is .*; it is a time in seconds, from 0"):
        read_video(path, num_frames=4, start=1, end_margin=margin)


def test_the_number_of_frames_is_a_multiple(tmp_path):
    path = write_images(tmp_path / "images", 23)
    assert read_video(path, mode="dynamic_fps1", min_frames=4).num_frames == 20
    assert read_video(path, mode="dynamic_fps1", min_frames=4, multiple_of=8).num_frames == 16
    with pytest.raises(ValueError, match="multiple_of = 8 has no effect in the sampling mode 'middle'"):
        read_video(path, num_frames=8, multiple_of=8)
