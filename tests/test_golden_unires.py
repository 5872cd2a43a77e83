"""LongVA's preprocessing, projector, pooling and token order, through processor and model, with given features."""

import numpy as np
import pytest
import torch
from helpers import golden_cases

from hico import HicoConfig, HicoModel, HicoProcessor
from hico.encoders.base import VisionEncoder
from hico.grids import IMAGE_LAYOUTS
from hico.preprocessing import normalize_pixels
from hico.prompt import IMAGE_TOKEN, VIDEO_TOKEN
from hico.published import LONGVA, to_hico
from hico.registry import ENCODERS
from hico.tokenizer import byte_tokenizer

CASES = [case for case in golden_cases("F") if "merge_type" in case.entry.get("config", {})]
(TILES,) = [case for case in golden_cases("F") if "images" in case.entry.get("config", {})]
CLIP = {"name": "clip", "image_size": 28, "patch_size": 7, "hidden_size": 8, "depth": 2, "num_heads": 1}
UNIRES = {
    "encoder": CLIP,
    "compressor": {"name": "pooling", "stride": 2},
    "projector_first": True,
    "clip_len": 1,
    "image_layout": "tiles",
}


class GivenFeatures(VisionEncoder):
    """Stands for a vision tower: yields rows of given features, one per frame in the order in which they come."""

    num_heads = 1

    def __init__(self, *, hidden_size: int, side: int, image_size: int):
        super().__init__()
        self.hidden_size, self.side, self.image_size = hidden_size, side, image_size

    def give(self, features_MLD: torch.Tensor) -> None:
        self.features = iter(features_MLD)

    def grid(self, num_frames, height, width):
        return num_frames, self.side, self.side

    def forward(self, clips_NTCHW):
        assert clips_NTCHW.shape[1:] == (1, 3, self.image_size, self.image_size)
        return torch.stack([next(self.features) for _ in clips_NTCHW])


@pytest.fixture(autouse=True, scope="module")
def _registered():
    ENCODERS.register("given_features", GivenFeatures)


def make_config(case) -> HicoConfig:
    settings = case.config
    mode, stride = settings["pool"].split()[0], int(settings["pool"].split("stride ")[1].split()[0])
    text = {"model_type": "qwen2", "vocab_size": 261, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"hidden_size": settings["hidden"], "num_attention_heads": 1, "num_key_value_heads": 1}
    tower = {"hidden_size": settings["C"], "side": settings["side"], "image_size": settings["base"]}
    return HicoConfig(
        text_config=text,
        encoder={"name": "given_features", **tower},
        compressor={"name": "pooling", "stride": stride, "mode": mode},
        projector_first=True,
        clip_len=1,
        image_layout={"unires": "tiles", "flat": "flat"}[settings["merge_type"]],
        video_token_id=260,
        image_token_id=259,
    )


def make_model(case) -> HicoModel:
    model = HicoModel(make_config(case)).eval()
    prefix = "model."
    weights = {to_hico(prefix + name, LONGVA).removeprefix(prefix): tensor for name, tensor in case.weights.items()}
    assert weights.keys() == {name for name, _ in model.named_parameters() if name.startswith("projector.")}
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_images_and_videos_become_the_published_tokens_in_the_prompt(case):
    model = make_model(case)
    processor = HicoProcessor.from_config(model.config, byte_tokenizer())
    base = case.config["base"]
    for number, item in enumerate(case.config["items"]):
        features = case[f"item{number}.features"]
        model.encoder.give(features)
        frames = torch.zeros(len(features), 1, 3, base, base, dtype=torch.uint8)
        case.assert_close(model.encode(frames, compress=False), f"item{number}.projected")
        if item["kind"] == "video":
            inputs = processor(f"before {VIDEO_TOKEN} after", videos=[frames[:, 0]])
        else:
            width, height = item["size_wh"]
            inputs = processor(f"before {IMAGE_TOKEN} after", images=[np.zeros((height, width, 3), np.uint8)])
            columns, rows = item["grids_xy"]
            assert inputs["image_grids"].tolist() == [[rows, columns]]
        model.encoder.give(features)
        text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        embeds, visual_mask = model.embed(text["input_ids"], **inputs)
        assert next(model.encoder.features, None) is None, "every tile was encoded once"
        places = visual_mask[0].nonzero()[:, 0]
        assert places.tolist() == list(range(7, 7 + len(places))), "behind 'before '"
        case.assert_close(embeds[0, places], f"item{number}.tokens")


@pytest.mark.golden
def test_the_processor_cuts_images_as_published():
    config = HicoConfig.preset("tiny", **UNIRES)
    processor = HicoProcessor.from_config(config, byte_tokenizer())
    for number, facts in enumerate(TILES.config["images"]):
        inputs = processor(IMAGE_TOKEN, images=[TILES[f"image{number}_u8"].numpy()])
        columns, rows = (side // 28 for side in facts["best_wh"])
        assert inputs["image_grids"].tolist() == [[rows, columns]]
        normalised = normalize_pixels(
            inputs["pixel_values"], mean=TILES.config["image_mean"], std=TILES.config["image_std"]
        )
        TILES.assert_close(normalised, f"grids{number}")


@torch.no_grad()
def test_under_unires_an_image_is_the_video_of_its_tiles():
    config = HicoConfig.preset("tiny", **UNIRES)
    model = HicoModel(config).eval()
    processor = HicoProcessor.from_config(config, byte_tokenizer())
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    inputs = processor(IMAGE_TOKEN, images=[image])
    tiles = inputs["pixel_values"]
    (tokens,) = model.get_image_features(tiles, inputs["image_grids"])
    (frames,) = model.get_video_features(tiles[1:, None])
    torch.testing.assert_close(tokens, frames)
    assert len(tokens) == config.vision.num_video_tokens(len(tiles) - 1)


@torch.no_grad()
def test_under_anyres_an_image_is_its_base_and_one_map_of_all_tiles_without_pooling():
    config = HicoConfig.preset("tiny", **{**UNIRES, "image_layout": "anyres"})
    model = HicoModel(config).eval()
    processor = HicoProcessor.from_config(config, byte_tokenizer())
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    inputs = processor(IMAGE_TOKEN, images=[image])
    ((rows, columns),) = inputs["image_grids"].tolist()
    assert (rows, columns) == (2, 3), "padded to the same grid as under UniRes"
    (tokens,) = model.get_image_features(inputs["pixel_values"], inputs["image_grids"])
    alone = model.encode(inputs["pixel_values"][:, None], compress=False)
    torch.testing.assert_close(tokens[:16], alone[0])
    for down in range(rows * 4):
        for across in range(columns * 4):
            tile, place = 1 + down // 4 * columns + across // 4, down % 4 * 4 + across % 4
            torch.testing.assert_close(tokens[16 + down * columns * 4 + across], alone[tile, place])
    (frames,) = model.get_video_features(inputs["pixel_values"][:, None])
    assert len(frames) == 7 * 4, "frames are pooled all the same, unlike the image's tiles"


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("grid", [(0, 0), (1, 1), (2, 3)])
@torch.no_grad()
def test_the_processor_counts_the_tokens_that_the_model_makes(layout, grid):
    compressor = {"name": "pooling", "stride": 2} if layout != "mosaic" else {"name": "token_merge"}
    config = HicoConfig.preset("tiny", compressor=compressor, image_layout=layout)
    if layout == "mosaic":
        config.compressor |= {"tokens_per_frame": 4, "tokens_per_image": 4}
    model = HicoModel(config).eval()
    side = config.vision.image_size
    tiles = torch.randint(256, (1 + grid[0] * grid[1], 3, side, side), dtype=torch.uint8)
    (tokens,) = model.get_image_features(tiles, torch.tensor([grid]))
    assert len(tokens) == config.vision.num_image_tokens(grid)


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="unknown image_layout 'spiral'; use one of mosaic, tiles, flat, anyres"):
        HicoConfig.preset("tiny", image_layout="spiral")
