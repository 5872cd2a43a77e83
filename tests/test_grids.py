"""Grids of tiles against the published choices, and the order of a mosaic."""

import pytest
import torch
from helpers import golden_cases
from hypothesis import given
from hypothesis import strategies as st

from hico.grids import anyres_grids, choose_grid, mosaic_order, unires_grids


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", [case for case in golden_cases("F") if "rows" in case.facts], ids=lambda case: case.name
)
def test_grids_match_the_published_choice(case):
    columns = case.facts["columns"]
    grids = unires_grids() if "base" not in columns else anyres_grids()
    for row in case.facts["rows"]:
        values = dict(zip(columns, row, strict=True))
        tile = values.get("base", case.facts.get("base", 336))
        grid = choose_grid(values["width"], values["height"], tile=tile, grids=grids)
        assert grid == (values["grids_x"], values["grids_y"]), values


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 6), st.sampled_from([14, 224, 336]))
def test_the_chosen_grid_is_a_candidate_and_turns_with_the_image(width, height, max_side, tile):
    grids = anyres_grids(max_side)
    columns, rows = choose_grid(width, height, tile=tile, grids=grids)
    assert (columns, rows) in grids
    if width == height:
        assert max(columns, rows) <= max_side


def test_a_mosaic_runs_along_the_rows_of_neighbouring_tiles():
    # two tiles side by side, each a 2 x 2 map; the first holds 0..3 and the second 10..13
    tiles = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])[..., None]
    assert mosaic_order(tiles, rows=1, columns=2).flatten().tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert mosaic_order(tiles, rows=2, columns=1).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_a_mosaic_of_the_wrong_size_names_the_numbers():
    with pytest.raises(ValueError, match="3 tiles of 4 tokens do not make a mosaic of 1 x 2 tiles"):
        mosaic_order(torch.zeros(3, 4, 8), rows=1, columns=2)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        choose_grid(0, 5, tile=224, grids=anyres_grids())
