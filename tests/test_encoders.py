"""Vision encoders: the contract that every registered name keeps, the published numbers, and each one's own laws."""

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
from transformers import CLIPVisionModel, PreTrainedConfig, PreTrainedModel, SiglipVisionModel

from hico.encoders import vit
from hico.encoders.clip import CLIPEncoder
from hico.encoders.siglip import SiglipEncoder
from hico.encoders.umt import UMTEncoder
from hico.encoders.vit import position_table
from hico.registry import ENCODERS

TINY = {
    "umt": {"image_size": 32, "hidden_size": 32, "depth": 3, "num_heads": 2, "patch_size": 8},
    "clip": {
        "image_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 8,
    },
    "siglip": {
        "image_size": 35,
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 8,
    },
}
"""Small settings of every encoder: hidden_size 32, 2 blocks that run, clips of 1 and 3 frames must be possible."""

every_encoder = pytest.mark.parametrize("name", ENCODERS.names())


def build(name: str, **settings):
    if name not in TINY:
        pytest.fail(f"encoder {name!r} has no small settings; add a line to TINY in {__file__}")
    torch.manual_seed(0)
    return ENCODERS.build({"name": name, **TINY[name], **settings})


def clips_for(encoder, *, num_clips: int = 2, num_frames: int = 3) -> Tensor:
    return torch.randn(num_clips, num_frames, 3, encoder.image_size, encoder.image_size)


def count_calls(encoder: nn.Module) -> list:
    """Return a list that grows by one whenever a linear layer of the encoder runs."""
    calls = []
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@every_encoder
@pytest.mark.parametrize("num_frames", [1, 3])
def test_tokens_have_the_announced_shape(name, num_frames):
    encoder = build(name)
    clips = clips_for(encoder, num_frames=num_frames)
    tokens = encoder(clips)
    grid = encoder.grid(num_frames, *clips.shape[-2:])
    assert grid[0] == num_frames
    assert tokens.shape == (2, math.prod(grid), encoder.hidden_size)
    assert tokens.dtype == torch.float32
    assert encoder.hidden_size % encoder.num_heads == 0
    assert len(encoder.image_mean) == len(encoder.image_std) == 3


@every_encoder
def test_tokens_are_time_major_then_rows(name):
    """A token changes most when its own patch does."""
    encoder = build(name).eval()
    clips = clips_for(encoder, num_clips=1)
    steps, rows, columns = encoder.grid(3, encoder.image_size, encoder.image_size)
    patch = encoder.image_size // rows
    for step, row, column in [(0, 0, 1), (1, 2, 0), (steps - 1, rows - 1, columns - 2)]:
        changed = clips.clone()
        changed[0, step, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 3
        difference = (encoder(changed) - encoder(clips))[0].norm(dim=-1)
        assert difference.argmax() == (step * rows + row) * columns + column


@every_encoder
def test_a_batch_equals_its_clips_one_by_one(name):
    encoder = build(name).eval()
    clips = clips_for(encoder, num_clips=3)
    alone = torch.cat([encoder(clip) for clip in clips.split(1)])
    torch.testing.assert_close(encoder(clips), alone, rtol=1e-5, atol=1e-5)


@every_encoder
def test_every_parameter_is_used(name):
    encoder = build(name)
    encoder(clips_for(encoder)).square().mean().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_encoder
def test_saving_and_loading_gives_the_same_tokens(name):
    encoder = build(name).eval()
    clips = clips_for(encoder)
    expected = encoder(clips)
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.eval()(clips), expected)
    assert torch.equal(copy.deepcopy(encoder)(clips), expected)


@every_encoder
def test_the_meta_device_knows_the_numbers(name):
    encoder = build(name)
    with torch.device("meta"):
        shape_only = build(name)
    sizes = (3, encoder.image_size, encoder.image_size)
    assert all(parameter.is_meta for parameter in shape_only.parameters())
    for fact in ("hidden_size", "num_heads", "image_size", "image_mean", "image_std"):
        assert getattr(shape_only, fact) == getattr(encoder, fact)
    assert shape_only.grid(*sizes) == encoder.grid(*sizes)
    assert shape_only(torch.empty(2, 3, 3, *sizes[1:], device="meta")).shape == encoder(clips_for(encoder)).shape


@every_encoder
def test_bfloat16_stays_close(name):
    encoder = build(name).eval()
    clips = clips_for(encoder)
    expected = encoder(clips)
    tokens = encoder.bfloat16()(clips)
    assert tokens.dtype == torch.bfloat16
    assert (tokens - expected).norm() / expected.norm() < 0.02


@every_encoder
def test_gradient_checkpointing_recomputes_and_changes_nothing(name):
    encoder = build(name).train()
    clips = clips_for(encoder)
    calls, results = count_calls(encoder), []
    assert encoder.gradient_checkpointing is False
    for value in (False, True):
        encoder.gradient_checkpointing = value
        assert encoder.gradient_checkpointing is value
        encoder.zero_grad()
        calls.clear()
        tokens = encoder(clips)
        tokens.square().mean().backward()
        results.append((tokens.detach(), [p.grad.clone() for p in encoder.parameters()], len(calls)))
    (tokens, gradients, once), (tokens_again, gradients_again, twice) = results
    torch.testing.assert_close(tokens_again, tokens)
    torch.testing.assert_close(gradients_again, gradients)
    assert twice > 1.5 * once  # torch stops a recomputation as soon as it has what it needs

    encoder.eval()
    calls.clear()
    encoder(clips).square().mean().backward()
    assert len(calls) == once


@every_encoder
def test_a_transformers_model_around_it_switches_checkpointing(name):
    class Outer(PreTrainedModel):
        config_class = PreTrainedConfig
        supports_gradient_checkpointing = True
        main_input_name = "clips_NTCHW"

        def __init__(self, config):
            super().__init__(config)
            self.encoder = build(name)

        def forward(self, clips_NTCHW):
            return self.encoder(clips_NTCHW)

    outer = Outer(PreTrainedConfig()).train()
    calls = count_calls(outer)
    outer(clips_for(outer.encoder)).sum().backward()
    once = len(calls)
    switch = "activation" if hasattr(outer, "activation_checkpointing_enable") else "gradient"
    getattr(outer, f"{switch}_checkpointing_enable")()
    assert outer.encoder.gradient_checkpointing
    outer(clips_for(outer.encoder)).sum().backward()
    assert len(calls) > 2.5 * once
    getattr(outer, f"{switch}_checkpointing_disable")()
    assert not outer.encoder.gradient_checkpointing


@every_encoder
def test_wrong_clips_are_named(name):
    encoder = build(name)
    size = encoder.image_size
    with pytest.raises(ValueError, match=r"\(3, 3, \d+, \d+\) are not \(clips, frames, 3, height, width\)"):
        encoder(torch.zeros(3, 3, size, size))
    with pytest.raises(ValueError, match=f"{size} x {size + 1} pixels"):
        encoder(torch.zeros(1, 1, 3, size, size + 1))
    with pytest.raises(ValueError, match="clips of 0 frames"):
        encoder.grid(0, size, size)


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match=r"encoder 'umt' cannot be built.*widht"):
        ENCODERS.build({"name": "umt", "widht": 3})


# UMT ---------------------------------------------------------------------------------------------------------------

UMT_CASES = [case for case in golden_cases("A") if "return_index" in case.config]
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
    encoder = build("umt")
    names = set(encoder.state_dict())
    with torch.inference_mode():
        encoder(clips_for(encoder))
    assert len(computed) == 1
    encoder(clips_for(encoder, num_clips=5)).sum().backward()
    copy.deepcopy(encoder)(clips_for(encoder))
    encoder.to("cpu").float()(clips_for(encoder))
    assert len(computed) == 1
    encoder(clips_for(encoder, num_frames=1))
    encoder.bfloat16()(clips_for(encoder))
    assert len(computed) == 3
    assert set(encoder.state_dict()) == names


def test_umt_remembers_a_bounded_number_of_tables(monkeypatch):
    computed = counted_tables(monkeypatch)
    encoder = build("umt")
    limit = position_table.cache_info().maxsize
    for num_frames in range(1, limit + 3):
        encoder(clips_for(encoder, num_clips=1, num_frames=num_frames))
    assert len(computed) == limit + 2
    assert position_table.cache_info().currsize == limit


def test_position_tables_in_bfloat16_are_rounded_last():
    sizes = ((3, 5, 7), 16)
    full = position_table(*sizes, pretrained_grid=(4, 14, 14))
    half = position_table(*sizes, pretrained_grid=(4, 14, 14), dtype=torch.bfloat16)
    assert torch.equal(half, full.bfloat16())


def test_umt_positions_of_a_resized_clip_do_not_depend_on_the_image_size_setting():
    small, large = build("umt", image_size=64, patch_size=16), build("umt", image_size=224, patch_size=16)
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


def test_an_image_takes_the_first_step_of_the_pretrained_positions():
    video = position_table((4, 6, 6), 8, pretrained_grid=(4, 14, 14))
    encoder, seen = build("umt", hidden_size=8, num_heads=1), []
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(torch.zeros(1, 1, 3, 48, 48))
    torch.testing.assert_close(seen[0], video[:, :36])


def test_patches_as_a_matrix_product_equal_the_convolution():
    conv = vit.PatchConv(5, kernel_size=(2, 4, 3))
    clips = torch.randn(2, 4, 3, 8, 9)
    expected = nn.Conv3d.forward(conv, clips.transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(conv(clips), expected)


@pytest.mark.parametrize("index", [-1, -2, -3])
def test_umt_builds_only_the_blocks_that_run(index):
    encoder = build("umt", return_index=index)
    assert len(encoder.blocks) == 3 + index + 1
    assert encoder(clips_for(encoder)).isfinite().all()


def test_written_out_attention_equals_sdpa():
    encoder, eager = build("umt").eval(), build("umt", attn_implementation="eager").eval()
    clips = clips_for(encoder)
    torch.testing.assert_close(eager(clips), encoder(clips))


def test_umt_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match=r"'sdp'.*sdpa, eager, flash_attention_2"):
        build("umt", attn_implementation="sdp")
    with pytest.raises(ValueError, match="33 does not split into 2 heads"):
        build("umt", hidden_size=33)
    with pytest.raises(ValueError, match="return_index -4 is none of 3 blocks"):
        build("umt", return_index=-4)
    with pytest.raises(ValueError, match="225 x 225 pixels do not split into patches of 16; resize to 224 x 224"):
        UMTEncoder(image_size=225)
    with pytest.raises(ValueError, match="clips of 3 frames do not split into tubelets of 2"):
        build("umt", tubelet_size=2).grid(3, 32, 32)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_without_its_package_says_what_to_install():
    with pytest.raises(ImportError, match="needs the package flash-attn"):
        build("umt", attn_implementation="flash_attention_2")


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
    sdpa, flash = (build("umt", attn_implementation=name).eval() for name in ("sdpa", "flash_attention_2"))
    clips = clips_for(sdpa)
    torch.testing.assert_close(flash(clips), sdpa(clips))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="needs a CUDA device and flash-attn",
)
def test_flash_attention_equals_sdpa():
    sdpa, flash = (
        build("umt", attn_implementation=name).eval().cuda().bfloat16() for name in ("sdpa", "flash_attention_2")
    )
    clips = clips_for(sdpa).cuda()
    torch.testing.assert_close(flash(clips), sdpa(clips))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_encoder
def test_cuda_agrees_with_the_cpu(name):
    encoder = build(name).eval()
    clips = clips_for(encoder)
    expected = encoder(clips)
    torch.testing.assert_close(encoder.cuda()(clips.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


# CLIP and SigLIP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder_class", "model_class", "num_class_tokens"),
    [(CLIPEncoder, CLIPVisionModel, 1), (SiglipEncoder, SiglipVisionModel, 0)],
)
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_frame_encoders_return_a_hidden_state_of_the_transformers_model(
    encoder_class, model_class, num_class_tokens, feature_layer
):
    settings = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2}
    encoder = encoder_class(**settings, depth=3, feature_layer=feature_layer).eval()
    config = copy.deepcopy(encoder.vision_model.config)
    config.num_hidden_layers = 3
    full = model_class(config).eval()
    full.load_state_dict(encoder.vision_model.state_dict(), strict=False)
    clips = torch.randn(2, 3, 3, 28, 28)
    with torch.no_grad():
        hidden = full(clips.flatten(0, 1), output_hidden_states=True).hidden_states[feature_layer]
        expected = hidden[:, num_class_tokens:].unflatten(0, (2, 3)).flatten(1, 2)
        assert torch.equal(encoder(clips), expected)
