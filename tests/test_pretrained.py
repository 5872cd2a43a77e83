"""Loading: quantized weights and adapters."""

import shutil

import pytest
import torch
from test_modeling_hico import pixels, prompt
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from hico import HicoConfig, HicoForConditionalGeneration, HicoModel, HicoProcessor
from hico.cli import load, main
from hico.demo import write_moving_square
from hico.tokenizer import byte_tokenizer
from hico.train.lora import add_lora, load_model

BITS = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = HicoConfig.preset("tiny")
    HicoForConditionalGeneration(config).save_pretrained(folder)
    HicoProcessor.from_config(config, byte_tokenizer()).save_pretrained(folder)
    return folder


def quantized(folder, bits, **settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **settings)
    return HicoForConditionalGeneration.from_pretrained(folder, quantization_config=config)


class IntegerLinear(nn.Module):
    """A linear layer whose weights are stored as integers, as those of quantized models are."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale.to(inputs.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_pixels_are_computed_in_the_type_of_the_model_not_of_its_stored_weights(folder, dtype):
    model = HicoModel.from_pretrained(folder, dtype=dtype)
    clips = pixels(2, 4, 3, 48, 48)
    whole = model.encode(clips)
    for module in [module for module in model.modules() if not isinstance(module, IntegerLinear)]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, IntegerLinear(child.float()).to(dtype))
    assert model.projector.mlp[0].weight.dtype == torch.int8
    tokens = model.encode(clips)
    assert tokens.dtype == dtype
    assert torch.cosine_similarity(tokens.flatten().float(), whole.flatten().float(), dim=0) > 0.99


@pytest.mark.parametrize("as_dict", [False, True])
def test_quantization_leaves_what_sees_alone_unless_it_is_told_otherwise(folder, monkeypatch, as_dict):
    asked = []

    def from_pretrained(name, *args, quantization_config, **kwargs):
        asked.append(quantization_config.llm_int8_skip_modules)
        raise InterruptedError

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", from_pretrained)
    for skip in (None, ["lm_head", "model.projector"]):
        given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        with pytest.raises(InterruptedError):
            HicoForConditionalGeneration.from_pretrained(
                folder, quantization_config=given.to_dict() if as_dict else given
            )
        assert given.llm_int8_skip_modules == skip
    assert {"lm_head", "model.encoder", "model.projector", "model.compressor", "encoder", "projector"} <= {*asked[0]}
    assert asked[1] == ["lm_head", "model.projector"]


@BITS
@torch.no_grad()
def test_a_quantized_model_sees_what_the_whole_one_sees(folder, bits, tmp_path):
    whole = HicoForConditionalGeneration.from_pretrained(folder)
    model, clips = quantized(folder, bits), pixels(2, 4, 3, 48, 48)
    assert not model.model.language_model.layers[0].mlp.up_proj.weight.is_floating_point()
    torch.testing.assert_close(model.model.encode(clips), whole.model.encode(clips))
    everywhere = quantized(folder, bits, llm_int8_skip_modules=["lm_head"])
    assert not everywhere.model.projector.mlp[0].weight.is_floating_point()
    tokens = everywhere.model.encode(clips)
    assert torch.cosine_similarity(tokens.flatten(), whole.model.encode(clips).flatten(), dim=0) > 0.9
    for number, saved in enumerate((model, everywhere)):
        saved.save_pretrained(tmp_path / str(number))
        for kind in (HicoForConditionalGeneration, HicoModel):
            again = kind.from_pretrained(tmp_path / str(number))
            inner = again.model if kind is HicoForConditionalGeneration else again
            torch.testing.assert_close(inner.encode(clips), saved.model.encode(clips), rtol=1e-3, atol=1e-3)


@BITS
def test_chat_with_a_quantized_model(folder, bits, tmp_path, capsys):
    quantized(folder, bits).save_pretrained(tmp_path)
    HicoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    write_moving_square(str(tmp_path / "square.mp4"), num_frames=30)
    arguments = ["--model", str(tmp_path), "--frames", "8", "--max-new-tokens", "4", "--device", "cpu"]
    assert main(["chat", str(tmp_path / "square.mp4"), "What?", *arguments, "--no-progress"]) == 0
    model, _ = load(str(tmp_path), device="cpu")
    assert model.is_quantized


@BITS
def test_adapters_on_a_quantized_llm_learn(folder, bits):
    pytest.importorskip("peft")
    model = quantized(folder, bits)
    tuned = add_lora(model, {"r": 4, "lora_alpha": 8}, trainable=["projector"]).train()
    ids = prompt(1, "v", 2, 3, 4)[None]
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    stored = model.model.language_model.layers[0].mlp.up_proj.base_layer.weight.clone()
    learned = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in learned)
    assert any("projector" in name for name in learned)
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)
    clips, losses = pixels(1, 4, 3, 48, 48), []
    for _ in range(4):
        loss = tuned(ids, pixel_values_videos=clips, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(model.model.language_model.layers[0].mlp.up_proj.base_layer.weight, stored)


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """What a stage with LoRA leaves: adapters, a projector that learned, a configuration of its own, a processor."""
    pytest.importorskip("peft")
    made = tmp_path_factory.mktemp("adapters")
    model = load_model(folder)
    tuned = add_lora(model, {"r": 2}, trainable=["projector"])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    tuned.save_pretrained(made)
    config = HicoConfig.from_pretrained(folder, drop_schedule="uniform@1:0.5")
    config.save_pretrained(made)
    HicoProcessor.from_pretrained(folder).save_pretrained(made)
    ids, clips = prompt(1, "v", 2, 3)[None], pixels(1, 4, 3, 48, 48)
    tuned.get_base_model().set_drop_schedule(config.drop_schedule)
    with torch.no_grad():
        logits = tuned.eval()(input_ids=ids, pixel_values_videos=clips).logits
    return made, {"input_ids": ids, "pixel_values_videos": clips}, logits


@torch.no_grad()
def test_adapters_load_with_the_model_below(adapters, folder):
    made, inputs, logits = adapters
    for kind in (HicoForConditionalGeneration, AutoModelForImageTextToText):
        model = kind.from_pretrained(made).eval()
        assert type(model) is HicoForConditionalGeneration
        assert not any("lora" in name for name in model.state_dict())
        assert model.name_or_path == str(made)
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    assert kind.from_pretrained(made, dtype=torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_adapters_without_a_configuration_take_that_of_the_model_below(adapters, tmp_path):
    made, inputs, logits = adapters
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(made / name, tmp_path / name)
    for kind in (HicoForConditionalGeneration, AutoModelForImageTextToText):
        model = kind.from_pretrained(tmp_path).eval()
        assert not any("lora" in name for name in model.state_dict())
        model.set_drop_schedule("uniform@1:0.5")
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-4)


def test_chat_with_a_result_of_adapters(adapters, tmp_path):
    write_moving_square(str(tmp_path / "square.mp4"), num_frames=30)
    arguments = ["--model", str(adapters[0]), "--frames", "8", "--max-new-tokens", "2", "--device", "cpu"]
    assert main(["chat", str(tmp_path / "square.mp4"), "What?", *arguments]) == 0


def test_adapters_that_cannot_be_merged_name_the_command_that_can(adapters):
    made = adapters[0]
    with pytest.raises(ValueError, match=rf"hico merge-lora {made} NEW"):
        HicoModel.from_pretrained(made)
    with pytest.raises(ValueError, match=rf"hico merge-lora {made} NEW"):
        HicoForConditionalGeneration.from_pretrained(made, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_adapters_whose_model_is_gone_say_where_it_was(adapters, tmp_path):
    shutil.copytree(adapters[0], tmp_path / "moved")
    config = tmp_path / "moved" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": "', '"base_model_name_or_path": "/gone'))
    with pytest.raises(FileNotFoundError, match=r"holds adapters for /gone.*which does not exist"):
        HicoForConditionalGeneration.from_pretrained(tmp_path / "moved")
