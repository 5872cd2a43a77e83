"""LongVA's projector, pooling and token order, through the real model with given vision features."""

import pytest
import torch
from helpers import golden_cases

from hico import HicoConfig, HicoModel
from hico.encoders.base import VisionEncoder
from hico.published import LONGVA, to_hico

CASES = [case for case in golden_cases("F") if "merge_type" in case.entry.get("config", {})]


class GivenFeatures(VisionEncoder):
    """Stands for a vision tower: the first pixel of a frame says which row of the features it yields."""

    def __init__(self, features_MLD: torch.Tensor, side: int):
        super().__init__()
        self.features_MLD, self.side = features_MLD, side
        self.hidden_size, self.num_heads, self.image_size = features_MLD.shape[-1], 1, 1

    def grid(self, num_frames, height, width):
        return num_frames, self.side, self.side

    def forward(self, clips_NTCHW):
        return self.features_MLD[clips_NTCHW[:, :, 0, 0, 0].long()].flatten(1, 2)


def make_model(case) -> HicoModel:
    settings = case.config
    mode, stride = settings["pool"].split()[0], int(settings["pool"].split("stride ")[1].split()[0])
    text = {"model_type": "qwen2", "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"hidden_size": settings["hidden"], "num_attention_heads": 1, "num_key_value_heads": 1}
    config = HicoConfig(
        text_config=text,
        encoder={"name": "clip", "hidden_size": settings["C"], "num_heads": 1, "depth": 2, "intermediate_size": 8},
        compressor={"name": "pooling", "stride": stride, "mode": mode},
        projector_first=True,
        clip_len=1,
        image_layout={"unires": "tiles", "flat": "flat"}[settings["merge_type"]],
    )
    model = HicoModel(config).eval()
    prefix = "model."
    weights = {to_hico(prefix + name, LONGVA).removeprefix(prefix): tensor for name, tensor in case.weights.items()}
    assert weights.keys() == {name for name, _ in model.named_parameters() if name.startswith("projector.")}
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_tokens_are_the_published_ones(case):
    model = make_model(case)
    for number, item in enumerate(case.config["items"]):
        features = case[f"item{number}.features"]
        model.encoder = GivenFeatures(features, case.config["side"])
        frames = torch.arange(len(features), dtype=torch.float32)[:, None, None, None].expand(-1, 3, 1, 1)
        projected = model.encode(frames[:, None], compress=False)
        case.assert_close(projected, f"item{number}.projected")
        if item["kind"] == "video":
            (tokens,) = model.get_video_features(frames[:, None])
        else:
            columns, rows = item["grids_xy"]
            (tokens,) = model.get_image_features(frames, torch.tensor([[rows, columns]]))
        case.assert_close(tokens, f"item{number}.tokens")


@pytest.mark.parametrize("layout", ["mosaic", "tiles", "flat"])
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
    with pytest.raises(ValueError, match="unknown image_layout 'spiral'; use one of mosaic, tiles, flat"):
        HicoConfig.preset("tiny", image_layout="spiral")
