"""Attention that tokens receive in an encoder, against maps written out by transformers and by hand."""

import pytest
import torch
from test_encoders import build, clips_for, every_encoder

from hico.encoders.base import VisionEncoder
from hico.ops import dropping
from hico.registry import ENCODERS


@every_encoder
@torch.no_grad()
def test_attention_and_keys_come_with_the_same_tokens(name):
    encoder = build(name).eval()
    assert encoder.gives_attention
    clips = clips_for(encoder)
    tokens, attention, keys = encoder.attend(clips)
    torch.testing.assert_close(tokens, encoder(clips))
    assert attention.shape == tokens.shape[:2] == keys.shape[:2]
    assert (attention >= 0).all()
    assert attention.std() > 0
    alone = torch.cat([encoder.attend(clip)[1] for clip in clips.split(1)])
    torch.testing.assert_close(attention, alone)
    assert not torch.equal(encoder.attend(clips, layer=-2)[1], attention)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_attention_of_frame_encoders_is_that_of_transformers(name, layer):
    encoder = build(name, attn_implementation="eager").eval()
    clips = clips_for(encoder)
    maps = encoder.vision_model(clips.flatten(0, 1), output_attentions=True).attentions[layer]
    num_class = 1 if name == "clip" else 0
    rows = maps[:, :, :1] if num_class else maps
    expected = rows.mean((1, 2))[:, num_class:].reshape(len(clips), -1)
    torch.testing.assert_close(encoder.attend(clips, layer=layer)[1], expected)


@pytest.mark.parametrize("name", ["umt", "internvideo2"])
@torch.no_grad()
def test_attention_of_clip_encoders_is_that_of_the_map_written_out(name, monkeypatch):
    encoder = build(name, attn_implementation="eager").eval()
    clips, maps, keys = clips_for(encoder), [], []
    attention = encoder.blocks[-1].attn

    def eager(query, key, value):
        maps.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1))
        keys.append(key.mean(1))
        return maps[-1] @ value

    attention.attend = eager
    encoder(clips)
    num_class = 1 if name == "internvideo2" else 0
    expected = (maps[0][:, :, :1] if num_class else maps[0]).mean((1, 2))[:, num_class:]
    for size in (dropping.MAX_SCORE_ELEMENTS, 1000):
        monkeypatch.setattr(dropping, "MAX_SCORE_ELEMENTS", size)
        _, found, found_keys = encoder.attend(clips)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_keys, keys[0][:, num_class:])


@every_encoder
def test_gradients_reach_the_encoder_with_and_without_checkpointing(name):
    encoder = build(name).train()
    grads = []
    for checkpointing in (False, True):
        encoder.gradient_checkpointing = checkpointing
        tokens, attention, _ = encoder.attend(clips_for(encoder, num_clips=1).fill_(0.3))
        assert not attention.requires_grad
        encoder.zero_grad()
        tokens.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"class_token": False}], ids=str)
@torch.no_grad()
def test_attention_of_timm_is_that_of_the_map_written_out(settings):
    args = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **settings}
    encoder = build("timm", model_args=args).eval()
    attention, maps = encoder.vision_model.blocks[-1].attn, []
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda _, args, output: maps.append(args[0]))
    clips = clips_for(encoder)
    _, found, _ = encoder.attend(clips)
    num_class = encoder.vision_model.num_prefix_tokens
    expected = (maps[0][:, :, :1] if num_class else maps[0]).mean((1, 2))[:, num_class:]
    torch.testing.assert_close(found, expected.reshape(found.shape))


def test_architectures_of_timm_without_plain_attention_say_so():
    pytest.importorskip("timm", reason="timm needs a torchvision that fits torch", exc_type=Exception)
    encoder = ENCODERS.build({"name": "timm", "model": "resnet18", "image_size": 64})
    assert not encoder.gives_attention


def test_a_layer_that_does_not_run_and_an_encoder_without_attention_are_named():
    encoder = build("umt")
    with pytest.raises(ValueError, match="layer -3 is none of 2 that run; use -2 to -1"):
        encoder.attend(clips_for(encoder), layer=-3)

    class Plain(VisionEncoder):
        def grid(self, num_frames, height, width):
            return num_frames, height, width

        def forward(self, clips_NTCHW):
            return clips_NTCHW

    assert not Plain().gives_attention
    with pytest.raises(ValueError, match="Plain gives no attention"):
        Plain().attend(torch.zeros(1, 1, 3, 2, 2))
