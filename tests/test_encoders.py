"""Vision encoders: the contract that every registered name keeps, and the frame encoders against transformers."""

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedConfig, PreTrainedModel, SiglipVisionModel

from hico.encoders.clip import CLIPEncoder
from hico.encoders.siglip import SiglipEncoder
from hico.registry import ENCODERS

TINY = {
    "umt": {"image_size": 32, "hidden_size": 32, "depth": 3, "num_heads": 2, "patch_size": 8},
    "internvideo2": {
        "image_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 8,
        "pretrained_side": 4,
    },
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
    "timm": {
        "model": "vit_tiny_patch16_224",
        "image_size": 32,
        "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
}
"""Small settings of every encoder: hidden_size 32, 2 blocks that run, clips of 1 and 3 frames must be possible."""

every_encoder = pytest.mark.parametrize("name", ENCODERS.names())


def build(name: str, **settings):
    if name not in TINY:
        pytest.fail(f"encoder {name!r} has no small settings; add a line to TINY in {__file__}")
    if name == "timm":
        pytest.importorskip("timm", reason="timm needs a torchvision that fits torch", exc_type=Exception)
    torch.manual_seed(0)
    encoder = ENCODERS.build({"name": name, **TINY[name], **settings})
    with torch.no_grad():
        for parameter in encoder.parameters():  # scales and biases that start as constants hide what they do
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


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
    encoder = build(name).eval().double()
    clips = clips_for(encoder, num_clips=3).double()
    alone = torch.cat([encoder(clip) for clip in clips.split(1)])
    torch.testing.assert_close(encoder(clips), alone)


@every_encoder
def test_every_parameter_is_used(name):
    """Clips alone, or images alone, give each a gradient, as distributed training needs; together, one that counts."""
    encoder = build(name)
    for num_frames in (1, 3):
        gradients = torch.autograd.grad(
            encoder(clips_for(encoder, num_frames=num_frames)).square().mean(), list(encoder.parameters())
        )
        for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    assert [n for n, p in encoder.named_parameters() if not p.grad.any()] == []


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


# timm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm needs a torchvision that fits torch", exc_type=Exception)


@pytest.mark.parametrize(
    ("model", "settings", "grid"),
    [
        ("resnet18", {"image_size": 64}, (2, 2)),
        ("convnext_atto", {"image_size": 64}, (2, 2)),
        ("swin_tiny_patch4_window7_224", {"model_args": {"embed_dim": 24, "depths": [1, 1, 1, 1]}}, (7, 7)),
        ("vit_small_patch16_dinov3", {"image_size": 32, "model_args": {"depth": 1}}, (2, 2)),
        ("vit_base_patch16_siglip_224", {"image_size": 32, "model_args": {"depth": 1}}, (2, 2)),
        ("deit3_small_patch16_224", {"image_size": 32, "model_args": {"depth": 1}}, (2, 2)),
    ],
)
def test_backbones_of_timm_give_the_features_that_timm_gives(timm, model, settings, grid):
    encoder = ENCODERS.build({"name": "timm", "model": model, **settings}).eval()
    clips = clips_for(encoder, num_clips=1, num_frames=2)
    assert encoder.grid(2, encoder.image_size, encoder.image_size) == (2, *grid)
    with torch.no_grad():
        tokens, features = encoder(clips), encoder.vision_model.forward_features(clips[0])
    if features.ndim == 4:
        expected = features if features.shape[1:3] == grid else features.permute(0, 2, 3, 1)
        expected = expected.flatten(1, 2)
    else:
        expected = features[:, encoder.vision_model.num_prefix_tokens :]
    torch.testing.assert_close(tokens[0], expected.flatten(0, 1))
    assert encoder.image_mean == tuple(encoder.vision_model.pretrained_cfg["mean"])


def test_a_config_names_a_model_of_timm_in_one_word(timm):
    from hico import HicoConfig

    config = HicoConfig.preset("tiny", encoder="timm:resnet18", compressor={"name": "pooling", "tokens_per_frame": 4})
    assert config.encoder == {"name": "timm", "model": "resnet18"}
    assert config.vision.num_video_tokens(8) == 32


def test_a_model_that_timm_does_not_have_brings_up_the_nearest(timm):
    with pytest.raises(ValueError, match=r"no model 'vit_base_patch16_225'; nearest are .*vit_base_patch16_224"):
        ENCODERS.build("timm:vit_base_patch16_225")


@pytest.mark.parametrize("name", ["pretrained", "checkpoint_path"])
def test_a_config_chooses_no_files_for_timm_to_read(timm, name):
    with pytest.raises(ValueError, match=f"{name}.*may not set"):
        ENCODERS.build({"name": "timm", "model": "resnet18", "model_args": {name: "weights.pth"}})


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'hico\[timm\]'"):
        ENCODERS.build("timm:resnet18")
