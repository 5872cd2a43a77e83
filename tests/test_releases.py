"""The released models: their files as they are, and what comes of them."""

import json
import re

import pytest
import torch
from helpers import SHARED_DATA
from published import tiny_llm, videochat_flash, write_checkpoint, write_tokenizer

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.convert import convert, inspect_checkpoint
from hico.published import LONGVA, VIDEOCHAT_FLASH, to_hico, to_hico_on_load, to_published, translate

RELEASES = SHARED_DATA.parent / "releases"


def grids(side: int) -> list[list[int]]:
    return [[columns * side, rows * side] for columns in range(1, 7) for rows in range(1, 7)]


FLASH_7B_448 = {
    "architectures": ["VideoChatFlashQwenForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_videochat_flash.VideoChatFlashQwenConfig",
        "AutoModel": "modeling_videochat_flash.VideoChatFlashQwenForCausalLM",
    },
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "frame_aspect_ratio": "square",
    "frame_grid_pinpoints": None,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_aspect_ratio": "anyres_nopad",
    "image_crop_resolution": None,
    "image_grid_pinpoints": grids(448),
    "image_split_resolution": None,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "llm_compress_layer_list": [24],
    "llm_compress_type": "attention",
    "llm_image_token_ratio_list": [1.0, 0.5],
    "max_num_pixels": 14745600000,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "min_slow_num_frames": 4,
    "mm_close_init": False,
    "mm_hidden_size": 1024,
    "mm_llm_compress": False,
    "mm_local_num_frames": 4,
    "mm_newline_position": "nothing",
    "mm_num_compress_latents": 128,
    "mm_num_compress_query_type": "learnable",
    "mm_patch_merge_type": "spatial_nopad",
    "mm_pos_num_frames": 8,
    "mm_projector_lr": None,
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "umt-hd-large",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "videochat_flash_qwen",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pos_skipping_range": 4096,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "use_sliding_window": False,
    "vision_encode_type": "video_image",
    "vision_tower_pretrained": None,
    "vocab_size": 152064,
}
FLASH_2B_448 = {
    **FLASH_7B_448,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_window_layers": 21,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
FLASH_7B_1M = {
    **FLASH_7B_448,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
    "image_grid_pinpoints": grids(224),
    "llm_compress_layer_list": [8, 16, 24],
    "llm_image_token_ratio_list": [1.0, 0.5, 0.25, 0.125],
    "max_position_embeddings": 1010000,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_tower": "umt-large",
    "model_type": "qwen2",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000.0,
    "sliding_window": 32768,
    "transformers_version": "4.39.2",
}
FLASH = {
    "videochat-flash-7b-448": FLASH_7B_448,
    "videochat-flash-2b-448": FLASH_2B_448,
    "videochat-flash-7b-1m": FLASH_7B_1M,
}
LONGVA_DPO = {
    "model_type": "llava_qwen",
    "architectures": ["LlavaQwenForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e9,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "unires",
    "mm_resampler_type": "spatial_pool",
    "mm_spatial_pool_stride": 2,
    "mm_spatial_pool_mode": "average",
    "use_mm_proj": True,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
each_release = pytest.mark.parametrize("name", FLASH)


@each_release
def test_the_configurations_here_are_those_of_the_releases(name):
    path = RELEASES / name / "config.json"
    if not path.is_file():
        pytest.skip("the files of the releases are not here")
    assert json.loads(path.read_text()) == FLASH[name]


@each_release
def test_every_key_of_a_release_is_understood(name):
    release = FLASH[name]
    found = translate(release)
    assert (found.system, found.unknown) == (VIDEOCHAT_FLASH, {})
    assert all(found.ignored.values())
    assert found.ignored.keys() >= {"max_num_pixels", "min_slow_num_frames"}
    config = HicoConfig(**found.config)
    text = config.text_config
    assert text.model_type == "qwen2"
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": release["rope_theta"]}
    for key in ("rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_size", "tie_word_embeddings"):
        assert getattr(text, key) == release[key]
    assert set(text.layer_types) == {"full_attention"}
    assert config.tie_word_embeddings == release["tie_word_embeddings"]
    assert config.encoder["image_size"] == (224 if name.endswith("1m") else 448)
    assert config.drop_schedule is None
    assert found.processor == {
        "time_message": "chat",
        "video": {
            "mode": "dynamic_fps1",
            "min_frames": 64,
            "max_frames": 512,
            "multiple_of": 8,
            "end_margin": 0.1,
            "scaler": "exact",
        },
        "image_tiling": "anyres_nopad",
    }


def test_the_tensors_of_a_release_are_all_named_and_counted():
    with torch.device("meta"):
        model = HicoForConditionalGeneration(HicoConfig(**translate(FLASH_7B_448).config))
    ours = model.state_dict()
    names = {to_published(name, VIDEOCHAT_FLASH, "umt"): weight for name, weight in ours.items()}
    assert len(names) == 646
    assert sum(2 * weight.numel() for weight in names.values()) == 15_845_235_712
    assert {to_hico(name, VIDEOCHAT_FLASH) for name in names} == ours.keys()
    assert {to_hico_on_load(name) for name in names} == ours.keys()
    index = RELEASES / "videochat-flash-7b-448" / "model.safetensors.index.json"
    if index.is_file():
        assert json.loads(index.read_text())["weight_map"].keys() == names.keys()


def test_longva_dpo_names_a_resampler_that_has_no_weights():
    found = translate(LONGVA_DPO)
    assert (found.system, found.unknown) == (LONGVA, {})
    config = HicoConfig(**found.config)
    assert config.compressor == {"name": "pooling", "stride": 2, "mode": "average"}
    assert config.text_config.rope_parameters["rope_theta"] == 1e9
    assert found.processor == {
        "time_message": None,
        "video": {"mode": "linspace", "num_frames": 32, "bounds": "published", "fit": "crop", "scaler": "exact"},
        "image_tiling": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],
    }


def tiny_release(name: str, folder):
    """Write a tiny checkpoint under the keys of a release; only sizes are its own."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    own = {*sizes, "vocab_size", "torch_dtype", "eos_token_id", "bos_token_id", "mm_hidden_size"}
    keys = {key: value for key, value in FLASH[name].items() if key not in own}
    llm = tiny_llm(**{key: keys[key] for key in ("rope_theta", "rms_norm_eps", "tie_word_embeddings")})
    config, weights = videochat_flash(llm, **{**keys, "image_grid_pinpoints": grids(128), "mm_hidden_size": 24})
    if keys["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    folder = write_checkpoint(folder, config, weights, num_shards=2)
    write_tokenizer(folder)
    return folder


@each_release
@torch.no_grad()
def test_a_tiny_release_loads_as_it_is_and_answers_a_second_turn(name, tmp_path):
    folder = tiny_release(name, tmp_path / "release")
    assert not inspect_checkpoint(folder).unknown
    convert(folder, tmp_path / "hico")
    model = HicoForConditionalGeneration.from_pretrained(folder)
    again = HicoForConditionalGeneration.from_pretrained(tmp_path / "hico")
    assert model.config.text_config.rms_norm_eps == FLASH[name]["rms_norm_eps"]
    assert model.config.tie_word_embeddings == FLASH[name]["tie_word_embeddings"]
    frames = torch.randint(256, (8, 3, 30, 40), dtype=torch.uint8)
    messages = [
        {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Why?"},
    ]
    prompts = []
    for source, read in ((folder, model), (tmp_path / "hico", again)):
        processor = HicoProcessor.from_pretrained(source)
        assert processor.time_message == "chat"
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=True,
            video_metadata={"total_num_frames": 240, "fps": 30.0, "frames_indices": list(range(0, 240, 30))},
        )
        prompts.append((inputs["input_ids"], read(**inputs).logits))
    assert torch.equal(prompts[0][0], prompts[1][0])
    torch.testing.assert_close(prompts[0][1], prompts[1][1])
    assert processor.decode(inputs["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + "<|video_pad|>" * 128 + "\n"
        "The video lasts for 8.00 seconds, and 8 frames are uniformly sampled from it. What?<|im_end|>\n"
        "<|im_start|>assistant\nThat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_released_tokenizer_writes_the_prompt_of_a_chat():
    folder = RELEASES / "videochat-flash-7b-448"
    if not (folder / "vocab.json").is_file():
        pytest.skip("the files of the releases are not here")
    processor = HicoProcessor.from_pretrained(folder)
    content = [{"type": "video", "video": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}]
    content.append({"type": "text", "text": "What is shown?"})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        video_metadata={"total_num_frames": 4, "fps": 1.0},
    )
    ids = inputs["input_ids"][0].tolist()
    assert len(processor.tokenizer) == 151648  # its own 151,646 and the placeholders
    video_id = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    sentence = "The video lasts for 4.00 seconds, and 4 frames are uniformly sampled from it. What is shown?"
    newline, start, end = 198, 151644, 151645
    encode = processor.tokenizer.encode
    assert ids == [
        *(start, *encode("system"), newline, *encode("You are a helpful assistant."), end, newline),
        *(start, *encode("user"), newline, *[video_id] * 64, newline, *encode(sentence), end, newline),
        *(start, *encode("assistant"), newline),
    ]


OTHERS = {
    "LLaVA-OneVision": {
        "model_type": "llava",
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    },
    "LLaVA-Video": {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "grid",
        "mm_spatial_pool_mode": "bilinear",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    },
    "InternVideo2.5": {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "vision_config": {}},
    "VideoChat-R1": {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
    "llava_onevision": {"model_type": "llava_onevision", "architectures": ["LlavaOnevisionForConditionalGeneration"]},
    "LLM": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2},
    "tower": {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]},
    "nobody": {"model_type": "new_thing", "architectures": "NewThing", "layers": 3},
    "no projector": {"model_type": "llava_qwen", "mm_vision_tower": "clip-vit-large-patch14-336"},
}
SAID = {
    "LLaVA-OneVision": r"By its config\.json it is a 'llava' \(LlavaQwenForCausalLM\), of the family of LLaVA-One",
    "LLaVA-Video": r"a 'llava_qwen' \(LlavaQwenForCausalLM\), of the family of LLaVA-OneVision and LLaVA-Video",
    "InternVideo2.5": r"a 'internvl_chat' \(InternVLChatModel\), of the family of InternVL, as InternVideo2\.5 is",
    "VideoChat-R1": r"a 'qwen2_5_vl' .*, which transformers runs by itself, .* Load it with AutoProcessor and",
    "llava_onevision": r"a 'llava_onevision' \(LlavaOnevisionForConditionalGeneration\), which transformers runs",
    "LLM": r"a 'qwen2' \(Qwen2ForCausalLM\), an LLM alone\. `hico convert DIR NEW --encoder FILE`",
    "tower": r"a 'clip_vision_model' \(CLIPVisionModel\), a vision tower alone\. `hico convert LLM NEW --encoder DIR`",
    "nobody": "a 'new_thing', in no layout that hico reads, which are its own",
    "no projector": "mm_projector_type is None .* a 'llava_qwen', in no layout that hico reads",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_family_is_named(name, tmp_path):
    folder = write_checkpoint(tmp_path / "other", OTHERS[name], {"weight": torch.zeros(1)})
    write_tokenizer(folder)
    for load in (HicoConfig, HicoForConditionalGeneration, HicoProcessor):
        with pytest.raises(ValueError, match=SAID[name]):
            load.from_pretrained(folder)


@pytest.mark.parametrize("name", ["LLaVA-Video", "InternVideo2.5", "VideoChat-R1", "nobody"])
def test_inspection_says_what_another_folder_is(name, tmp_path):
    folder = write_checkpoint(tmp_path / "other", OTHERS[name], {"weight": torch.zeros(1)})
    assert re.search(SAID[name], inspect_checkpoint(folder).fault)
    with pytest.raises(ValueError, match=SAID[name]):
        convert(folder, tmp_path / "new")
