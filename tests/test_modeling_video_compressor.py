"""Video compressors in the whole model: counts, batches, generation, training, and dropping behind them."""

import pytest
import torch
from test_modeling_hico import IMAGE, VIDEO, flat, left_pad, pixels, visual_inputs

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.cli import load
from hico.compressors.base import Compressor
from hico.compressors.identity import IdentityCompressor
from hico.demo import write_moving_square
from hico.encoders.umt import UMTEncoder
from hico.preprocessing import normalize_pixels
from hico.registry import COMPRESSORS, ENCODERS, VIDEO_COMPRESSORS
from hico.session import Session

SETTINGS: dict[str, dict] = {}
"""Settings of those whose defaults do not fit the tiny model's 16 tokens of a clip."""
every_video_compressor = pytest.mark.parametrize("name", VIDEO_COMPRESSORS.names())


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return HicoForConditionalGeneration(HicoConfig.preset("tiny")).eval().double()


@pytest.fixture
def model(plain):
    yield plain
    plain.set_video_compressor(None)
    plain.set_drop_schedule(None)


def spec_of(name: str) -> dict:
    return {"name": name, **SETTINGS.get(name, {})}


def prompt(model, *parts):
    """Text ids for numbers, the placeholders of a video of n clips for "n", of an image's tile for "i"."""
    vision, ids = model.config.vision, []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += [IMAGE] * 16 if part == "i" else [VIDEO] * vision.num_video_tokens(4 * int(part))
    return torch.tensor(ids)


def moving(num_clips: int):
    """Clips in which something stays: noise alone would leave nothing to merge."""
    still = pixels(1, 1, 3, 48, 48)
    clips = still.repeat(num_clips, 4, 1, 1, 1)
    clips[1:, :, :, :24] = pixels(num_clips - 1, 4, 3, 24, 48)
    return clips


def batch_of(model):
    """Text alone; two videos back to back; an image, text and a video."""
    rows = [prompt(model, 1, 2, 3, 4), prompt(model, 5, "3", 6, "2", 7), prompt(model, 8, "i", 9, "4", 10)]
    videos = [[], [moving(3), moving(2)], [moving(4)]]
    images = [[], [], [(pixels(1, 3, 48, 48), (0, 0))]]
    return rows, videos, images


@every_video_compressor
@torch.no_grad()
def test_a_padded_batch_equals_its_rows_one_by_one(model, name):
    model.set_video_compressor(spec_of(name))
    rows, videos, images = batch_of(model)
    ids, mask = left_pad(rows)
    output = model(ids, attention_mask=mask, **visual_inputs(flat(videos), flat(images)))
    for i, row in enumerate(rows):
        single = model(row[None], **visual_inputs(videos[i], images[i]))
        torch.testing.assert_close(output.logits[i, -single.logits.shape[1] :], single.logits[0])
    sizes = [len(video.tokens_KD) for video in output.videos]
    assert all(size < 16 * clips for size, clips in zip(sizes, (3, 2, 4), strict=True))
    if model.model.video_compressor.by_content:
        assert output.trim.gather(ids, fill=-1)[1].tolist().count(VIDEO) == sum(sizes[:2])
    else:
        assert output.trim is None


@every_video_compressor
def test_cached_generation_of_a_batch_equals_the_argmax_of_its_rows(model, name):
    model.set_video_compressor(spec_of(name))
    rows, videos, images = batch_of(model)
    ids, mask = left_pad(rows)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    batch = model.generate(ids, attention_mask=mask, **visual_inputs(flat(videos), flat(images)), **settings)
    assert torch.equal(batch[:, : ids.shape[1]], ids)
    for i, row in enumerate(rows):
        whole = torch.cat([row, batch[i, -4:-1]])
        logits = model(whole[None], **visual_inputs(videos[i], images[i])).logits[0]
        assert logits[-4:].argmax(-1).tolist() == batch[i, -4:].tolist()


@every_video_compressor
def test_training_with_labels_learns_from_the_same_tokens_on_either_side(model, name):
    model.set_video_compressor(spec_of(name))
    row = prompt(model, 1, "4", 2, 3, 4)
    ids, labels = row[None], torch.full_like(row[None], -100)
    labels[0, -2:] = row[-2:]
    inputs = visual_inputs([moving(4)], [])
    output = model(ids, labels=labels, **inputs)
    expected = torch.nn.functional.cross_entropy(output.logits[0, -3:-1], row[-2:])
    torch.testing.assert_close(output.loss, expected.float())
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (0, 3), value=256),
        "labels": torch.nn.functional.pad(labels, (0, 3), value=-100),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, 3)),
    }
    try:
        model.train()
        trained = model(**padded, **inputs)
        torch.testing.assert_close(trained.loss, output.loss)
        model.zero_grad()
        trained.loss.backward()
        parts = ("encoder", "projector", "language_model")
        assert all(next(getattr(model.model, part).parameters()).grad is not None for part in parts)
        assert model.model.projector.mlp[0].weight.grad.any()
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)


@every_video_compressor
@torch.no_grad()
def test_dropping_behind_it_is_dropping_over_the_tokens_it_leaves(model, name):
    model.set_video_compressor(spec_of(name))
    ids, inputs = prompt(model, 1, "4", 2, "3", 3)[None], visual_inputs([moving(4), moving(3)], [])
    schedule = "attention@1:0.5"
    model.set_drop_schedule(schedule)
    output = model(ids, **inputs)
    tokens = [video.tokens_KD for video in output.videos]
    model.set_video_compressor(None)
    short = [1, *[VIDEO] * len(tokens[0]), 2, *[VIDEO] * len(tokens[1]), 3]
    fed = model(torch.tensor([short]), visual_embeds=tokens)
    assert output.logits.shape[1] == 3 + sum(int(len(some) * 0.5) for some in tokens)
    torch.testing.assert_close(output.logits, fed.logits)
    assert torch.equal(output.drop_plan.kept_indices, fed.drop_plan.kept_indices)


@torch.no_grad()
def test_a_model_is_loaded_with_its_video_compressor_and_no_other_weight(model, tmp_path):
    model.set_video_compressor({"name": "evs", "keep_ratio": 0.4})
    names = set(model.state_dict())
    model.save_pretrained(tmp_path)
    again = HicoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.video_compressor == {"name": "evs", "keep_ratio": 0.4}
    model.set_video_compressor(None)
    assert set(model.state_dict()) == names == set(again.state_dict())
    model.set_video_compressor({"name": "evs", "keep_ratio": 0.4})
    ids, inputs = prompt(model, 1, "3", 2)[None], visual_inputs([moving(3)], [])
    torch.testing.assert_close(again(ids, **inputs).logits, model(ids, **inputs).logits)


@torch.no_grad()
def test_keeping_everything_gives_the_very_same_logits(model):
    row, inputs = [1, *[VIDEO] * 48, 2], visual_inputs([moving(3)], [])
    before = model(torch.tensor([row]), **inputs).logits
    model.set_video_compressor({"name": "uniform", "keep_ratio": 1.0})
    assert torch.equal(model(torch.tensor([row]), **inputs).logits, before)


def test_a_wrong_video_compressor_leaves_the_old_one_in_force(model):
    model.set_video_compressor({"name": "uniform", "keep_ratio": 0.5})
    for spec, message in (
        ("unifrom", "did you mean 'uniform'"),
        ({"name": "evs", "ratio": 0.5}, "cannot be built from .*ratio"),
        ({"name": "evs", "keep_ratio": 2}, "keep_ratio is 2; it must be above 0 and at most 1"),
        ({"keep_ratio": 0.5}, "unknown video compressor None"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_video_compressor(spec)
        assert model.config.video_compressor == {"name": "uniform", "keep_ratio": 0.5}
    with pytest.raises(ValueError, match="48 video placeholders, but the 1 video"):
        model(torch.tensor([[1, *[VIDEO] * 48, 2]]), **visual_inputs([moving(3)], []))


class Blind(UMTEncoder):
    """An encoder that cannot be watched."""

    def _attentions(self):
        return []


class Opaque(IdentityCompressor):
    """A compressor that does not say which tokens it joins."""

    carry = Compressor.carry


def test_a_method_that_needs_attention_refuses_what_gives_none(monkeypatch):
    for registry in (ENCODERS, COMPRESSORS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    ENCODERS.register("blind", Blind)
    COMPRESSORS.register("opaque", Opaque)
    tiny = HicoConfig.preset("tiny")
    for changes, message in (
        ({"encoder": {**tiny.encoder, "name": "blind"}}, "'visionzip' ranks tokens .* Blind gives none"),
        ({"compressor": "opaque"}, "'visionzip' ranks tokens .* Opaque does not say which tokens it joins"),
    ):
        config = HicoConfig.preset("tiny", video_compressor="visionzip", **changes)
        with pytest.raises(ValueError, match=message):
            HicoForConditionalGeneration(config)
        with pytest.raises(ValueError, match=message):
            config.vision.num_video_tokens(8)
        config.video_compressor = {"name": "evs"}
        HicoForConditionalGeneration(config)


@torch.no_grad()
def test_attention_follows_the_tokens_that_are_merged_or_pooled():
    for compressor in ({"name": "pooling", "stride": 2}, {"name": "token_merge", "tokens_per_frame": 4}, "identity"):
        config = HicoConfig.preset("tiny", compressor=compressor, video_compressor="visionzip")
        inner = HicoForConditionalGeneration(config).eval().model
        clips = moving(3)
        tokens, facts = inner.encode(clips, attend=True)
        assert torch.equal(tokens, inner.encode(clips))
        pixels = normalize_pixels(clips, mean=inner.encoder.image_mean, std=inner.encoder.image_std)
        before, attention, keys = inner.encoder.attend(pixels)
        # What each token holds, found by merging the places of all patches instead of what is known of them.
        places = torch.eye(before.shape[1]).expand(3, -1, -1)
        shares = inner.compressor.carry(places, before, inner.encoder.grid(4, 48, 48))
        torch.testing.assert_close(facts[..., 0], (shares @ attention[..., None])[..., 0])
        torch.testing.assert_close(facts[..., 1:], shares @ keys)
        torch.testing.assert_close(tokens, inner.projector(shares @ before), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_video_that_is_read_as_it_comes_is_compressed_alike(model):
    for name in VIDEO_COMPRESSORS.names():
        model.set_video_compressor(spec_of(name))
        clips = moving(20)  # more than one chunk
        whole, streamed = (
            model.model.get_videos(clips)[0],
            model.model.encode_video(iter(clips.split(7)), num_clips=20),
        )
        assert torch.equal(whole.indices_K, streamed.indices_K)
        torch.testing.assert_close(whole.tokens_KD, streamed.tokens_KD)
        assert (whole.num_frames, whole.tokens_per_frame, whole.sampled_per_frame) == (20, 16, 4)
        with pytest.raises(ValueError, match="num_clips is 21, but the video has 20 clips"):
            model.model.encode_video(clips, num_clips=21)


# Processor and session ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("videos") / "square.mp4")
    write_moving_square(path, num_frames=64)
    model, processor = load("tiny", device="cpu")
    return model.double(), processor, path


@every_video_compressor
def test_a_session_answers_as_the_model_does_and_knows_when_its_tokens_are(parts, name):
    model, processor, path = parts
    model.set_video_compressor(spec_of(name))
    processor.vision = model.config.vision
    video = {"type": "video", "path": path, "num_frames": 30, "mode": "middle"}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert (inputs["input_ids"] == VIDEO).sum() == processor.vision.num_video_tokens(32)
    settings = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    session = Session(model, processor, path, num_frames=30, mode="middle")
    assert session.ask("What?", **settings) == processor.decode(tokens, skip_special_tokens=True)
    seconds = session.token_seconds
    assert len(seconds) == len(session.visual_tokens) < 8 * 16
    assert (seconds.diff() >= 0).all()
    assert session.video.seconds[:4].mean() <= seconds[0]
    assert seconds[-1] <= session.video.seconds[-1]


def test_a_processor_is_saved_with_the_video_compressor(parts, tmp_path):
    model, processor, _ = parts
    model.set_video_compressor({"name": "uniform", "keep_ratio": 0.5})
    processor.vision = model.config.vision
    processor.save_pretrained(tmp_path)
    assert HicoProcessor.from_pretrained(tmp_path).vision == processor.vision
    assert HicoProcessor.from_pretrained(tmp_path).vision.num_video_tokens(8) == 16


@pytest.mark.parametrize("compressor", ["pooling", "identity"])
def test_a_compressor_that_keeps_time_apart_gives_frames_and_one_that_merges_gives_clips(compressor):
    settings = {"name": compressor, **({"stride": 2} if compressor == "pooling" else {})}
    config = HicoConfig.preset("tiny", compressor=settings, video_compressor={"name": "evs", "keep_ratio": 0.05})
    per_frame = 4 if compressor == "pooling" else 16
    model = HicoForConditionalGeneration(config).eval().model
    with torch.no_grad():
        video = model.get_videos(moving(3))[0]
    assert (video.num_frames, video.tokens_per_frame, video.sampled_per_frame) == (12, per_frame, 1)
    assert len(video.tokens_KD) == config.vision.num_video_tokens(12) == per_frame
    merged = HicoConfig.preset("tiny", video_compressor={"name": "evs", "keep_ratio": 0.05})
    assert merged.vision.num_video_tokens(12) == 16
