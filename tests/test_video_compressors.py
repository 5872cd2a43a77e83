"""Video compressors: the contract that every registered name keeps, and each one's own laws."""

import copy
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hico import HicoConfig
from hico.registry import VIDEO_COMPRESSORS
from hico.video_compressors.base import CompressedVideo, FrameTokens, VideoCompressor

TINY: dict[str, dict] = {}
"""Settings of those whose defaults do not fit videos as small as these."""
ALL: dict[str, dict] = {
    "dycoke": {"merge_ratio": 0.0},
    "dtd": {"threshold": 1.0},
    "prunevid": {"threshold": 1.0, "cluster_ratio": 1.0},
}
"""Settings that keep everything, of those that have no ``keep_ratio``."""
SHAPES = [(9, 6), (1, 4), (4, 1), (14, 16)]
WIDTH = 8

every_video_compressor = pytest.mark.parametrize("name", VIDEO_COMPRESSORS.names())


def build(name: str, **settings) -> VideoCompressor:
    torch.manual_seed(0)
    return VIDEO_COMPRESSORS.build({"name": name, **TINY.get(name, {}), **settings})


def video_of(num_frames: int = 9, per_frame: int = 6, *, seed: int = 0, width: int = WIDTH) -> FrameTokens:
    """Make a video of scenes: some places stand still, others move a little or much, and no two frames are equal."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(num_frames // 5 + 1, per_frame, width, generator=generator).repeat_interleave(5, 0)
    noise = torch.randn(num_frames, per_frame, width, generator=generator)
    tokens = scenes[:num_frames] + torch.linspace(0, 1.5, per_frame)[:, None] * noise + 0.01 * noise
    attention = torch.rand(num_frames, per_frame, generator=generator)
    return FrameTokens(tokens, attention, torch.randn(num_frames, per_frame, 4, generator=generator))


def wide(video: FrameTokens) -> FrameTokens:
    return FrameTokens(*(part.double() for part in video))


@every_video_compressor
@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_tokens_come_out_as_promised(name, shape):
    compressor = build(name)
    indices, tokens = compressor.select(*video_of(*shape))
    promised, total = compressor.num_kept(*shape), shape[0] * shape[1]
    assert 1 <= len(tokens) <= promised <= total
    assert compressor.by_content or len(tokens) == promised
    assert tokens.shape == (len(indices), WIDTH)
    assert indices.dtype == torch.int64
    assert (indices.diff() > 0).all()
    assert indices[0] >= 0
    assert indices[-1] < total
    with torch.device("meta"):
        assert build(name).num_kept(*shape) == promised


@every_video_compressor
def test_half_precision_chooses_by_its_tokens_and_keeps_its_dtype(name):
    compressor, video = build(name), video_of(14, 16)
    half = FrameTokens(video.tokens_FPD.bfloat16(), *video[1:])
    indices, tokens = compressor.select(*half)
    expected_indices, expected = compressor.select(half.tokens_FPD.float(), *video[1:])
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(tokens.float(), expected, rtol=0.02, atol=0.02)


@every_video_compressor
def test_gradients_reach_the_tokens_that_are_kept_and_every_parameter(name):
    compressor, video = build(name), video_of(14, 16)
    tokens_FPD = video.tokens_FPD.clone().requires_grad_()
    indices, tokens = compressor.select(tokens_FPD, *video[1:])
    tokens.square().sum().backward()
    assert tokens_FPD.grad.isfinite().all()
    assert tokens_FPD.grad.flatten(0, 1)[indices].any(-1).all()
    assert [n for n, p in compressor.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_video_compressor
def test_a_video_is_chosen_from_alike_whatever_came_before(name):
    compressor, video = build(name), video_of(14, 16)
    first = compressor.select(*video)
    compressor.select(*video_of(5, 4, seed=1))
    for again in (compressor.select(*video), copy.deepcopy(compressor).select(*video)):
        assert all(map(torch.equal, first, again))


@every_video_compressor
def test_equal_tokens_are_told_apart_by_their_place_alone(name):
    compressor = build(name)
    frame = video_of(1, 16)
    still = FrameTokens(*(part.expand(8, *part.shape[1:]).contiguous() for part in frame))
    same = FrameTokens(*(part[:, :1].expand(-1, 16, *part.shape[2:]).contiguous() for part in still))
    for video in (still, same):
        indices, tokens = compressor.select(*video)
        assert tokens.isfinite().all()
        wide_indices, _ = compressor.select(*wide(video))
        assert torch.equal(indices, wide_indices)


@every_video_compressor
def test_zero_tokens_give_finite_tokens(name):
    video = video_of(9, 6)
    video.tokens_FPD[::2] = 0
    indices, tokens = build(name).select(*video)
    assert tokens.isfinite().all()
    assert (indices.diff() > 0).all()


@every_video_compressor
def test_saving_and_loading_gives_the_same_tokens(name):
    compressor, other, video = build(name), build(name), video_of(14, 16)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(compressor.state_dict())
    assert all(map(torch.equal, compressor.select(*video), other.select(*video)))


@every_video_compressor
def test_a_config_keeps_the_name_and_plain_options(name):
    spec = {"name": name, **TINY.get(name, {}), **ALL.get(name, {"keep_ratio": 1.0})}
    config = HicoConfig.preset("tiny", video_compressor=spec)
    saved = json.loads(config.to_json_string())
    assert saved["video_compressor"] == spec
    assert HicoConfig.from_dict(saved).vision == config.vision
    assert HicoConfig.preset("tiny", video_compressor=name).video_compressor == {"name": name}


@every_video_compressor
@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_everything_changes_nothing(name, shape):
    compressor, video = build(name, **ALL.get(name, {"keep_ratio": 1.0})), video_of(*shape)
    indices, tokens = compressor.select(*video)
    assert torch.equal(indices, torch.arange(shape[0] * shape[1]))
    assert torch.equal(tokens, video.tokens_FPD.flatten(0, 1))


@every_video_compressor
@pytest.mark.parametrize("size", [1, 3, 14])
def test_a_video_in_chunks_is_chosen_from_like_the_whole(name, size):
    compressor, video = build(name), video_of(14, 16)
    chunks = (video.cut(start, start + size) for start in range(0, 14, size))
    indices, tokens = compressor.select_stream(chunks, num_frames=14)
    expected = compressor.select(*video)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(tokens, expected[1])


@every_video_compressor
def test_a_method_that_streams_holds_a_few_frames_of_it(name):
    compressor = build(name)
    if not compressor.streams:
        return
    alive, most = weakref.WeakSet(), []

    def chunks():
        for seed in range(40):
            chunk = FrameTokens(*(part.clone() for part in video_of(2, 4, seed=seed)))
            alive.add(chunk.tokens_FPD)
            yield chunk
            del chunk
            most.append(len(alive))

    found = list(compressor.select_chunks(chunks()))
    assert max(most) <= 4
    assert found[0][2] < 80  # decides before the end
    assert found[-1][2] == 80
    expected = compressor.select(*map(torch.cat, zip(*chunks(), strict=True)))
    assert torch.equal(torch.cat([indices for indices, *_ in found]), expected[0])


@every_video_compressor
@pytest.mark.slow
def test_compiled_it_chooses_the_same(name):
    compressor, video = build(name), video_of(9, 6)
    torch._dynamo.reset()
    compiled = torch.compile(compressor, backend="eager")
    indices, tokens = compiled(*video)
    expected = compressor(*video)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(tokens, expected[1])


@every_video_compressor
def test_a_method_that_needs_attention_says_so(name):
    compressor, video = build(name), video_of(14, 16)
    if compressor.needs_attention:
        with pytest.raises(ValueError, match="ranks tokens by the encoder's attention, and none was given"):
            compressor.select(video.tokens_FPD)
    else:
        assert torch.equal(compressor.select(video.tokens_FPD)[0], compressor.select(*video)[0])


@every_video_compressor
def test_settings_that_cannot_work_are_named(name):
    with pytest.raises(ValueError, match=rf"video compressor '{name}' cannot be built from .*'keep_ration': 0.5"):
        build(name, keep_ration=0.5)
    if name not in ALL:
        for ratio in (0, -0.5, 1.5):
            with pytest.raises(ValueError, match=rf"keep_ratio is {ratio}; it must be above 0 and at most 1"):
                build(name, keep_ratio=ratio)


CONTRACT = [test for test in map(globals().get, [*globals()]) if callable(test) and hasattr(test, "pytestmark")]


class EveryOther(VideoCompressor):
    """A video compressor of somebody else's."""

    def __init__(self, *, keep_ratio: float = 0.5):
        super().__init__()
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio is {keep_ratio}; it must be above 0 and at most 1")
        self.step = 1 if keep_ratio == 1 else 2
        self.scale = torch.nn.Parameter(torch.ones(()))

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        return -(-num_frames * tokens_per_frame // self.step)

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        tokens = video.tokens_FPD.flatten(0, 1)
        indices = torch.arange(0, len(tokens), self.step, device=tokens.device)
        return indices, tokens[indices] * self.scale.to(tokens.dtype)


def test_a_name_registered_at_run_time_is_held_to_the_contract(monkeypatch):
    monkeypatch.setattr(VIDEO_COMPRESSORS, "_entries", dict(VIDEO_COMPRESSORS._entries))
    VIDEO_COMPRESSORS.register("every_other", EveryOther)
    assert len(CONTRACT) >= 13
    for test in CONTRACT:
        others = [mark.args for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] != "name"]
        for values in others[0][1] if others else [None]:
            test("every_other", **({others[0][0]: values} if others else {}))
    config = HicoConfig.preset("tiny", video_compressor="every_other")
    assert config.vision.num_video_tokens(8) == 16


@pytest.mark.parametrize("name", ["uniform", "random", "evs", "dycoke", "visionzip", "dtd"])
def test_a_video_that_comes_in_chunks_is_not_held(name):
    alive, most = weakref.WeakSet(), []

    def chunks():
        for seed in range(20):
            chunk = FrameTokens(*(part.clone() for part in video_of(4, 4, seed=seed)))
            alive.add(chunk.tokens_FPD)
            yield chunk
            del chunk
            most.append(len(alive))

    build(name).select_stream(chunks(), num_frames=80)
    assert max(most) <= 3


def test_the_method_of_the_documentation_runs(monkeypatch):
    monkeypatch.setattr(VIDEO_COMPRESSORS, "_entries", dict(VIDEO_COMPRESSORS._entries))
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(next(block for block in blocks if "class EveryOther" in block), "docs/methods.md", "exec"), {})
    assert build("every_other").select(*video_of(3, 5))[0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    known = [name for name in VIDEO_COMPRESSORS.names() if name != "every_other"]
    assert all(f"| `{name}` |" in page for name in known)


def test_tokens_know_their_frames_and_times():
    video = CompressedVideo(torch.zeros(4, 2), torch.tensor([0, 5, 6, 11]), 3, 4, 4)
    assert video.frames_K.tolist() == [0, 1, 1, 2]
    seconds = torch.arange(9) * 0.5
    assert video.seconds_of(seconds).tolist() == [0.75, 2.75, 2.75, 4.0]
    apart = CompressedVideo.whole(torch.zeros(3, 2, 5))
    assert apart.seconds_of(torch.tensor([1.0, 2.0, 4.0])).tolist() == [1, 1, 2, 2, 4, 4]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown video compressor 'evz'; did you mean 'evs'\? Known: .*uniform"):
        HicoConfig.preset("tiny", video_compressor="evz")
