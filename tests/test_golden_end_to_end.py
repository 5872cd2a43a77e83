"""From pixels to tokens: the published systems' numbers, through checkpoints in their own layout."""

import re

import pytest
import torch
from helpers import golden_cases
from published import golden_config, write_checkpoint

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.convert import convert
from hico.published import translate
from hico.shards import iterate_shards
from hico.tokenizer import byte_tokenizer

PUBLISHED_PLACEHOLDER = -200
CASES = [case for case in golden_cases("E") if "input_ids" in case.entry.get("tensors", {})]

pytestmark = pytest.mark.golden
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def in_one_file(case, folder):
    return write_checkpoint(folder / "published", golden_config(case), case.weights)


def in_pickled_shards(case, folder):
    return write_checkpoint(folder / "shards", golden_config(case), case.weights, num_shards=3, suffix="bin")


def converted(case, folder):
    convert(in_pickled_shards(case, folder), folder / "hico")
    return folder / "hico"


def converted_back(case, folder):
    convert(converted(case, folder), folder / "back", to="published")
    return folder / "back"


def saved_again(case, folder):
    HicoForConditionalGeneration.from_pretrained(in_one_file(case, folder)).save_pretrained(folder / "saved")
    return folder / "saved"


each_route = pytest.mark.parametrize(
    "route", [in_one_file, in_pickled_shards, converted, converted_back, saved_again], ids=lambda route: route.__name__
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a case's model from a checkpoint that a route leads to; each is loaded once."""
    models = {}

    def load(case, route=in_one_file):
        if (case.name, route) not in models:
            folder = route(case, tmp_path_factory.mktemp(case.name))
            models[case.name, route] = HicoForConditionalGeneration.from_pretrained(folder)
        return models[case.name, route]

    return load


def visual_inputs(case, config: HicoConfig) -> dict[str, torch.Tensor]:
    """Prepare the pixels of a case with the processor that goes with its checkpoint."""
    settings = translate(golden_config(case)).processor
    processor = HicoProcessor.from_config(config, byte_tokenizer(), **settings)
    if "frames_u8" in case.tensors:
        frames = case["frames_u8"].permute(0, 3, 1, 2)
        return strip(processor("<|video_pad|>", videos=[frames]))
    image = case["image_u8"].numpy()
    if image.shape[:2] == (config.encoder["image_size"],) * 2:
        processor.image_tiling = "single"  # the reference gave an image of one tile to the tower as it is
    return strip(processor("<|image_pad|>", images=[image]))


def strip(inputs) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


def prompt(case, config: HicoConfig) -> torch.Tensor:
    """Write a case's prompt with one of our placeholders per visual token."""
    ids = case["input_ids"][0]
    at = int((ids == PUBLISHED_PLACEHOLDER).nonzero())
    placeholder = config.video_token_id if "frames_u8" in case.tensors else config.image_token_id
    visual = ids.new_full((len(case["visual_tokens"]),), placeholder)
    return torch.cat([ids[:at], visual, ids[at + 1 :]])[None]


def subsampled(case, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Take of a tensor what the case has of it; the manifest says which in the form ``[:, ::5]``."""
    _, _, steps = case.entry["tensors"][name]["meaning"].rpartition("[")
    index = [slice(None, None, int(step)) for step in re.findall(r"::(\d+)", steps)]
    return tensor[(slice(None), *index)] if tensor.ndim == 3 else tensor[(..., *index)]


@each_case
def test_pixels_are_the_published_ones(case, load):
    model = load(case)
    inputs = visual_inputs(case, model.config)
    seen = []
    handle = model.model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        encode(model, inputs)
    handle.remove()
    pixels = torch.cat(seen)
    assert list(pixels.shape) == case.config["pixel_values_shape"]
    case.assert_close(subsampled(case, "pixel_values_sub", pixels), "pixel_values_sub")


def encode(model, inputs) -> torch.Tensor:
    features = model.model.get_video_features if "video_num_clips" in inputs else model.model.get_image_features
    (tokens,) = features(*inputs.values())
    return tokens


@each_case
@torch.no_grad()
def test_visual_tokens_are_the_published_ones(case, load):
    model = load(case)
    encoded = []
    handle = model.model.encoder.register_forward_hook(lambda module, args, output: encoded.append(output))
    tokens = encode(model, visual_inputs(case, model.config))
    handle.remove()
    case.assert_close(subsampled(case, "vision_features", torch.cat(encoded)), "vision_features")
    case.assert_close(tokens, "visual_tokens")


@each_route
@each_case
@torch.no_grad()
def test_logits_and_greedy_tokens_are_the_published_ones(case, route, load):
    model = load(case, route)
    input_ids, inputs = prompt(case, model.config), visual_inputs(case, model.config)
    lengths = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        for layer in model.model.language_model.layers
    ]
    prefill = model(input_ids=input_ids, **inputs, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    case.assert_close(prefill.logits[0, -1], "prefill_logits_last")
    case.assert_close(torch.tensor(lengths), "hidden_len_per_layer")
    generated = model.generate(
        input_ids,
        **inputs,
        do_sample=False,
        max_new_tokens=len(case["tokens"]),
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    case.assert_close(torch.cat(generated.logits), "step_logits")
    case.assert_close(generated.sequences[0, input_ids.shape[1] :], "tokens")


@each_case
@torch.no_grad()
def test_bfloat16_rounds_what_is_computed_but_chooses_for_itself(case, load, tmp_path):
    """What is between two choices is close: near a tie, other tokens are merged or kept, and no logits tell of it."""
    load(case).save_pretrained(tmp_path)
    features, logits = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = HicoForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        model.set_drop_schedule(None)
        model.model.encoder.register_forward_hook(lambda module, args, output: features.append(output.float()))
        encode(model, visual_inputs(case, model.config))
        tokens = case["visual_tokens"].to(dtype)
        logits.append(model(prompt(case, model.config), visual_embeds=[tokens]).logits.float())
    # Some twenty roundings of 2**-9 at most, one after the other.
    for full, half in (features, logits):
        assert (half - full).norm() / full.norm() < 0.03


@each_case
def test_a_round_trip_is_exact(case, tmp_path):
    original = case.weights
    files = [in_one_file(case, tmp_path), converted_back(case, tmp_path)]
    for folder in files:
        found = {name: shard.load(name) for shard in iterate_shards(folder) for name in shard.tensors}
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name].view(torch.uint8), original[name].view(torch.uint8)) for name in found)
    convert(tmp_path / "back", tmp_path / "again")
    for path in (tmp_path / "hico").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
