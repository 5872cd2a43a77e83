"""VideoChat-Flash with InternVideo2: its checkpoint on every path, and the file of its pre-training."""

import pytest
import torch
from internvideo2_reference import encode
from published import internvideo2, tiny_llm, write_checkpoint, write_tokenizer

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.cli import main
from hico.configuration_hico import PRESETS
from hico.convert import convert, inspect_checkpoint
from hico.shards import CheckpointError, iterate_shards

TOWER = "model.vision_tower.vision_tower."
PRESET = "videochat-flash-7b-internvideo2"


def tower_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(TOWER): weight for name, weight in weights.items() if name.startswith(TOWER)}


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: shard.load(name) for shard in iterate_shards(folder) for name in shard.tensors}


def test_the_preset_is_the_release():
    config = HicoConfig.preset(PRESET)
    assert config.encoder == {"name": "internvideo2", "image_size": 224}
    assert (config.vision.num_video_tokens(8), config.vision.num_image_tokens((2, 1))) == (2 * 64, 3 * 64)
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (3584, 28, 4)


@pytest.mark.parametrize("route", ["direct", "pickled", "converted", "back", "saved"])
@pytest.mark.parametrize("scale", ["gamma", "weight"])
@torch.no_grad()
def test_every_path_gives_the_tokens_of_the_formulas_and_the_llm(tmp_path, route, scale):
    llm = tiny_llm()
    config, weights = internvideo2(llm, scale=scale)
    settings = {"num_shards": 3, "suffix": "bin"} if route == "pickled" else {"num_shards": 2}
    folder = write_checkpoint(tmp_path / "published", config, weights, **settings)
    if route in ("converted", "back"):
        assert not convert(folder, tmp_path / "hico").plan.drops
        folder = tmp_path / "hico"
    if route == "back":
        convert(folder, tmp_path / "back", to="published")
        folder = tmp_path / "back"
    model = HicoForConditionalGeneration.from_pretrained(folder).eval()
    if route == "saved":
        model.save_pretrained(tmp_path / "saved")
        model = HicoForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()

    model, llm = model.double(), llm.double()  # float32 would compare the rounding of two orders of sums
    mlp = {name.removeprefix("model.mm_projector.mlp."): weight.double() for name, weight in weights.items()}
    inputs = {"pixel_values_videos": torch.randn(2, 4, 3, 128, 128), "pixel_values": torch.randn(1, 3, 128, 128)}
    inputs = {name: pixels.double() for name, pixels in inputs.items()}
    tokens = []
    for name, token in (("pixel_values", model.config.image_token_id), ("pixel_values_videos", None)):
        clips = inputs[name] if token is None else inputs[name][:, None]
        encoded = encode(tower_of(weights), clips, num_heads=3)
        torch.testing.assert_close(model.model.encoder(clips), encoded)
        merged = model.model.compressor(encoded, model.model.encoder.grid(clips.shape[1], 128, 128)).flatten(0, 1)
        hidden = torch.nn.functional.gelu(merged @ mlp["0.weight"].T + mlp["0.bias"])
        tokens.append(hidden @ mlp["2.weight"].T + mlp["2.bias"])
    image, video = tokens
    assert (len(image), len(video)) == (64, 128)
    ids = torch.arange(10)
    placeholders = [
        ids.new_full((len(image),), model.config.image_token_id),
        ids.new_full((len(video),), model.config.video_token_id),
    ]
    prompt = torch.cat([ids[:4], placeholders[0], ids[4:7], placeholders[1], ids[7:]])[None]
    embeds = llm.get_input_embeddings()(ids)
    expected = llm(inputs_embeds=torch.cat([embeds[:4], image, embeds[4:7], video, embeds[7:]])[None]).logits
    torch.testing.assert_close(model(prompt, **inputs).logits, expected)


@pytest.mark.parametrize("scale", ["gamma", "weight"])
def test_a_round_trip_is_exact(tmp_path, scale):
    folder = write_checkpoint(tmp_path / "published", *internvideo2(tiny_llm(), scale=scale))
    convert(folder, tmp_path / "hico")
    convert(tmp_path / "hico", tmp_path / "back", to="published")
    convert(tmp_path / "back", tmp_path / "again")
    original = {name.replace(".gamma", ".weight"): weight for name, weight in tensors(folder).items()}
    back = tensors(tmp_path / "back")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name].view(torch.uint8), original[name].view(torch.uint8)) for name in back)
    for path in (tmp_path / "hico").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tower: tower.pop("blocks.1.ls2.gamma"), "missing, such as model.encoder.blocks.1.ls2.weight"),
        (lambda tower: tower.update({"blocks.1.ls2.weight": torch.ones(48)}), "both become .*blocks.1.ls2.weight"),
        (lambda tower: tower.pop("img_pos_embed"), "missing, such as model.encoder.img_pos_embed"),
        (lambda tower: tower.update({"clip_pos_embed": torch.ones(1)}), "left over, such as .*clip_pos_embed"),
        (lambda tower: tower.update({"pos_embed": torch.ones(1, 129, 48)}), r"\(1, 129, 48\), but .* \(1, 257, 48\)"),
    ],
)
def test_a_tower_with_other_tensors_is_refused_on_every_path(tmp_path, change, words):
    config, weights = internvideo2(tiny_llm())
    tower = tower_of(weights)
    change(tower)
    weights = {name: weight for name, weight in weights.items() if not name.startswith(TOWER)}
    folder = write_checkpoint(tmp_path / "x", config, weights | {TOWER + name: w for name, w in tower.items()})
    with pytest.raises(CheckpointError, match=words):
        convert(folder, tmp_path / "hico")
    assert main(["convert", str(folder), str(tmp_path / "hico")]) == 1
    with pytest.raises(ValueError, match=r"not the weights of this HicoForConditionalGeneration|both become"):
        HicoForConditionalGeneration.from_pretrained(folder)


def test_a_block_that_does_not_run_is_left_out(tmp_path):
    config, weights = internvideo2(tiny_llm())
    last = {name.replace("blocks.1.", "blocks.2."): w.clone() for name, w in weights.items() if "blocks.1." in name}
    folder = write_checkpoint(tmp_path / "x", config, weights | last)
    report = convert(folder, tmp_path / "hico")
    assert {drop.reason for drop in report.plan.drops} == {"the encoder does not run it"}
    assert len(report.plan.drops) == 13
    assert len(HicoForConditionalGeneration.from_pretrained(folder).model.encoder.blocks) == 2


def test_inspect_says_what_it_is(tmp_path, capsys):
    config, weights = internvideo2(tiny_llm())
    folder = write_checkpoint(tmp_path / "x", config, weights)
    found = inspect_checkpoint(folder)
    assert (found.kind, found.fault, found.unknown) == ("videochat-flash", None, {})
    assert found.facts["encoder"].startswith("internvideo2 (image_size 128, hidden_size 48, depth 3, num_heads 3")
    assert found.facts["clip"] == "4 frames of 128 px, 64 tokens"
    assert found.num_parameters["encoder"] == sum(weight.numel() for weight in tower_of(weights).values())
    assert main(["inspect", str(folder)]) == 0
    assert "internvideo2" in capsys.readouterr().out


def test_a_video_is_answered_from_the_published_folder(tmp_path):
    folder = write_checkpoint(tmp_path / "x", *internvideo2(tiny_llm()))
    write_tokenizer(folder)
    model, processor = (part.from_pretrained(folder) for part in (HicoForConditionalGeneration, HicoProcessor))
    frames = torch.randint(256, (8, 3, 30, 40), dtype=torch.uint8)
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 128
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


@pytest.fixture
def tiny_release(monkeypatch):
    """The preset of the release, with the sizes of `internvideo2`."""
    sizes = {"image_size": 128, "hidden_size": 48, "intermediate_size": 80, "depth": 3, "num_heads": 3}
    encoder = {"name": "internvideo2", **sizes, "patch_size": 16, "pretrained_side": 8}
    monkeypatch.setitem(PRESETS, PRESET, {"encoder": encoder})


@pytest.mark.parametrize("prefix", ["", "vision_encoder."])
@pytest.mark.parametrize("nested", [None, "module"])
@pytest.mark.parametrize("scale", ["gamma", "weight"])
@torch.no_grad()
def test_a_file_of_the_pre_training_becomes_the_encoder(tmp_path, tiny_release, prefix, nested, scale):
    tower = tower_of(internvideo2(tiny_llm(), scale=scale)[1])
    last = {name.replace("blocks.1.", "blocks.2."): w for name, w in tower.items() if name.startswith("blocks.1.")}
    beside = {"clip_decoder.0.head.weight": torch.ones(3), "clip_pos_embed": torch.ones(3)}
    content = {prefix + name: weight for name, weight in {**tower, **last, **beside}.items()}
    content |= {"text_encoder.bert.encoder.layer.0.output.dense.bias": torch.ones(3), "temp": torch.ones(())}
    file = tmp_path / "InternVideo2-1B_f4_vision.pt"
    torch.save({nested: content} if nested else content, file)
    tiny_llm().save_pretrained(tmp_path / "llm")
    report = convert(tmp_path / "llm", tmp_path / "hico", encoder=file)
    reasons = {drop.name: drop.reason for drop in report.plan.drops}
    assert reasons == dict.fromkeys([prefix + name for name in last], "the encoder does not run it") | dict.fromkeys(
        [name for name in content if name.removeprefix(prefix) not in tower.keys() | last.keys()], "not of the encoder"
    )
    encoder = HicoForConditionalGeneration.from_pretrained(tmp_path / "hico").model.encoder.double()
    clips = torch.randn(1, 4, 3, 128, 128).double()
    torch.testing.assert_close(encoder(clips), encode(tower, clips, num_heads=3))
    used = sum(weight.numel() for weight in {**tower, **last}.values())
    assert inspect_checkpoint(file).num_parameters == {"encoder": used, "not used": 10}


def test_a_file_without_scales_is_refused(tmp_path, tiny_release):
    tower = tower_of(internvideo2(tiny_llm())[1])
    torch.save({name: weight for name, weight in tower.items() if ".ls" not in name}, tmp_path / "tower.pt")
    tiny_llm().save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match=r"4 missing, such as model\.encoder\.blocks\.0\.ls1\.weight"):
        convert(tmp_path / "llm", tmp_path / "hico", encoder=tmp_path / "tower.pt")
