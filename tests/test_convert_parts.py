"""Models made of parts: an LLM, a vision tower, and a projector from stage 1."""

import json

import pytest
import torch
from published import tiny_clip, tiny_llm, videochat_flash, write_checkpoint, write_tokenizer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.cli import main
from hico.convert import convert, inspect_checkpoint
from hico.encoders.umt import UMTEncoder
from hico.shards import CheckpointError

VISION = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6}


@pytest.fixture
def llm(tmp_path):
    tiny_llm().save_pretrained(tmp_path / "llm")
    write_tokenizer(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture
def umt_file(tmp_path):
    """A file of UMT's pre-training for the encoder of the preset ``tiny``: all blocks, and more than the encoder."""
    settings = {key: value for key, value in HicoConfig.preset("tiny").encoder.items() if key != "name"}
    whole = UMTEncoder(**settings, return_index=-1)
    weights = {f"encoder.{name}".replace("vision_layernorm", "norm"): w for name, w in whole.state_dict().items()}
    weights |= {"decoder.blocks.0.attn.qkv.weight": torch.ones(3), "clip_decoder.0.head.bias": torch.ones(3)}
    torch.save({"model": weights, "epoch": 1}, tmp_path / "UMT-L_f4_vision.pt")
    return tmp_path / "UMT-L_f4_vision.pt", weights


def write_projector(path, weights, prefix):
    torch.save({f"{prefix}{name}": weight for name, weight in weights.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["model.mm_projector.mlp.", "model.mm_projector.", "mm_projector."])
def test_an_llm_umt_and_a_stage_1_projector_make_a_model(llm, umt_file, tmp_path, prefix):
    file, weights = umt_file
    projector = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32)).state_dict()
    stage1 = write_projector(tmp_path / "mm_projector.bin", projector, prefix)
    report = convert(llm, tmp_path / "hico", encoder=file, projector=stage1, preset="tiny")
    assert {drop.reason for drop in report.plan.drops} == {"not of the encoder", "the encoder does not run it"}
    model = HicoForConditionalGeneration.from_pretrained(tmp_path / "hico")
    state = model.state_dict()
    used = {f"model.{name}".replace("encoder.norm", "encoder.vision_layernorm"): w for name, w in weights.items()}
    for name in [name for name in state if name.startswith("model.encoder.")]:
        assert torch.equal(state[name], used[name])
    for name, weight in projector.items():
        assert torch.equal(state[f"model.projector.mlp.{name}"], weight)
    original = load_file(llm / "model.safetensors")
    for name, weight in original.items():
        assert torch.equal(state[name.replace("model.", "model.language_model.")], weight)


def test_without_a_projector_it_is_random_and_always_the_same(llm, umt_file, tmp_path):
    for name in ("one", "two"):
        report = convert(llm, tmp_path / name, encoder=umt_file[0], preset="tiny")
        assert "the projector is random (seed 0) until it is trained" in report.table()
    one, two = (HicoForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["model.projector.mlp.0.weight"].std() > 0


@pytest.mark.parametrize("kind", ["clip", "clip_vision_model", "siglip"])
@torch.no_grad()
def test_a_clip_or_siglip_folder_becomes_the_encoder(llm, tmp_path, kind):
    if kind == "clip":
        tower = CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**VISION, "num_hidden_layers": 3}))
    elif kind == "siglip":
        tower = SiglipModel(SiglipConfig(text_config=TEXT, vision_config={**VISION, "num_hidden_layers": 3}))
    else:
        tower = tiny_clip()
    tower.eval().save_pretrained(tmp_path / "tower")
    preset = "longva-7b" if kind == "siglip" else None
    convert(llm, tmp_path / "hico", encoder=tmp_path / "tower", preset=preset)
    model = HicoForConditionalGeneration.from_pretrained(tmp_path / "hico")
    frames = torch.randn(2, 3, 16, 16).double()
    vision = getattr(tower.double(), "vision_model", tower)
    expected = vision(frames, output_hidden_states=True).hidden_states[-2][:, -16:]
    torch.testing.assert_close(model.model.encoder.double()(frames[:, None]), expected)
    assert model.config.projector_first
    assert model.config.vision.num_video_tokens(1) == 4


def test_the_llm_keeps_its_rope_settings_and_gets_placeholders(llm, umt_file, tmp_path):
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**config, "rope_parameters": YARN, "auto_map": {"AutoModel": "x.Y"}}))
    convert(llm, tmp_path / "hico", encoder=umt_file[0], preset="tiny")
    config = HicoConfig.from_pretrained(tmp_path / "hico")
    assert config.text_config.rope_parameters == YARN
    assert "auto_map" not in (tmp_path / "hico" / "config.json").read_text()
    processor = HicoProcessor.from_pretrained(tmp_path / "hico")
    ids = processor.tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|image_pad|>"])
    assert ids == [config.video_token_id, config.image_token_id]
    assert "yarn, theta 1e+06, factor 4.0" in inspect_checkpoint(tmp_path / "hico").facts["rope"]


def test_a_model_of_parts_answers(llm, umt_file, tmp_path):
    convert(llm, tmp_path / "hico", encoder=umt_file[0], preset="tiny")
    model = HicoForConditionalGeneration.from_pretrained(tmp_path / "hico")
    processor = HicoProcessor.from_pretrained(tmp_path / "hico")
    frames = torch.randint(256, (4, 3, 48, 48), dtype=torch.uint8)
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_parts_that_do_not_fit_are_refused(llm, umt_file, tmp_path, capsys):
    file, weights = umt_file
    torch.save({"mm_projector.0.weight": torch.ones(32, 64)}, tmp_path / "half.bin")
    torch.save({"vision_resampler.0.weight": torch.ones(32, 64)}, tmp_path / "other.bin")
    torch.save({**weights, "encoder.pos_embed": torch.ones(1, 3)}, tmp_path / "more.pt")
    for arguments, words in (
        ({}, r"is an LLM \(qwen2\); say which encoder it gets"),
        ({"encoder": llm}, "is no vision tower"),
        ({"encoder": file}, "by the configuration it is"),
        ({"encoder": file, "preset": "gigantic"}, "unknown preset 'gigantic'"),
        ({"encoder": file, "preset": "tiny", "projector": tmp_path / "half.bin"}, "3 missing"),
        ({"encoder": file, "preset": "tiny", "projector": tmp_path / "other.bin"}, "1 left over, such as vision_res"),
        ({"encoder": tmp_path / "more.pt", "preset": "tiny"}, r"1 left over, such as encoder\.pos_embed"),
        ({"encoder": tmp_path / "none.pt"}, "there is no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(llm, tmp_path / "hico", **arguments)
    with pytest.raises(ValueError, match="is a part and no model"):
        convert(file, tmp_path / "hico")
    with pytest.raises(CheckpointError, match="not a weight file"):
        convert(llm, tmp_path / "hico", encoder=llm / "config.json", preset="tiny")
    assert main(["convert", str(llm), str(tmp_path / "hico"), "--encoder", str(file), "--preset", "tiny"]) == 0
    assert "decoder.blocks.0.attn.qkv.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": None},
        {"model_type": ["qwen2"]},
        {"model_type": "mamba"},
        {"model_type": "qwen2_vl"},
        {"dtype": "float99"},
        {"hidden_size": "many"},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "spiral"}},
    ],
    ids=str,
)
def test_an_llm_that_cannot_be_is_one_line(llm, umt_file, tmp_path, capsys, change):
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**config, **change}))
    assert main(["convert", str(llm), str(tmp_path / "hico"), "--encoder", str(umt_file[0]), "--preset", "tiny"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["inspect", str(llm)]) == 0


@pytest.mark.parametrize(
    "change",
    [{"vision_config": 3}, {"patch_size": 0}, {"hidden_act": "no"}, {"hidden_size": [1]}, {"num_attention_heads": 5}],
    ids=str,
)
def test_a_tower_that_cannot_be_is_one_line(llm, tmp_path, capsys, change):
    tiny_clip().save_pretrained(tmp_path / "tower")
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(json.dumps({**config, **change}))
    capsys.readouterr()
    assert main(["convert", str(llm), str(tmp_path / "hico"), "--encoder", str(tmp_path / "tower")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["inspect", str(tmp_path / "tower")]) == 0


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text", "qwen3"])
def test_llms_of_other_families_are_inspected(tmp_path, model_type):
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    found = inspect_checkpoint(tmp_path / "llm")
    assert found.fault is None
    assert found.facts["LLM"].startswith(f"{model_type}, 2 layers, 32 wide, 2 heads")
    assert ("theta" in found.facts["rope"]) == (model_type != "gpt2")


def test_parts_are_inspected(llm, umt_file, tmp_path, capsys):
    found = inspect_checkpoint(llm)
    assert found.kind == "LLM"
    assert found.facts["LLM"].startswith("qwen2, 2 layers, 32 wide, 4 heads (2 key-value), vocabulary 320")
    assert sum(found.num_parameters.values()) == sum(weight.numel() for weight in tiny_llm().state_dict().values())
    file, weights = umt_file
    found = inspect_checkpoint(file)
    assert found.num_parameters["encoder"] == sum(w.numel() for name, w in weights.items() if name.startswith("enc"))
    assert found.num_parameters["not used"] == 6
    tiny_clip().save_pretrained(tmp_path / "tower")
    assert inspect_checkpoint(tmp_path / "tower").facts["encoder"].startswith("clip (image_size 16, patch_size 4")
    assert main(["inspect", str(file)]) == 0
    assert "weights" in capsys.readouterr().out


def test_a_tower_without_its_final_norm_is_refused_by_name_and_loads_by_a_setting(tmp_path):
    config, weights = videochat_flash(tiny_llm())
    weights = {name: weight for name, weight in weights.items() if "vision_layernorm" not in name}
    folder = write_checkpoint(tmp_path / "flash", config, weights)
    with pytest.raises(ValueError, match=r"2 missing: model\.encoder\.vision_layernorm\.bias"):
        HicoForConditionalGeneration.from_pretrained(folder)
    config = HicoConfig.from_pretrained(folder)
    config.encoder["final_norm"] = False
    model = HicoForConditionalGeneration.from_pretrained(folder, config=config)
    assert not list(model.model.encoder.vision_layernorm.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = HicoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.encoder["final_norm"] is False
