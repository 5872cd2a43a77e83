"""The InternVideo2 encoder: its formulas, its position tables, its precision."""

import pytest
import torch
from helpers import golden_cases
from internvideo2_reference import encode
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from hico import HicoConfig, HicoModel
from hico.encoders.internvideo2 import InternVideo2Encoder, LayerScale, RMSNorm, sincos_table

SIZES = {"image_size": 32, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "patch_size": 8}
TINY = {**SIZES, "depth": 4, "pretrained_side": 4}


def tiny(**settings) -> InternVideo2Encoder:
    """Return an encoder no parameter of which has a value that it starts with."""
    torch.manual_seed(0)
    encoder = InternVideo2Encoder(**{**TINY, **settings})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.3)
    return encoder.eval()


def clips_of(num_frames: int, *, side: int = 32) -> Tensor:
    return torch.randn(2, num_frames, 3, side, side)


def positions_of(encoder: InternVideo2Encoder, num_frames: int, *, side: int = 32) -> Tensor:
    """Return what is added to the tokens: without pixels, bias and class token, it is what enters the first block."""
    seen = []
    for parameter in (encoder.patch_embed.proj.bias, encoder.cls_token):
        nn.init.zeros_(parameter)
    handle = encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(torch.zeros(1, num_frames, 3, side, side, dtype=encoder.cls_token.dtype))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("num_frames", [4, 1])
@torch.no_grad()
def test_tokens_are_those_of_the_formulas(num_frames):
    encoder, clips = tiny().double(), clips_of(num_frames).double()
    torch.testing.assert_close(encoder(clips), encode(encoder.state_dict(), clips, num_heads=3))


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", [case for case in golden_cases("R") if "qk_norm" in case.config], ids=lambda case: case.name
)
@torch.no_grad()
def test_tokens_are_those_of_the_released_code(case):
    config = case.config
    sizes = {name: config[name] for name in ("image_size", "hidden_size", "depth", "num_heads", "patch_size")}
    width = round(config["hidden_size"] * config["mlp_ratio"])
    encoder = InternVideo2Encoder(**sizes, intermediate_size=width, pretrained_side=config["pretrained_side"])
    encoder.load_state_dict(case.weights)
    assert len(encoder.blocks) == config["blocks_run"]
    for pixels, expected in (("clips", "expected_video"), ("images", "expected_image")):
        case.assert_close(encoder(case[pixels]), expected)


@pytest.mark.parametrize("return_index", [-1, -2, -4])
@torch.no_grad()
def test_the_output_is_that_of_a_block_and_no_norm_follows(return_index):
    encoder, seen = tiny(return_index=return_index), []
    encoder.blocks[-1].register_forward_hook(lambda _, inputs, output: seen.append(output))
    tokens = encoder(clips_of(4))
    assert len(encoder.blocks) == 4 + return_index + 1
    assert torch.equal(tokens, seen[0][:, 1:])


def test_the_default_is_the_tower_of_a_billion_parameters():
    with torch.device("meta"):
        encoder = InternVideo2Encoder()
    shapes = {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()}
    block = {
        "norm1.weight": (1408,),
        "attn.qkv.weight": (4224, 1408),
        "attn.q_norm.weight": (1408,),
        "attn.k_norm.weight": (1408,),
        "attn.proj.weight": (1408, 1408),
        "attn.proj.bias": (1408,),
        "ls1.weight": (1408,),
        "norm2.weight": (1408,),
        "mlp.fc1.weight": (6144, 1408),
        "mlp.fc1.bias": (6144,),
        "mlp.fc2.weight": (1408, 6144),
        "mlp.fc2.bias": (1408,),
        "ls2.weight": (1408,),
    }
    assert shapes == {
        "cls_token": (1, 1, 1408),
        "pos_embed": (1, 1025, 1408),
        "img_pos_embed": (1, 257, 1408),
        "patch_embed.proj.weight": (1408, 3, 1, 14, 14),
        "patch_embed.proj.bias": (1408,),
        **{f"blocks.{index}.{name}": shape for index in range(39) for name, shape in block.items()},
    }
    assert len(shapes) == 512
    assert sum(weight.numel() for weight in encoder.parameters()) == 987_337_728
    assert encoder.grid(4, 224, 224) == (4, 16, 16)
    assert encoder.num_heads == 16


def test_the_position_table_starts_with_the_published_values():
    table = sincos_table((4, 16, 16), 1408)
    assert table.shape == (1, 1025, 1408)
    step, row, column = 2, 3, 5
    values = table[0, 1 + step * 256 + row * 16 + column]
    known = {
        0: 0.909297,
        1: 0.946936,
        175: 0.000211,
        176: -0.416147,
        177: -0.321423,
        351: 1.000000,
        352: -0.958924,
        353: -0.993259,
        615: 0.000518,
        616: 0.283662,
        880: 0.141120,
        881: 0.242024,
        1143: 0.000311,
        1144: -0.989992,
        1407: 1.000000,
    }
    assert {channel: round(values[channel].item(), 6) for channel in known} == known
    assert values.double().sum().item() == pytest.approx(701.1243, abs=1e-4)
    assert not table[0, 0].any()
    assert torch.equal(sincos_table((1, 16, 16), 1408), table[:, :257])


def test_a_new_model_starts_with_the_tables_and_with_small_scales():
    config = HicoConfig.preset("tiny", encoder={"name": "internvideo2", **TINY})
    for encoder in (InternVideo2Encoder(**TINY), HicoModel(config).encoder):
        assert torch.equal(encoder.pos_embed, sincos_table((4, 4, 4), 48))
        assert torch.equal(encoder.img_pos_embed, sincos_table((1, 4, 4), 48))
        assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
        for block in encoder.blocks:
            assert block.ls1.weight.unique().tolist() == block.ls2.weight.unique().tolist() == [pytest.approx(1e-5)]
            assert block.attn.q_norm.weight.unique().tolist() == [1]


@torch.no_grad()
def test_clips_and_images_have_tables_of_their_own():
    encoder = tiny()
    assert torch.equal(positions_of(encoder, 4), encoder.pos_embed)
    assert torch.equal(positions_of(encoder, 1), encoder.img_pos_embed)


@pytest.mark.parametrize(("num_frames", "side"), [(8, 32), (3, 32), (2, 48), (4, 64), (1, 64)])
@torch.no_grad()
def test_tables_are_resized_to_other_clips(num_frames, side):
    """In time linearly and then in space bicubically, without the class token."""
    encoder = tiny().double()
    cells = side // 8
    table = encoder.img_pos_embed if num_frames == 1 else encoder.pos_embed
    maps = table[0, 1:].unflatten(0, (-1, 4, 4)).permute(1, 2, 3, 0).flatten(0, 1)
    if num_frames > 1:
        maps = nn.functional.interpolate(maps, size=num_frames, mode="linear")
    maps = maps.unflatten(0, (4, 4)).permute(3, 2, 0, 1)
    maps = nn.functional.interpolate(maps, size=(cells, cells), mode="bicubic")
    expected = torch.cat([table[:, :1], maps.permute(0, 2, 3, 1).flatten(0, 2)[None]], dim=1)
    torch.testing.assert_close(positions_of(encoder, num_frames, side=side), expected)


def test_resized_tables_do_not_depend_on_the_image_size_setting_and_stay_as_they_are():
    small, large = tiny(), tiny(image_size=64)
    assert small.state_dict().keys() == large.state_dict().keys()
    large.load_state_dict(small.state_dict())
    clips = clips_of(6, side=64)
    assert torch.equal(small(clips), large(clips))
    assert small.grid(6, 64, 64) == (6, 8, 8)


@torch.no_grad()
def test_norms_round_before_they_scale():
    norm, theirs = RMSNorm(96, eps=1e-6).bfloat16(), Qwen2RMSNorm(96, eps=1e-6).bfloat16()
    nn.init.normal_(norm.weight)
    theirs.load_state_dict(norm.state_dict())
    tokens = (7 * torch.randn(50, 96)).bfloat16()
    assert torch.equal(norm(tokens), theirs(tokens))
    assert torch.equal(norm.float()(tokens.float()), theirs.float()(tokens.float()))


@torch.no_grad()
def test_scales_are_applied_in_float32():
    scale = LayerScale(96).bfloat16()
    nn.init.normal_(scale.weight)
    tokens = torch.randn(50, 96).bfloat16()
    assert torch.equal(scale(tokens), (tokens.float() * scale.weight.float()).bfloat16())
    assert torch.equal(scale.float()(tokens), (tokens.float() * scale.weight).bfloat16())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_lower_precision_stays_close(attention):
    clips = clips_of(4)
    expected = tiny().double()(clips.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = tiny(attn_implementation=attention)(clips)
    half = tiny(attn_implementation=attention).bfloat16()(clips)
    assert half.dtype == torch.bfloat16
    single = tiny(attn_implementation=attention)(clips)
    # Some ten roundings of each type, of 2**-9 and 2**-24 at most.
    for tokens, tolerance in ((mixed, 0.03), (half, 0.03), (single, 1e-6)):
        assert (tokens - expected).norm() / expected.norm() < tolerance


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match="hidden_size 40 is no multiple of 16, as time, rows and columns share it"):
        tiny(hidden_size=40)
    with pytest.raises(ValueError, match="hidden_size 48 does not split into 5 heads"):
        tiny(num_heads=5)
    with pytest.raises(ValueError, match="return_index -5 is none of 4 blocks"):
        tiny(return_index=-5)
    with pytest.raises(ValueError, match="225 x 225 pixels do not split into patches of 14; resize to 224 x 224"):
        InternVideo2Encoder(image_size=225)
    with pytest.raises(ValueError, match=r"'sdp'.*sdpa, eager, flash_attention_2"):
        tiny(attn_implementation="sdp")
