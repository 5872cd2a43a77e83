"""Video in: the pixels of the published preprocessing, and of the other readers."""

import sys

import av
import av.video.stream
import numpy as np
import pytest
import torch
from helpers import golden_cases
from PIL import Image
from videos import (
    FORMATS,
    FPS,
    GOP,
    cut_by_copy,
    damage_packets,
    write_format,
    write_images,
    write_video,
)

from hico.sampling import sample_frames
from hico.video_io import VideoError, probe, pyav, read_video, stream_video
from hico.video_io.resize import ExactResizer, FastResizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def plain(folder):
    return write_format(folder, "h264.mp4")


needs_rotation = pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV 17 reads rotation, 18 writes it"
)


def all_frames(path, **settings):
    return read_video(path, num_frames=probe(path).num_frames, clip_len=1, **settings)


def _preprocessing_cases():
    return [case for case in golden_cases("A") if "resample" in case.entry.get("config", {})]


@pytest.mark.golden
@pytest.mark.parametrize("case", _preprocessing_cases(), ids=lambda case: case.name)
def test_resized_pixels_are_the_published_ones(case):
    resize = ExactResizer(tuple(case.config["size"]))
    mean, std = (torch.tensor(case.config[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    inputs = sorted(name for name in case.tensors if name.startswith("frames"))
    assert inputs
    for number, name in enumerate(inputs):
        resized = np.stack([resize.from_image(Image.fromarray(frame.numpy())) for frame in case[name]])
        pixels = (torch.from_numpy(resized).permute(0, 3, 1, 2) / 255 - mean) / std
        case.assert_close(pixels, f"pixel_values{number}")


@pytest.mark.parametrize("width", [64, 66, 96, 102], ids="width{}".format)
@pytest.mark.parametrize("size", [32, (24, 40), (64, 96), 100], ids=str)
def test_exact_pixels_are_full_size_frames_through_pil(tmp_path, width, size):
    path = write_video(tmp_path / "a.mp4", 4, size=(64, width))
    height_width = (size, size) if isinstance(size, int) else size
    frames = all_frames(path, size=size, scaler="exact").frames
    assert frames.shape == (4, 3, *height_width)
    for frame, full in zip(frames, all_frames(path).frames, strict=True):
        image = Image.fromarray(full.permute(1, 2, 0).numpy())
        resized = np.asarray(image.resize(height_width[::-1], Image.Resampling.BICUBIC))
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), resized)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("width", [80, 82])
def test_both_colour_paths_give_the_same_pixels(tmp_path, pix_fmt, width):
    path = write_video(tmp_path / "a.mp4", 4, size=(64, width), pix_fmt=pix_fmt)
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(all_frames(path).frames.permute(0, 2, 3, 1).numpy(), np.stack(plain))


@needs_rotation
def test_the_fast_scaler_is_two_grey_levels_off_at_most(tmp_path):
    path = write_video(tmp_path / "a.mp4", 8, size=(128, 192), rotation=90)
    for size in (48, (100, 36), 128):
        exact, fast = (all_frames(path, size=size, scaler=scaler).frames for scaler in ("exact", "fast"))
        assert (exact.int() - fast.int()).abs().max() <= 2
    folder = write_images(tmp_path / "frames", 3)
    exact, fast = (all_frames(folder, size=48, scaler=scaler).frames for scaler in ("exact", "fast"))
    assert (exact.int() - fast.int()).abs().max() <= 2


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
@pytest.mark.parametrize("layers", [False, True])
def test_pictures_of_hevc_that_no_other_needs_are_left_out(tmp_path, monkeypatch, suffix, layers):
    """Where there are temporal layers, a marked picture may be needed after all."""
    options = {"x265-params": f"log-level=none:pools=1:scenecut=0:temporal-layers={3 * layers}"}
    path = write_video(tmp_path / f"a.{suffix}", 48, codec="libx265", b_frames=4, gop=24, options=options)
    referred = []
    spy = pyav.hevc_picture
    monkeypatch.setattr(pyav, "hevc_picture", lambda *given: referred.append(spy(*given)) or referred[-1])
    whole = all_frames(path, num_threads=1).frames
    for num_frames in (3, 7, 20):
        part = read_video(path, num_frames=num_frames, clip_len=1, num_threads=1)
        assert part.num_lost == 0
        assert torch.equal(part.frames, whole[sample_frames(48, 24, num_frames=num_frames, clip_len=1)])
    assert any(not is_referred_to for is_referred_to, _ in referred) is not layers
    # A header that says otherwise than the pictures do is found out.
    monkeypatch.setattr(pyav, "has_one_layer", lambda _: True)
    part = read_video(path, num_frames=7, clip_len=1, num_threads=1)
    assert torch.equal(part.frames, whole[sample_frames(48, 24, num_frames=7, clip_len=1)])


def test_the_fast_scaler_goes_across_first_in_tall_pictures_too():
    """As Pillow did up to 12; later ones take tall pictures down first."""
    picture = np.random.default_rng(0).integers(0, 256, (192, 64, 3), np.uint8)
    image = Image.fromarray(picture)
    across = image.resize((24, 192), Image.Resampling.BICUBIC)
    both = np.asarray(across.resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(FastResizer((24, 24)).from_image(image) - both).max() <= 2


@pytest.mark.parametrize(("reader", "module"), [("decord", "decord"), ("torchcodec", "torchcodec.decoders")])
def test_a_reader_that_is_not_installed_says_what_to_install(plain, monkeypatch, reader, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "hico\[{reader}\]", or use reader="pyav"'):
        read_video(plain, reader=reader)


@pytest.mark.parametrize("reader", ["decord", "torchcodec"])
@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "uneven.mp4", "late.mp4", "h264.mkv", "with_sound.mp4"])
def test_other_readers_give_the_same_pixels(folder, reader, name):
    _need(reader)
    settings = {"num_frames": 20, "size": 32}
    video = read_video(write_format(folder, name), reader=reader, **settings)
    expected = read_video(write_format(folder, name), **settings)
    assert torch.equal(video.frames, expected.frames)
    assert torch.equal(video.seconds, expected.seconds)
    data = write_format(folder, name).read_bytes()
    assert torch.equal(torch.cat(list(stream_video(data, reader=reader, **settings))), expected.frames)


@pytest.mark.parametrize("reader", ["decord", "torchcodec"])
@pytest.mark.parametrize("name", ["cut", "damaged", *FORMATS])
def test_other_readers_are_right_or_refuse(folder, plain, tmp_path, reader, name):
    _need(reader)
    if name == "cut":
        path = cut_by_copy(plain, tmp_path / "cut.mp4", 20 / FPS)
    elif name == "damaged":
        path = damage_packets(write_video(tmp_path / "damaged.mp4", codec="libvpx-vp9", gop=GOP), range(12, 24))
    else:
        path = write_format(folder, name)
    expected = read_video(path, num_frames=20, size=32)
    try:
        video = read_video(path, num_frames=20, size=32, reader=reader)
    except VideoError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert torch.equal(video.frames, expected.frames)
    assert not refusal or (str(path) in refusal and 'use reader="pyav"' in refusal)


def _need(reader: str) -> None:
    pytest.importorskip({"decord": "decord", "torchcodec": "torchcodec.decoders"}[reader], exc_type=Exception)
