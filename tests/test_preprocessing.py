from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import golden_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hico.grids import anyres_grids, choose_grid, unires_grids
from hico.preprocessing import cut_tiles, normalize_pixels, resize_frames, resize_square, to_pil


def numbered(case, prefix, suffix=""):
    """Yield (number, tensor) of a case's tensors called prefix0suffix, prefix1suffix, ..."""
    for name, tensor in case.tensors.items():
        number = name.removeprefix(prefix).removesuffix(suffix)
        if name.startswith(prefix) and name.endswith(suffix) and number.isdigit():
            yield number, tensor


def random_picture(width, height, *, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", [c for c in golden_cases("A") if "resample" in c.entry.get("config", {})], ids=lambda case: case.name
)
def test_frames_are_resized_and_normalised_as_published(case):
    height, width = case.config["size"]
    assert height == width
    frames = list(numbered(case, "frames", "_u8"))
    assert frames
    for number, frames_FHWC in frames:
        resized = resize_frames(list(frames_FHWC), width)
        pixels = normalize_pixels(resized, mean=case.config["image_mean"], std=case.config["image_std"])
        case.assert_close(pixels, f"pixel_values{number}")
        alone = resize_square(Image.fromarray(frames_FHWC[0].numpy()), width)[None]
        pixels = normalize_pixels(alone, mean=case.config["image_mean"], std=case.config["image_std"])
        case.assert_close(pixels, f"pil0_{number}")


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", [c for c in golden_cases("F") if "images" in c.entry.get("config", {})], ids=lambda case: case.name
)
def test_tiles_are_padded_and_cut_as_published(case):
    tile = case.config["base"]
    for number, image_HWC in numbered(case, "image", "_u8"):
        facts = case.config["images"][int(number)]
        tiles, (rows, columns) = cut_tiles(image_HWC, tile, grids=unires_grids(), fit="pad")
        assert [columns * tile, rows * tile] == facts["best_wh"]
        pixels = normalize_pixels(tiles, mean=case.config["image_mean"], std=case.config["image_std"])
        case.assert_close(pixels, f"grids{number}")
        case.assert_close(canvas_of(tiles, rows, columns).permute(1, 2, 0), f"canvas{number}_u8")


def canvas_of(tiles, rows, columns):
    """Put the tiles behind the thumbnail together again."""
    tiles = tiles[1:].unflatten(0, (rows, columns))
    return torch.cat([torch.cat(list(row), dim=-1) for row in tiles], dim=-2)


@given(width=st.integers(1, 90), height=st.integers(1, 90), fit=st.sampled_from(["pad", "stretch"]))
@settings(deadline=None, max_examples=40)
def test_tiles_behind_the_thumbnail_make_the_chosen_canvas(width, height, fit):
    grids = anyres_grids(3)
    tiles, (rows, columns) = cut_tiles(random_picture(width, height), 8, grids=grids, fit=fit)
    assert (columns, rows) == choose_grid(width, height, tile=8, grids=grids)
    assert tiles.shape == (1 + rows * columns, 3, 8, 8)
    assert tiles.dtype == torch.uint8
    torch.testing.assert_close(tiles[0], resize_square(random_picture(width, height), 8))


@given(columns=st.integers(1, 4), rows=st.integers(1, 4))
@settings(deadline=None, max_examples=16)
def test_an_image_of_exactly_the_grid_is_cut_without_a_change(columns, rows):
    image = random_picture(columns * 8, rows * 8)
    for fit in ("pad", "stretch"):
        tiles, grid = cut_tiles(image, 8, grids=[(columns, rows)], fit=fit)
        assert grid == (rows, columns)
        np.testing.assert_array_equal(canvas_of(tiles, rows, columns).permute(1, 2, 0), np.asarray(image))


@given(width=st.integers(1, 60), height=st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_padding_keeps_the_aspect_ratio_and_is_centred(width, height):
    white = Image.new("RGB", (width, height), "white")
    tiles, (rows, columns) = cut_tiles(white, 16, grids=[(3, 2)], fit="pad")
    canvas = canvas_of(tiles, rows, columns)[0]
    inside = canvas == 255
    assert ((canvas == 0) | inside).all()
    size_x, size_y = int(inside.any(dim=0).sum()), int(inside.any(dim=1).sum())
    scale = min(Fraction(48, width), Fraction(32, height))
    assert abs(size_x - scale * width) <= 1
    assert abs(size_y - scale * height) <= 1
    left = int(inside.any(dim=0).nonzero()[0])
    top = int(inside.any(dim=1).nonzero()[0])
    assert (left, top) == ((48 - size_x) // 2, (32 - size_y) // 2)


def test_without_a_grid_an_image_is_one_tile():
    image = random_picture(30, 20)
    tiles, grid = cut_tiles(image, 8, grids=[], fit="pad")
    assert grid == (0, 0)
    torch.testing.assert_close(tiles, resize_square(image, 8)[None])


def test_an_unknown_fit_is_named():
    with pytest.raises(ValueError, match="unknown image fit 'crop'; use 'stretch' or 'pad'"):
        cut_tiles(random_picture(8, 8), 8, grids=[(1, 1)], fit="crop")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_of_image_becomes_rgb(mode):
    assert to_pil(random_picture(6, 4).convert(mode)).mode == "RGB"


def test_sixteen_bits_keep_their_shades():
    shades = np.linspace(0, 65535, 24, dtype=np.uint16).reshape(4, 6)
    pixels = np.asarray(to_pil(Image.fromarray(shades)))
    np.testing.assert_array_equal(pixels, np.repeat((shades >> 8).astype(np.uint8)[..., None], 3, axis=-1))


def test_an_image_is_turned_upright(tmp_path):
    image = random_picture(6, 4)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to see it as it was
    image.save(tmp_path / "phone.png", exif=exif)
    upright = to_pil(Image.open(tmp_path / "phone.png"))
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


def test_channels_may_come_first_or_last():
    image = random_picture(6, 4)
    last = torch.from_numpy(np.array(image))
    for pixels in (last, last.permute(2, 0, 1), last.numpy()):
        np.testing.assert_array_equal(np.asarray(to_pil(pixels)), np.asarray(image))


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
def test_other_pixels_are_refused_with_their_shape(pixels):
    with pytest.raises(ValueError, match=r"give uint8 \(H, W, 3\)"):
        to_pil(pixels)


def test_frames_of_the_right_size_are_passed_on():
    frames = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    assert resize_frames(frames, 8) is frames


def test_normalised_pixels_have_the_given_mean_and_deviation():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    out = normalize_pixels(pixels, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    expected = torch.tensor([[[-0.1, 0.9]], [[-0.1, 0.4]], [[-0.075, 0.175]]])[None]
    torch.testing.assert_close(out, expected)
