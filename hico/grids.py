"""Grids of tiles for images of any shape: which grid, and in which order its tokens go to the LLM."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


def anyres_grids(max_side: int = 6) -> list[tuple[int, int]]:
    """List the ``(columns, rows)`` grids of VideoChat-Flash: every shape, columns outermost.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, ``anyres_nopad``.
    """
    return [(columns, rows) for columns in range(1, max_side + 1) for rows in range(1, max_side + 1)]


def unires_grids(max_tiles: int = 49) -> list[tuple[int, int]]:
    """List the ``(columns, rows)`` grids of LongVA: 2 to ``max_tiles`` tiles, columns outermost.

    Source: Zhang et al., "LongVA", arXiv:2406.16852, UniRes.
    """
    return [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows > 1
    ]


def choose_grid(width: int, height: int, *, tile: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose the grid of tiles that shows most of an image and wastes least.

    The image is imagined scaled to fit inside the grid. Of the grids that keep the most of its pixels, never counting
    more than it has, the one with the smallest unused area wins; of those, the first in the list.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        tile: side of a tile in pixels.
        grids: candidates, as ``(columns, rows)``.

    Returns:
        ``(columns, rows)``.

    Raises:
        ValueError: if the image has no pixels or there is no candidate.
    """
    if min(width, height) < 1 or not grids:
        raise ValueError(f"cannot choose one of {len(grids)} grids for an image of {width} x {height} pixels")

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        grid_width, grid_height = grid[0] * tile, grid[1] * tile
        scale = min(grid_width / width, grid_height / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - grid_width * grid_height

    return max(grids, key=merit)


def mosaic_order(tokens_NKD: Tensor, *, rows: int, columns: int) -> Tensor:
    """Lay the tokens of an image's tiles out as one large map, row by row across tiles.

    Args:
        tokens_NKD: ``(rows * columns, K, D)``, tiles row-major; each tile's K tokens are taken as a square map.

    Returns:
        ``(rows * columns * K, D)``.

    Raises:
        ValueError: if K is no square or the number of tiles is not ``rows * columns``.

    Merged tokens have no spatial order, so for them the map is a convention that the released weights were trained
    with. Source: VideoChat-Flash, ``spatial_nopad``.
    """
    num_tiles, num_tokens, _ = tokens_NKD.shape
    side = round(num_tokens**0.5)
    if side * side != num_tokens or num_tiles != rows * columns:
        raise ValueError(
            f"{num_tiles} tiles of {num_tokens} tokens do not make a mosaic of {rows} x {columns} tiles; "
            "the tiles must match the grid and their tokens a square"
        )
    return rearrange(tokens_NKD, "(r c) (h w) d -> (r h c w) d", r=rows, c=columns, h=side)


@dataclass(frozen=True)
class ImageLayout:
    """Which tokens of a tiled image go to the LLM, and in which order.

    Args:
        has_thumbnail: the tokens of the whole image come first.
        joins_tiles: tokens run along the rows of neighbouring tiles, see `mosaic_order`; otherwise tile after tile.
        compresses: the compressor reduces the tokens of every tile, as it does those of a video's frames.
        stretches: the image is stretched to fill the grid; otherwise it keeps its shape and is centred on black.
    """

    has_thumbnail: bool = True
    joins_tiles: bool = False
    compresses: bool = True
    stretches: bool = False

    def num_tiles(self, grid: tuple[int, int]) -> int:
        """Return how many tiles' tokens an image has; one without a grid, ``(0, 0)``, is one tile."""
        return max(1, grid[0] * grid[1] + (self.has_thumbnail and grid != (0, 0)))

    def arrange(self, tokens_MKE: Tensor, grid: tuple[int, int]) -> Tensor:
        """Put the tokens of an image in order.

        Args:
            tokens_MKE: those of its thumbnail, then of its tiles, row-major.
            grid: rows and columns of its tiles; ``(0, 0)`` is the thumbnail alone.

        Returns:
            ``(num_tiles(grid) * K, E)``.
        """
        thumbnail, tiles_MKE = tokens_MKE[0], tokens_MKE[1:]
        if not len(tiles_MKE):
            return thumbnail
        rows, columns = grid
        tiles = mosaic_order(tiles_MKE, rows=rows, columns=columns) if self.joins_tiles else tiles_MKE.flatten(0, 1)
        return torch.cat([thumbnail, tiles]) if self.has_thumbnail else tiles


IMAGE_LAYOUTS = {
    "mosaic": ImageLayout(joins_tiles=True, stretches=True),
    "tiles": ImageLayout(has_thumbnail=False),
    "flat": ImageLayout(compresses=False),
    "anyres": ImageLayout(joins_tiles=True, compresses=False),
}
"""Layouts by name: VideoChat-Flash's; LongVA's UniRes, and its other one; and AnyRes, which UniRes is held against."""
