"""Pixels for the encoder: resizing, padding and cutting of frames and images, without torchvision."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hico.grids import choose_grid

Picture = Image.Image | np.ndarray | Tensor
FITS = ("stretch", "crop")
"""How a frame becomes a square: the aspect ratio is lost, or the ends of the longer side are."""


def to_pil(picture: Picture) -> Image.Image:
    """Return an image as RGB, upright.

    Args:
        picture: a PIL image of any mode, turned as its EXIF data say, or uint8 pixels ``(H, W, 3)`` or ``(3, H, W)``.

    Raises:
        ValueError: if the pixels have another type or shape.
    """
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # convert() would cut all but the darkest shades off
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return picture.convert("RGB")
    pixels = np.asarray(picture)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[-1] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}; give uint8 (H, W, 3), (3, H, W) or a PIL image")
    return Image.fromarray(pixels)


def fitted_size(sides: tuple[int, int], size: tuple[int, int], *, fit: str) -> tuple[int, int]:
    """Say to what ``(height, width)`` a picture is resized before its middle is cut out.

    Args:
        sides: ``(height, width)`` of the picture.
        size: of the result; a square for ``"crop"``.
        fit: one of `FITS`.

    Source: CLIP's image processor in transformers: the shorter edge becomes the side, the longer one is rounded down.
    """
    if fit == "stretch":
        return size
    short = min(sides)
    return size[0] * sides[0] // short, size[0] * sides[1] // short


def centre_crop(pixels_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut out the middle ``(height, width)``; what cannot be halved is cut at the bottom and right."""
    top, left = ((side - wanted) // 2 for side, wanted in zip(pixels_HWC.shape, size, strict=False))
    return pixels_HWC[top : top + size[0], left : left + size[1]]


def resize_square(picture: Picture, size: int, *, fit: str = "stretch") -> Tensor:
    """Resize to a square with PIL's antialiased bicubic filter on bytes.

    Args:
        picture: of any shape.
        size: pixels per side.
        fit: one of `FITS`.

    Returns:
        ``(3, size, size)`` uint8.

    Source: preprocessing of VideoChat-Flash (arXiv:2501.00574): no crop, aspect ratio lost, rounded to integers.
        LongVA (arXiv:2406.16852) crops video frames as CLIP does.
    """
    image = to_pil(picture)
    height, width = fitted_size((image.height, image.width), (size, size), fit=fit)
    resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    return _to_tensor(centre_crop(resized, (size, size)))


def resize_frames(frames: Sequence[Picture] | Tensor, size: int, *, fit: str = "stretch") -> Tensor:
    """Resize frames to squares; frames that have the size already are passed on as they are.

    Returns:
        ``(F, 3, size, size)`` uint8.
    """
    if isinstance(frames, Tensor) and frames.dtype == torch.uint8 and frames.shape[1:] == (3, size, size):
        return frames
    return torch.stack([resize_square(frame, size, fit=fit) for frame in frames])


def normalize_pixels(pixels: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale bytes to [0, 1], subtract the mean of each channel and divide by its deviation.

    Args:
        pixels: ``(..., 3, H, W)`` uint8.

    Returns:
        float32, same shape and device.
    """
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (mean, std))
    return (pixels.float() / 255 - mean) / std


def cut_tiles(
    picture: Picture, tile: int, *, grids: Sequence[tuple[int, int]], fit: str
) -> tuple[Tensor, tuple[int, int]]:
    """Cut an image into the grid of tiles that suits it best, behind its thumbnail.

    Args:
        picture: of any size.
        tile: pixels per side.
        grids: candidates as ``(columns, rows)``; none means the thumbnail alone.
        fit: ``"stretch"`` fills the grid (VideoChat-Flash); ``"pad"`` keeps the aspect ratio and centres the image on
            black (LongVA).

    Returns:
        ``(1 + rows * columns, 3, tile, tile)`` uint8, and ``(rows, columns)``; without a grid one tile and ``(0, 0)``.

    Raises:
        ValueError: if ``fit`` is unknown.
    """
    image = to_pil(picture)
    thumbnail = resize_square(image, tile)[None]
    if not grids:
        return thumbnail, (0, 0)
    columns, rows = choose_grid(*image.size, tile=tile, grids=grids)
    canvas_size = columns * tile, rows * tile
    if fit == "stretch":
        canvas = image.resize(canvas_size, Image.Resampling.BICUBIC)
    elif fit == "pad":
        canvas = _pad_to(image, canvas_size)
    else:
        raise ValueError(f"unknown image fit {fit!r}; use 'stretch' or 'pad'")
    tiles = _to_tensor(canvas).unfold(1, tile, tile).unfold(2, tile, tile)
    return torch.cat([thumbnail, tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)]), (rows, columns)


def _pad_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to the side that fits exactly, round the other up, and centre on black."""
    (width, height), (canvas_width, canvas_height) = image.size, size
    if canvas_width / width < canvas_height / height:
        scaled = canvas_width, min(-(-height * canvas_width // width), canvas_height)
    else:
        scaled = min(-(-width * canvas_height // height), canvas_width), canvas_height
    canvas = Image.new("RGB", size)
    offset = (canvas_width - scaled[0]) // 2, (canvas_height - scaled[1]) // 2
    canvas.paste(image.resize(scaled, Image.Resampling.BICUBIC), offset)
    return canvas


def _to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
