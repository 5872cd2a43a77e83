"""Published checkpoints in and out: what is loaded, written, prompted and reported."""

import json
import tracemalloc

import pytest
import torch
from published import longva, tiny_clip, tiny_llm, videochat_flash, write_checkpoint, write_tokenizer
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from hico import HicoConfig, HicoForConditionalGeneration, HicoModel, HicoProcessor
from hico.cli import main
from hico.convert import convert, inspect_checkpoint
from hico.demo import write_moving_square
from hico.shards import iterate_shards


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: shard.load(name) for shard in iterate_shards(folder) for name in shard.tensors}


def same_weights(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def reference_logits(llm, tower, projector, ids, at, tiles):
    """Compute LongVA's logits from its parts: layer -2 of CLIP, MLP, 2 x 2 average, tokens in place of one."""
    features = tower(tiles, output_hidden_states=True).hidden_states[-2][:, 1:]
    maps = projector(features).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    visual = nn.functional.avg_pool2d(maps, 2).flatten(2).permute(0, 2, 1).flatten(0, 1)
    embeds = llm.get_input_embeddings()(ids)
    return llm(inputs_embeds=torch.cat([embeds[:at], visual, embeds[at:]])[None]).logits


@pytest.mark.parametrize("route", ["direct", "converted", "back", "saved"])
@torch.no_grad()
def test_longva_gives_the_logits_of_its_parts(tmp_path, route):
    llm, tower = tiny_llm(), tiny_clip()
    projector = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32))
    folder = write_checkpoint(tmp_path / "longva", *longva(llm, tower, projector), num_shards=3)
    if route in ("converted", "back"):
        report = convert(folder, tmp_path / "hico")
        assert {drop.reason for drop in report.plan.drops} == {"the encoder does not run it"}
        folder = tmp_path / "hico"
    if route == "back":
        convert(folder, tmp_path / "back", to="published")
        folder = tmp_path / "back"
    model = HicoForConditionalGeneration.from_pretrained(folder)
    if route == "saved":
        model.save_pretrained(tmp_path / "saved")
        model = HicoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    model, llm, tower, projector = (module.double() for module in (model, llm, tower, projector))
    ids, frames = torch.arange(10), torch.randn(3, 3, 16, 16).double()
    visual = ids.new_full((3 * 4,), model.config.video_token_id)
    prompt = torch.cat([ids[:4], visual, ids[4:]])[None]
    logits = model(prompt, pixel_values_videos=frames[:, None]).logits
    torch.testing.assert_close(logits, reference_logits(llm, tower, projector, ids, 4, frames))
    tiles = torch.randn(3, 3, 16, 16).double()
    prompt = prompt.masked_fill(prompt == model.config.video_token_id, model.config.image_token_id)[:, 4:]
    logits = model(prompt, pixel_values=torch.cat([frames[:1], tiles]), image_grids=torch.tensor([[1, 3]])).logits
    torch.testing.assert_close(logits, reference_logits(llm, tower, projector, ids[4:], 0, tiles))


def test_what_is_loaded_directly_is_what_is_converted(flash, tmp_path):
    convert(flash, tmp_path / "hico")
    direct = HicoForConditionalGeneration.from_pretrained(flash)
    converted = HicoForConditionalGeneration.from_pretrained(tmp_path / "hico")
    assert same_weights(direct, converted)
    one, other = direct.config.to_dict(), converted.config.to_dict()
    for volatile in ("architectures", "_name_or_path"):
        one.pop(volatile), other.pop(volatile)
    assert one == other
    assert HicoConfig.from_pretrained(flash).to_dict() == HicoConfig.from_pretrained(flash).to_dict()
    bare, info = HicoModel.from_pretrained(flash, output_loading_info=True)
    assert same_weights(bare, direct.model)
    assert not info["missing_keys"]


def test_files_of_several_shards_and_dtypes_survive_a_round_trip(tmp_path):
    config, weights = videochat_flash(tiny_llm(), image_aspect_ratio="anyres_nopad", torch_dtype="bfloat16")
    weights = {name: w if name.endswith("norm.weight") else w.bfloat16() for name, w in weights.items()}
    folder = write_checkpoint(tmp_path / "flash", config, weights, num_shards=3)
    write_tokenizer(folder)
    for source, target, layout in (("flash", "one", "hico"), ("one", "back", "published"), ("back", "two", "hico")):
        convert(tmp_path / source, tmp_path / target, to=layout)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert "model-00003-of-00003.safetensors" in one


def test_a_saved_model_has_our_names_however_it_was_loaded(flash, tmp_path):
    HicoForConditionalGeneration.from_pretrained(flash).save_pretrained(tmp_path / "saved")
    convert(flash, tmp_path / "hico")
    assert tensors(tmp_path / "saved").keys() == tensors(tmp_path / "hico").keys()


@pytest.mark.parametrize("how", ["direct", "converted"])
def test_the_processor_writes_the_published_prompt(flash, tmp_path, how):
    if how == "converted":
        convert(flash, tmp_path / "hico")
        flash = tmp_path / "hico"
    processor = HicoProcessor.from_pretrained(flash)
    model = HicoForConditionalGeneration.from_pretrained(flash)
    frames = torch.randint(256, (8, 3, 30, 40), dtype=torch.uint8)
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What happens?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        video_metadata={"total_num_frames": 8, "fps": 1.0},
    )
    assert processor.decode(inputs["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + "<|video_pad|>" * 128 + "\n"
        "The video lasts for 8.00 seconds, and 8 frames are uniformly sampled from it. What happens?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 128
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert processor.time_message == "chat"
    assert processor.video["multiple_of"] == 8


def test_longva_is_prompted_without_times_and_sampled_from_end_to_end(tmp_path):
    projector = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32))
    folder = write_checkpoint(tmp_path / "longva", *longva(tiny_llm(), tiny_clip(), projector))
    write_tokenizer(folder)
    convert(folder, tmp_path / "hico")
    for processor in (HicoProcessor.from_pretrained(folder), HicoProcessor.from_pretrained(tmp_path / "hico")):
        frames = torch.randint(256, (3, 3, 30, 40), dtype=torch.uint8)
        content = [{"type": "video", "video": frames}, {"type": "text", "text": "Why?"}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
        assert "user\n" + "<|video_pad|>" * 12 + "\nWhy?<|im_end|>" in processor.decode(inputs["input_ids"][0])
        sampled = {"mode": "linspace", "num_frames": 32, "bounds": "published", "fit": "crop", "scaler": "exact"}
        assert processor.video == sampled
        assert processor.video_settings({"num_frames": 16}) == {**processor.video, "num_frames": 16}
        assert processor.image_tiling == "unires"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e9},
        {"rope_theta": 1e7, "max_position_embeddings": 1010000, "dual_chunk_attention_config": {"chunk_size": 262144}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
    ids=["theta", "1M", "yarn"],
)
@torch.no_grad()
def test_long_context_settings_give_the_logits_of_the_llm(tmp_path, rope):
    modern = {key: value for key, value in rope.items() if key != "dual_chunk_attention_config"}
    llm = tiny_llm(**modern)
    folder = write_checkpoint(tmp_path / "flash", *videochat_flash(llm, **rope))
    convert(folder, tmp_path / "hico")
    ids = torch.randint(255, (1, 60))
    for path in (folder, tmp_path / "hico"):
        model = HicoForConditionalGeneration.from_pretrained(path)
        torch.testing.assert_close(model(ids).logits, llm(ids).logits)
    plain = tiny_llm(**{key: value for key, value in modern.items() if key == "max_position_embeddings"})
    plain.load_state_dict(llm.state_dict())
    assert not torch.allclose(plain(ids).logits, llm(ids).logits)


def test_chat_takes_a_published_checkpoint(flash, tmp_path, capsys):
    clip = tmp_path / "square.mp4"
    write_moving_square(str(clip), num_frames=30)
    arguments = ["--model", str(flash), "--frames", "8", "--max-new-tokens", "4", "--device", "cpu", "--no-progress"]
    assert main(["chat", str(clip), "What?", *arguments]) == 0
    first = capsys.readouterr().out
    convert(flash, tmp_path / "hico")
    assert main(["chat", str(clip), "What?", "--model", str(tmp_path / "hico"), *arguments[2:]]) == 0
    assert capsys.readouterr().out == first


def test_files_of_the_tokenizer_and_generation_settings_go_along(flash, tmp_path):
    (flash / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    convert(flash, tmp_path / "hico")
    convert(tmp_path / "hico", tmp_path / "back", to="published")
    for folder in (tmp_path / "hico", tmp_path / "back"):
        assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.7
        assert (folder / "tokenizer.json").is_file()
    assert HicoProcessor.from_pretrained(tmp_path / "back").tokenizer("abc").input_ids == [97, 98, 99]


def test_a_tokenizer_of_vocabulary_and_merges_goes_along(flash, tmp_path):
    vocabulary = json.loads((flash / "tokenizer.json").read_text())["model"]["vocab"]
    for path in flash.glob("*token*"):
        path.unlink()
    (flash / "vocab.json").write_text(json.dumps({**vocabulary, "he": 256}))
    (flash / "merges.txt").write_text("#version: 0.2\nh e\n")
    added = {str(n): {"content": text, "special": True} for n, text in ((257, "<|im_start|>"), (258, "<|im_end|>"))}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (flash / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(flash, tmp_path / "hico")
    tokenizer = HicoProcessor.from_pretrained(tmp_path / "hico").tokenizer
    assert tokenizer("<|im_start|>hex<|im_end|>").input_ids == [257, 256, ord("x"), 258]
    config = HicoConfig.from_pretrained(tmp_path / "hico")
    ids = tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|image_pad|>"])
    assert ids == [config.video_token_id, config.image_token_id]
    assert min(ids) > 258


def test_without_a_tokenizer_no_processor_is_written_and_the_report_says_so(flash, tmp_path):
    for path in flash.glob("*token*"):
        path.unlink()
    report = convert(flash, tmp_path / "hico")
    assert "no processor was written" in report.table()
    assert not (tmp_path / "hico" / "processor_config.json").exists()
    with pytest.raises(ValueError, match="has no tokenizer; put the files"):
        HicoProcessor.from_pretrained(flash)


def test_settings_of_the_processor_that_the_published_layout_lacks_are_reported(flash, tmp_path):
    config = json.loads((flash / "config.json").read_text())
    (flash / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": "anyres_nopad"}))
    convert(flash, tmp_path / "hico")
    assert not convert(tmp_path / "hico", tmp_path / "same", to="published").notes
    processor = HicoProcessor.from_pretrained(tmp_path / "hico")
    processor.time_message, processor.video = None, {"mode": "linspace", "num_frames": 16}
    processor.save_pretrained(tmp_path / "hico")
    notes = convert(tmp_path / "hico", tmp_path / "other", to="published").notes
    assert [note.partition(";")[0] for note in notes] == [
        "the published layout has no place for the processor's time_message None",
        "the published layout has no place for the processor's video {'mode': 'linspace', 'num_frames': 16}",
    ]


@pytest.mark.parametrize("tiling", ["single", "unires", [(2, 1), (1, 3)]])
def test_the_tiling_of_the_processor_survives_a_round_trip(flash, tmp_path, tiling):
    convert(flash, tmp_path / "hico")
    processor = HicoProcessor.from_pretrained(tmp_path / "hico")
    processor.image_tiling = tiling
    processor.save_pretrained(tmp_path / "hico")
    assert not convert(tmp_path / "hico", tmp_path / "published", to="published").notes
    again = HicoProcessor.from_pretrained(tmp_path / "published").image_tiling
    assert again == tiling


@pytest.mark.parametrize("stored", [True, False])
def test_tied_embeddings_are_stored_once(tmp_path, stored):
    llm = tiny_llm(tie_word_embeddings=True)
    config, weights = videochat_flash(llm, tie_word_embeddings=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if not stored:
        del weights["lm_head.weight"]
    folder = write_checkpoint(tmp_path / "flash", config, weights)
    report = convert(folder, tmp_path / "hico")
    assert [drop.name for drop in report.plan.drops] == ["lm_head.weight"] * stored
    for path in (folder, tmp_path / "hico"):
        model = HicoForConditionalGeneration.from_pretrained(path)
        assert model.lm_head.weight is model.get_input_embeddings().weight
    convert(tmp_path / "hico", tmp_path / "back", to="published")
    assert "lm_head.weight" not in tensors(tmp_path / "back")


def test_tied_weights_are_compared_without_holding_them(tmp_path):
    sizes = {"vocab_size": 100_000, "tie_word_embeddings": True}
    config, weights = videochat_flash(tiny_llm(**sizes), **sizes)
    folder = write_checkpoint(tmp_path / "flash", config, weights, num_shards=2)
    tracemalloc.start()
    report = convert(folder, tmp_path / "hico")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [drop.name for drop in report.plan.drops] == ["lm_head.weight"]
    assert peak < weights["lm_head.weight"].nbytes


@pytest.mark.parametrize("name", [".", "new/..", "link"])
def test_the_target_may_be_any_name_of_an_empty_folder(flash, tmp_path, monkeypatch, name):
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    monkeypatch.chdir(tmp_path if name == "link" else target)
    convert(flash, name)
    HicoForConditionalGeneration.from_pretrained(target)


def test_auto_classes_load_what_was_converted(flash, tmp_path):
    convert(flash, tmp_path / "hico")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hico")
    assert same_weights(model, HicoForConditionalGeneration.from_pretrained(flash))
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "hico"), HicoProcessor)


def test_inspect_says_what_a_checkpoint_is(flash, tmp_path, capsys):
    convert(flash, tmp_path / "hico")
    convert(tmp_path / "hico", tmp_path / "back", to="published")
    model = HicoForConditionalGeneration.from_pretrained(flash)
    for folder, kind in (
        (flash, "videochat-flash"),
        (tmp_path / "hico", "hico"),
        (tmp_path / "back", "videochat-flash"),
    ):
        found = inspect_checkpoint(folder)
        assert (found.kind, found.fault, found.unknown) == (kind, None, {})
        assert found.num_parameters == {
            "LM head": model.lm_head.weight.numel(),
            "LLM": sum(weight.numel() for weight in model.model.language_model.parameters()),
            "projector": sum(weight.numel() for weight in model.model.projector.parameters()),
            "encoder": sum(weight.numel() for weight in model.model.encoder.parameters()),
        }
        assert found.facts["encoder"].startswith("umt (")
        assert found.facts["compressor"] == "token_merge (tokens_per_frame 16, tokens_per_image 64)"
        assert found.facts["clip"] == "4 frames of 128 px, 64 tokens"
        assert found.facts["context"] == "4096 tokens"
        assert found.facts["drop schedule"] == "none"
        assert found.dtypes == {"F32": len(model.state_dict())}
    assert main(["inspect", str(flash)]) == 0
    printed = capsys.readouterr().out
    assert f"{sum(found.num_parameters.values()):,}" in printed
    assert "4 heads (2 key-value)" in printed


def test_the_table_says_what_became_of_every_tensor_and_key(flash, tmp_path, capsys):
    config = json.loads((flash / "config.json").read_text())
    (flash / "config.json").write_text(json.dumps({**config, "novelty": 7, "mm_projector_lr": 1e-5}))
    assert main(["convert", str(flash), str(tmp_path / "hico")]) == 0
    table = capsys.readouterr().out
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert "model.language_model.layers.0-1.self_attn.q_proj.bias" in rows["model.layers.0-1.self_attn.q_proj.bias"]
    assert "2 x [32] F32" in rows["model.layers.0-1.self_attn.q_proj.bias"]
    assert "model.projector.mlp.0,2.bias" in rows["model.mm_projector.mlp.0,2.bias"]
    assert "not known, no effect: 7" in rows["novelty"]
    assert "not used: sets training, not the model" in rows["mm_projector_lr"]
    assert table.splitlines()[-1].endswith("tensors, 0.00 GB")
    assert "videochat-flash" in table.splitlines()[-1]


def test_a_report_of_an_unknown_key_is_logged_once(flash, caplog):
    config = json.loads((flash / "config.json").read_text())
    (flash / "config.json").write_text(json.dumps({**config, "novelty": 7}))
    for _ in range(2):
        HicoConfig.from_pretrained(flash)
    assert [record.getMessage() for record in caplog.records if "novelty" in record.getMessage()] == [
        f"{flash}: keys that are not known have no effect: {{'novelty': 7}}"
    ]
