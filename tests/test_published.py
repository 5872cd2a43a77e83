"""Configurations of the published systems in our words."""

import json

import pytest
import torch
from helpers import golden_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from hico import HicoConfig
from hico.configuration_hico import PRESETS
from hico.convert.export import export_config
from hico.grids import anyres_grids, unires_grids
from hico.published import (
    KEY_MAPPING,
    LONGVA,
    SIZES_KEY,
    SYSTEMS,
    VIDEOCHAT_FLASH,
    is_published,
    system_of,
    to_hico,
    to_hico_on_load,
    to_published,
    translate,
)
from hico.sampling import sample_frames

FLASH = {
    "model_type": "videochat_flash_qwen",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "mm_vision_tower": "umt-hd-large",
    "mm_projector_type": "tome16_mlp_hd64",
}
LONGVA_CONFIG = {
    "model_type": "llava_qwen",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "unires",
}


def meaning(config: HicoConfig) -> dict:
    """Return what a configuration says, with the defaults of its parts filled in."""
    described = config.to_dict()
    for volatile in ("architectures", "_name_or_path", "transformers_version", "dtype"):
        described.pop(volatile, None)
        described["text_config"].pop(volatile, None)
    encoder, compressor, _ = config.vision._parts
    described["encoder"] = {**vars(encoder), "name": config.encoder["name"], "_modules": str(encoder)}
    described["compressor"] = {**vars(compressor), "name": config.compressor["name"]}
    return {key: str(value) for key, value in described.items()}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_presets_survive_the_published_layout(name):
    preset = HicoConfig.preset(name)
    system, published = export_config(preset)
    assert system_of(published) == system
    found = translate(json.loads(json.dumps(published)))
    assert not found.unknown
    assert SIZES_KEY not in published
    assert meaning(HicoConfig(**found.config)) == meaning(preset)


@pytest.mark.parametrize(
    ("name", "tile", "num_grids", "tiling"),
    [("videochat-flash-7b-448", 448, 36, "anyres_nopad"), ("longva-7b", 336, len(unires_grids()), "unires")],
)
def test_the_grids_of_images_are_written_in_pixels(name, tile, num_grids, tiling):
    _, published = export_config(HicoConfig.preset(name))
    sizes = published["image_grid_pinpoints"]
    assert len(sizes) == num_grids
    assert sizes[0] == [tile, tile * (1 if tiling == "anyres_nopad" else 2)]
    assert translate(published).processor["image_tiling"] == tiling


@pytest.mark.golden
@pytest.mark.parametrize("case", [case for case in golden_cases("E") if case.facts], ids=lambda case: case.name)
def test_golden_configurations_are_understood_key_by_key(case):
    config = case.facts
    found = translate(config)
    assert found.system == VIDEOCHAT_FLASH
    assert not found.unknown
    assert all(found.ignored.values())
    sizes = config[SIZES_KEY]
    encoder = HicoConfig(**found.config).encoder
    assert (encoder["image_size"], encoder["hidden_size"]) == (sizes["img"], sizes["dim"])
    assert (encoder["depth"], encoder["num_heads"]) == (sizes["depth"], sizes["heads"])


@pytest.mark.parametrize(("tower", "size"), [("umt-hd-large", 448), ("umt-large", 224), ("UMT-HD", 448)])
def test_the_name_of_the_tower_says_its_resolution(tower, size):
    assert translate({**FLASH, "mm_vision_tower": tower}).config["encoder"]["image_size"] == size


@pytest.mark.parametrize(
    ("tower", "name"),
    [("umt/openai/clip-vit-large-patch14-336", "clip"), ("internvideo2/siglip-so400m-patch14-384", "siglip")],
)
def test_frame_encoders_are_found_first_whatever_their_folder_is_called(tower, name):
    assert translate({**FLASH, "mm_vision_tower": tower}).config["encoder"]["name"] == name


@pytest.mark.parametrize("tower", ["internvideo2", "InternVideo2-1B", "internvideo2-umt-hd"])
def test_internvideo2_is_always_the_tower_of_224_pixels(tower):
    keys = {"mm_vision_tower": tower, "mm_vision_select_layer": -2, "mm_hidden_size": 1408, "mm_local_num_frames": 4}
    found = translate({**FLASH, **keys})
    assert found.config["encoder"] == {"name": "internvideo2", "image_size": 224, "return_index": -2}
    assert not found.unknown
    config = HicoConfig(**found.config)
    assert config.vision.num_video_tokens(4) == config.vision.num_image_tokens() == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"mm_vision_tower": "resnet"},
            "mm_vision_tower is 'resnet', which hico cannot run; it knows names with clip-vit-large-patch14-336, clip",
        ),
        (
            {"mm_projector_type": "qformer"},
            "mm_projector_type is 'qformer' .* it knows 'tome16_mlp_hd64', 'mlp2x_gelu'",
        ),
        ({"mm_projector_type": ["x"]}, r"mm_projector_type is \['x'\]"),
        ({"mm_patch_merge_type": "unpad"}, "mm_patch_merge_type is 'unpad'"),
        ({"mm_newline_position": "grid"}, "mm_newline_position is 'grid'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_local_num_frames": -1}, "mm_local_num_frames is -1, which merges all frames of a video together"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"model_type": "llava_llama"}, "model_type is 'llava_llama'"),
        ({"mm_llm_compress": True, "llm_compress_type": "magic"}, "unknown llm_compress_type 'magic'"),
        ({SIZES_KEY: {"img": 96, "wings": 2}}, r"has \['wings'\]; it may have img, dim"),
        ({"mm_local_num_frames": "4"}, "mm_local_num_frames is '4' .* a number, such as 4"),
        ({"rope_scaling": 3}, "rope_scaling is 3 .* a mapping"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x' .* a mapping"),
        (
            {"mm_llm_compress": True, "llm_compress_type": []},
            r"llm_compress_type is \[\] .* a text, such as 'attention'",
        ),
        ({"mm_llm_compress": True, "llm_compress_layer_list": 8}, "llm_compress_layer_list is 8 .* a list"),
        ({"torch_dtype": "float99"}, "dtype is 'float99', which torch has not"),
        ({SIZES_KEY: [1]}, r"is \[1\] in this checkpoint, but it must be a mapping"),
        ({SIZES_KEY: {"dim": 64}, "mm_hidden_size": 1024}, "mm_hidden_size is 1024, but .* 64 wide"),
    ],
)
def test_what_hico_cannot_run_is_named_with_what_it_can(change, words):
    with pytest.raises(ValueError, match=words):
        translate({**FLASH, **change})


def test_an_llm_that_cannot_be_is_one_clear_error():
    with pytest.raises(ValueError, match="text_config has the model_type 'qwen9', which"):
        HicoConfig(text_config={"model_type": "qwen9"})
    with pytest.raises(ValueError, match=r"text_config does not describe a 'qwen2': .*num_hidden_layers"):
        HicoConfig(**translate({**FLASH, "num_hidden_layers": "many"}).config)


def test_every_key_is_used_ignored_for_a_reason_or_reported():
    config = {**FLASH, "mm_projector_lr": 1e-5, "auto_map": {"AutoModel": "evil.Model"}, "brand_new": [1]}
    found = translate(config)
    assert found.unknown == {"brand_new": [1]}
    assert found.ignored.keys() == {"mm_projector_lr", "auto_map"}


def test_an_unknown_tiling_is_reported_and_the_usual_one_taken():
    found = translate({**FLASH, "image_aspect_ratio": "pad"})
    assert found.unknown == {"image_aspect_ratio": "pad"}
    assert found.processor["image_tiling"] == "anyres_nopad"
    found = translate({**FLASH, "image_aspect_ratio": "anyres_nopad", "image_grid_pinpoints": [[448, 449]]})
    assert found.unknown == {"image_grid_pinpoints": [[448, 449]]}
    assert found.processor["image_tiling"] == "anyres_nopad"
    assert translate({**FLASH, "image_aspect_ratio": [1]}).unknown == {"image_aspect_ratio": [1]}


@pytest.mark.parametrize("pinpoints", [3, [1], ["ab"], [[0, 0]], "(0x0),...,(6x6)", [[448, None]], {"a": 1}])
def test_pinpoints_that_are_none_are_reported(pinpoints):
    found = translate({**FLASH, "image_aspect_ratio": "anyres_nopad", "image_grid_pinpoints": pinpoints})
    assert found.unknown == {"image_grid_pinpoints": pinpoints}
    assert found.processor["image_tiling"] == "anyres_nopad"


@pytest.mark.parametrize(
    ("pinpoints", "tiling"),
    [
        ([[448 * columns, 448 * rows] for columns, rows in anyres_grids()], "anyres_nopad"),
        ("(1x1),...,(6x6)", "anyres_nopad"),
        ([[896, 448], [448, 896]], [(2, 1), (1, 2)]),
        ("[(896, 448), (448, 896)]", [(2, 1), (1, 2)]),
        ([[448 * columns, 448 * rows] for columns, rows in unires_grids()], "unires"),
        (None, "anyres_nopad"),
    ],
)
def test_pinpoints_become_grids(pinpoints, tiling):
    config = {**FLASH, "image_aspect_ratio": "anyres_nopad", "image_grid_pinpoints": pinpoints}
    found = translate(config)
    assert found.processor["image_tiling"] == tiling
    assert not found.unknown


def test_the_drop_schedule_counts_only_where_it_is_on():
    schedule = {
        "llm_compress_type": "uniform0_attention",
        "llm_compress_layer_list": [4, 18],
        "llm_image_token_ratio_list": [1.0, 0.75, 0.25],
    }
    assert translate({**FLASH, "mm_llm_compress": True, **schedule}).config["drop_schedule"] == (
        "uniform@4:0.75,attention@18:0.25"
    )
    found = translate({**FLASH, "mm_llm_compress": False, **schedule})
    assert found.config["drop_schedule"] is None
    assert found.ignored.keys() >= schedule.keys()


@given(
    kind=st.sampled_from(["uniform", "attention", "uniform0_attention", "uniform1_attention"]),
    layers=st.lists(st.integers(1, 27), min_size=1, max_size=5, unique=True).map(sorted),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_drop_schedules_survive_the_published_layout(kind, layers, data):
    ratios = sorted(data.draw(st.lists(st.floats(0.01, 1), min_size=len(layers), max_size=len(layers))), reverse=True)
    keys = {
        "mm_llm_compress": True,
        "llm_compress_type": kind,
        "llm_compress_layer_list": layers,
        "llm_image_token_ratio_list": [1.0, *ratios],
    }
    first = HicoConfig(**translate({**FLASH, **keys}).config)
    again = HicoConfig(**translate(export_config(first)[1]).config)
    assert again.drop_schedule == first.drop_schedule


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 1e7, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 1e7}),
        (
            {
                "rope_theta": 1e6,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e6},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}},
            {"rope_type": "default", "rope_theta": 1e9},
        ),
    ],
)
def test_rope_settings_survive_the_published_layout(keys, rope):
    first = HicoConfig(**translate({**FLASH, **keys}).config)
    assert first.text_config.rope_parameters == rope
    published = export_config(first)[1]
    assert ("rope_scaling" in published) == (rope["rope_type"] != "default")
    assert HicoConfig(**translate(published).config).text_config.rope_parameters == rope


def test_attention_in_chunks_of_long_contexts_is_ignored_for_a_reason():
    found = translate({**FLASH, "dual_chunk_attention_config": {"chunk_size": 262144}})
    assert found.ignored == {"dual_chunk_attention_config": "attention is exact at any length"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"compressor": "identity"},
            "no published system has the compressor 'identity'; they have token_merge, pooling",
        ),
        ({"compressor": {"name": "token_merge", "order": "position"}}, "order of the compressor is 'position'"),
        ({"compressor": {"name": "token_merge", "tokens_per_frame": 8}}, "tokens_per_frame of the compressor is 8"),
        ({"image_layout": "tiles"}, "image_layout is 'tiles', which no published system has; it must be 'mosaic'"),
        ({"projector_first": True}, "projector_first is True"),
        ({"drop_schedule": "random@4:0.5"}, "no published system can drop by 'random@4:0.5'"),
        ({"drop_schedule": "fastv"}, "no published system can drop by 'attention@2:0.5:previous'"),
        ({"drop_schedule": "uniform@4:64"}, "no published system can drop by 'uniform@4:64'"),
        ({"drop_schedule": "attention@4:0.5,uniform@8:0.25"}, "no published system can drop"),
        ({"encoder": {"name": "umt", "tubelet_size": 2}}, "tubelet_size of the encoder is 2"),
        (
            {"encoder": "internvideo2", "clip_len": 8},
            "clip_len is 8, which no published system has; it must be 4",
        ),
        ({"text_config": {"model_type": "llama"}}, "run over Qwen2, not 'llama'"),
        ({"compressor": "pooling", "projector_first": True, "clip_len": 1}, "with pooling, LongVA has tiles, flat"),
    ],
)
def test_models_that_no_published_system_can_run_are_not_exported(change, words):
    with pytest.raises(ValueError, match=words):
        export_config(HicoConfig.preset("videochat-flash-7b-224", **change))


def test_other_configurations_are_not_taken_for_published_ones():
    assert not is_published(HicoConfig.preset("tiny").to_dict())
    assert not is_published({"model_type": "qwen2"})
    assert is_published(LONGVA_CONFIG)
    assert translate(LONGVA_CONFIG).system == LONGVA


TEXT_NAMES = ("lm_head.weight", "model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight")
TOWER_NAMES = {
    "umt": ("encoder.blocks.1.attn.q_bias", "encoder.patch_embed.proj.weight"),
    "clip": ("vision_model.encoder.layers.0.layer_norm1.bias", "vision_model.embeddings.class_embedding"),
    "siglip": ("vision_model.encoder.layers.0.layer_norm1.bias",),
    "internvideo2": ("cls_token", "img_pos_embed", "patch_embed.proj.weight", "blocks.1.ls2.weight"),
}
PROJECTOR_NAMES = {VIDEOCHAT_FLASH: "model.mm_projector.mlp.0.weight", LONGVA: "model.mm_projector.0.weight"}


def names_of(system: str, encoder: str) -> list[str]:
    towers = [f"model.vision_tower.vision_tower.{name}" for name in TOWER_NAMES[encoder]]
    return [*TEXT_NAMES, *towers, PROJECTOR_NAMES[system]]


def renamed_by_transformers(name: str) -> str:
    from transformers.core_model_loading import WeightRenaming

    for renaming in [WeightRenaming(source, target) for source, target in KEY_MAPPING.items()]:
        name, _ = renaming.rename_source_key(name)
    return name


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("encoder", TOWER_NAMES)
def test_names_go_there_and_back(system, encoder):
    names = names_of(system, encoder)
    ours = [to_hico(name, system) for name in names]
    assert [to_published(name, system, encoder) for name in ours] == names
    assert len(set(ours)) == len(names)
    beginnings = ("lm_head.", "model.language_model.", "model.encoder.", "model.projector.mlp.")
    assert all(name.startswith(beginnings) for name in ours)
    assert to_hico("optimizer.state", system) is None


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("encoder", TOWER_NAMES)
def test_transformers_renames_as_we_do(system, encoder):
    for name in names_of(system, encoder):
        assert renamed_by_transformers(name) == to_hico_on_load(name) == to_hico(name, system)
        assert renamed_by_transformers(to_hico(name, system)) == to_hico(name, system)


def test_scales_of_internvideo2_have_either_name():
    name = "model.vision_tower.vision_tower.blocks.38.ls1."
    ours = "model.encoder.blocks.38.ls1.weight"
    for scale in ("gamma", "weight"):
        assert to_hico(name + scale, VIDEOCHAT_FLASH) == renamed_by_transformers(name + scale) == ours
    assert to_published(ours, VIDEOCHAT_FLASH, "internvideo2") == name + "weight"
    for other in ("model.layers.3.gamma", "model.vision_tower.vision_tower.blocks.0.ls1.gamma.scale"):
        assert "gamma" in to_hico(other, VIDEOCHAT_FLASH)
        assert "gamma" in renamed_by_transformers(other)


def test_longva_samples_from_the_first_frame_to_the_last():
    num_frames, last = 7, 99
    expected = torch.linspace(0, last, num_frames).int().tolist()
    assert sample_frames(last + 1, 30.0, mode="linspace", num_frames=num_frames) == expected
    assert sample_frames(3, 30.0, mode="linspace", num_frames=num_frames) == [0, 1, 2]
    assert sample_frames(100, 30.0, mode="linspace", num_frames=1) == [0]
