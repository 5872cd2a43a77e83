"""The UMT encoder: the published numbers, its position tables and its attention."""

import copy
import importlib.machinery
import importlib.util
import math
import sys
import types

import pytest
import torch
from helpers import golden_cases
from torch import Tensor, nn

from hico.encoders import vit
from hico.encoders.umt import UMTEncoder
from hico.encoders.vit import position_table


def tiny(**settings) -> UMTEncoder:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "hidden_size": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
    return UMTEncoder(**{**sizes, **settings})


def random_clips(*, num_clips: int = 2, num_frames: int = 3) -> Tensor:
    return torch.randn(num_clips, num_frames, 3, 32, 32)


UMT_CASES = [case for case in golden_cases("A") if "weights.encoder.blocks.0.attn.q_bias" in case.entry["tensors"]]
TABLES = [
    (case, table)
    for case in golden_cases("A")
    for table, facts in case.config.items()
    if isinstance(facts, dict) and "n_position" in facts
]


def umt_from(case) -> UMTEncoder:
    config = case.config
    encoder = UMTEncoder(
        image_size=config["img_size"],
        hidden_size=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        patch_size=config["patch_size"],
        tubelet_size=config["tubelet_size"],
        mlp_ratio=config["mlp_ratio"],
        return_index=config["return_index"],
        final_norm="encoder.vision_layernorm.weight" in case.weights,
        pretrained_frames=config["ckpt_num_frame"],
    )
    encoder.load_state_dict({name.removeprefix("encoder."): w for name, w in case.weights.items()})
    return encoder.eval()


def umt_input(case, kind: str) -> Tensor:
    """Decode the case's "video" or "image" to clips (N, T, 3, H, W)."""
    tensors = case.tensors
    if kind in tensors:
        pixels = tensors[kind]
    elif f"{kind}_u8" in tensors:
        pixels = tensors[f"{kind}_u8"].float() / 127.5 - 1
    else:
        patch = tensors["video_pattern"].shape[-1]
        coarse = tensors[f"{kind}_coarse_u8"]
        pixels = coarse.repeat_interleave(patch, -1).repeat_interleave(patch, -2).float() / 127.5 - 1
        pixels = pixels + tensors["video_pattern"][:, None].repeat(1, 1, *coarse.shape[-2:])
    return pixels.transpose(1, 2)


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("case", UMT_CASES, ids=lambda case: case.name)
def test_umt_matches_the_published_encoder(case, kind):
    with torch.no_grad():
        case.assert_close(umt_from(case)(umt_input(case, kind)), f"{kind}_features")


@pytest.mark.golden
@pytest.mark.parametrize("case", [c for c in UMT_CASES if "video_embed" in c.tensors], ids=lambda case: case.name)
def test_umt_matches_the_published_encoder_block_by_block(case):
    encoder, seen = umt_from(case), []
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        encoder(umt_input(case, "video")[:1])
    assert len(encoder.blocks) == case.config["blocks_run"]
    case.assert_close(seen[0], "video_embed")
    for index in range(len(encoder.blocks)):
        case.assert_close(seen[index + 1], f"video_block{index}")
    assert {block.norm1.eps for block in encoder.blocks} == {case.config["block_norm_eps"]}
    if isinstance(encoder.vision_layernorm, nn.LayerNorm):
        assert encoder.vision_layernorm.eps == case.config["final_norm_eps"]


@pytest.mark.golden
@pytest.mark.parametrize("case", [c for c in UMT_CASES if "pos_embed" in c.tensors], ids=lambda case: case.name)
def test_umt_positions_match_the_published_encoder(case):
    """With no pixels and no bias, what enters the first block is the position table."""
    encoder, seen = umt_from(case), []
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for kind in ("video", "image"):
        encoder(torch.zeros_like(umt_input(case, kind)[:1]))
    case.assert_close(seen[0], "pos_embed")
    case.assert_close(seen[1], "img_pos_embed")


@pytest.mark.golden
@pytest.mark.parametrize(("case", "table"), TABLES, ids=[table for _, table in TABLES])
def test_position_tables_match_the_published_ones(case, table):
    facts = case.config[table]
    frames, pretrained_frames = facts.get("cur_frame", 1), facts.get("ckpt_num_frame", 1)
    side = math.isqrt(facts["n_position"] // frames)
    pretrained_side = math.isqrt(facts.get("pre_n_position", 784) // pretrained_frames)
    actual = position_table(
        (frames, side, side),
        facts["d_hid"],
        pretrained_grid=(pretrained_frames, *[side if facts["branch"] == "img224" else pretrained_side] * 2),
    )[0]
    assert list(actual.shape) == facts["result_shape"]
    rows, columns = case[f"{table}.rows"], case[f"{table}.cols"]
    case.assert_close(actual[rows][:, columns], f"{table}.values")
    exact = actual.double()
    measured = {"mean": exact.mean(), "std": exact.std(correction=0), "l2": exact.norm(), "min": exact.min()}
    for name, value in {**measured, "max": exact.max(), "numel": exact.numel()}.items():
        assert float(value) == pytest.approx(facts["stats"][name], rel=1e-6), name


def counted_tables(monkeypatch) -> list:
    computed = []
    table = vit.sinusoid_table
    monkeypatch.setattr(vit, "sinusoid_table", lambda *sizes: computed.append(sizes) or table(*sizes))
    position_table.cache_clear()
    return computed


def test_umt_computes_a_position_table_once_per_shape(monkeypatch):
    computed = counted_tables(monkeypatch)
    encoder = tiny()
    names = set(encoder.state_dict())
    with torch.inference_mode():
        encoder(random_clips())
    assert len(computed) == 1
    encoder(random_clips(num_clips=5)).sum().backward()
    copy.deepcopy(encoder)(random_clips())
    encoder.to("cpu").float()(random_clips())
    assert len(computed) == 1
    encoder(random_clips(num_frames=1))
    encoder.bfloat16()(random_clips())
    assert len(computed) == 3
    assert set(encoder.state_dict()) == names


def test_umt_remembers_a_bounded_number_of_tables(monkeypatch):
    computed = counted_tables(monkeypatch)
    encoder = tiny()
    limit = position_table.cache_info().maxsize
    for num_frames in range(1, limit + 3):
        encoder(random_clips(num_clips=1, num_frames=num_frames))
    assert len(computed) == limit + 2
    assert position_table.cache_info().currsize == limit


def test_position_tables_in_bfloat16_are_rounded_last():
    sizes = ((3, 5, 7), 16)
    full = position_table(*sizes, pretrained_grid=(4, 14, 14))
    half = position_table(*sizes, pretrained_grid=(4, 14, 14), dtype=torch.bfloat16)
    assert torch.equal(half, full.bfloat16())


def test_umt_positions_of_a_resized_clip_do_not_depend_on_the_image_size_setting():
    small, large = tiny(image_size=64, patch_size=16), tiny(image_size=224, patch_size=16)
    clips = torch.randn(1, 2, 3, 48, 80)
    assert small.grid(2, 48, 80) == (2, 3, 5)
    assert torch.equal(small(clips), large(clips))


def test_umt_resizes_positions_even_if_a_clip_has_as_many_tokens_as_the_pretrained_grid():
    four_steps = position_table((4, 7, 7), 8, pretrained_grid=(4, 14, 14)).unflatten(1, (4, 49))
    sixteen_steps = nn.functional.interpolate(four_steps.transpose(1, 3), size=(49, 16), mode="bilinear").transpose(
        1, 3
    )
    table = position_table((16, 7, 7), 8, pretrained_grid=(4, 14, 14))
    torch.testing.assert_close(table, sixteen_steps.flatten(1, 2))


def positions_seen(encoder: UMTEncoder, *, num_frames: int, side: int) -> Tensor:
    """Return the position table that an encoder adds: what enters the first block without pixels and bias."""
    seen = []
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    hook = encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder(torch.zeros(1, num_frames, 3, side, side))
    hook.remove()
    return seen[0][0]


def share_of_fine_places_nearest_their_own(encoder: UMTEncoder, *, num_frames: int) -> float:
    """Say how many of 8 x 8 patches have the position of the one of 4 x 4 that covers them nearest."""
    coarse, fine = (positions_seen(encoder, num_frames=num_frames, side=side) for side in (32, 64))
    own = torch.arange(len(coarse)).view(num_frames, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten()
    return float((torch.cdist(fine, coarse).argmin(dim=-1) == own).float().mean())


@pytest.mark.parametrize("num_frames", [1, 4])
def test_larger_frames_find_positions_between_those_that_were_trained(num_frames):
    """A table of 14 x 14, sampled at 4 x 4 without antialiasing, says little about the table of 8 x 8."""
    straight, by_way = (tiny(hidden_size=64, trained_side=side) for side in (None, 4))
    assert share_of_fine_places_nearest_their_own(straight, num_frames=num_frames) < 0.6
    assert share_of_fine_places_nearest_their_own(by_way, num_frames=num_frames) == 1


def test_positions_at_the_trained_side_are_those_of_the_pretrained_table():
    straight, by_way = (
        positions_seen(tiny(trained_side=side), num_frames=3, side=32).contiguous() for side in (None, 4)
    )
    assert torch.equal(straight, by_way)


def test_an_image_takes_the_first_step_of_the_pretrained_positions():
    video = position_table((4, 6, 6), 8, pretrained_grid=(4, 14, 14))
    encoder, seen = tiny(hidden_size=8, num_heads=1), []
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(torch.zeros(1, 1, 3, 48, 48))
    torch.testing.assert_close(seen[0], video[:, :36])


def test_patches_as_a_matrix_product_equal_the_convolution():
    conv = vit.PatchConv(5, kernel_size=(2, 4, 3)).double()
    clips = torch.randn(2, 4, 3, 8, 9).double()
    expected = nn.Conv3d.forward(conv, clips.transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(conv(clips), expected)


@pytest.mark.parametrize("index", [-1, -2, -3])
def test_umt_builds_only_the_blocks_that_run(index):
    encoder = tiny(return_index=index)
    assert len(encoder.blocks) == 3 + index + 1
    assert encoder(random_clips()).isfinite().all()


@torch.no_grad()
def test_without_the_final_norm_the_output_is_that_of_the_last_block():
    encoder, whole = tiny(final_norm=False), tiny()
    assert whole.state_dict().keys() - encoder.state_dict().keys() == {
        "vision_layernorm.weight",
        "vision_layernorm.bias",
    }
    encoder.load_state_dict({name: w for name, w in whole.state_dict().items() if "vision_layernorm" not in name})
    clips = random_clips()
    assert torch.equal(whole.vision_layernorm(encoder(clips)), whole(clips))


def test_written_out_attention_equals_sdpa():
    encoder, eager = (tiny(attn_implementation=name).eval().double() for name in ("sdpa", "eager"))
    clips = random_clips().double()
    torch.testing.assert_close(eager(clips), encoder(clips))


def test_umt_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match=r"'sdp'.*sdpa, eager, flash_attention_2"):
        tiny(attn_implementation="sdp")
    with pytest.raises(ValueError, match="33 does not split into 2 heads"):
        tiny(hidden_size=33)
    with pytest.raises(ValueError, match="return_index -4 is none of 3 blocks"):
        tiny(return_index=-4)
    with pytest.raises(ValueError, match="225 x 225 pixels do not split into patches of 16; resize to 224 x 224"):
        UMTEncoder(image_size=225)
    with pytest.raises(ValueError, match="clips of 3 frames do not split into tubelets of 2"):
        tiny(tubelet_size=2).grid(3, 32, 32)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_without_its_package_says_what_to_install():
    with pytest.raises(ImportError, match="needs the package flash-attn"):
        tiny(attn_implementation="flash_attention_2")


def test_flash_attention_gets_its_axes_in_its_own_order(monkeypatch):
    """A stand-in with flash-attn's layout, (clips, tokens, heads, channels), gives what sdpa gives."""

    def flash_attn_func(query, key, value):
        assert query.shape[1:] == (48, 2, 16)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", loader=None)
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    sdpa, flash = (tiny(attn_implementation=name).eval() for name in ("sdpa", "flash_attention_2"))
    clips = random_clips()
    torch.testing.assert_close(flash(clips), sdpa(clips))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="needs a CUDA device and flash-attn",
)
def test_flash_attention_equals_sdpa():
    sdpa, flash = (tiny(attn_implementation=name).eval().cuda().bfloat16() for name in ("sdpa", "flash_attention_2"))
    clips = random_clips().cuda()
    torch.testing.assert_close(flash(clips), sdpa(clips))
