"""The model: right for every batch, whatever is in its rows."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from hico import HicoConfig, HicoForConditionalGeneration, HicoModel
from hico.compat import CACHE_NAME
from hico.preprocessing import normalize_pixels


@pytest.fixture(scope="module")
def model():
    """In float64: two ways to the same number differ by float32's rounding, and by how much depends on the kernel."""
    torch.manual_seed(0)
    return HicoForConditionalGeneration(HicoConfig.preset("tiny")).eval().double()


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


VIDEO, IMAGE = 260, 259


def prompt(*parts):
    """Text ids for numbers, 16 placeholders for "v" (a clip) and "i" (a tile)."""
    ids = []
    for part in parts:
        ids += [VIDEO] * 16 if part == "v" else [IMAGE] * 16 if part == "i" else [part]
    return torch.tensor(ids)


def left_pad(rows):
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=256) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


def test_chunked_encoding_equals_whole_encoding(model):
    clips = pixels(7, 4, 3, 48, 48)
    with torch.no_grad():
        whole = model.model.encode(clips, clips_per_chunk=7)
        torch.testing.assert_close(model.model.encode(clips, clips_per_chunk=2), whole)
        torch.testing.assert_close(model.model.encode(iter(clips.split(3))), whole)


def test_bytes_and_normalised_pixels_are_the_same(model):
    clips = pixels(2, 4, 3, 48, 48)
    encoder = model.model.encoder
    floats = normalize_pixels(clips, mean=encoder.image_mean, std=encoder.image_std)
    with torch.no_grad():
        torch.testing.assert_close(model.model.encode(clips), model.model.encode(floats))


def mixed_batch():
    """Text alone; two videos (one and two clips) back to back; an image, text and a video; a tiled image."""
    rows = [
        prompt(1, 2, 3, 4),
        prompt(5, "v", "v", "v", 6, 7),
        prompt(8, "i", 9, "v", 10),
        prompt(11, "i", "i", "i", 12),
    ]
    videos = [pixels(1, 4, 3, 48, 48), pixels(2, 4, 3, 48, 48), pixels(1, 4, 3, 48, 48)]
    images = [(pixels(1, 3, 48, 48), (0, 0)), (pixels(3, 3, 48, 48), (1, 2))]
    return rows, [[], videos[:2], videos[2:], []], [[], [], images[:1], images[1:]]


def flat(lists):
    return [item for items in lists for item in items]


def visual_inputs(videos, images):
    inputs = {}
    if videos:
        inputs["pixel_values_videos"] = torch.cat(videos)
        inputs["video_num_clips"] = torch.tensor([len(clips) for clips in videos])
    if images:
        inputs["pixel_values"] = torch.cat([tiles for tiles, _ in images])
        inputs["image_grids"] = torch.tensor([grid for _, grid in images])
    return inputs


def test_a_padded_batch_equals_its_rows_one_by_one(model):
    rows, videos, images = mixed_batch()
    ids, mask = left_pad(rows)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, **visual_inputs(flat(videos), flat(images))).logits
        for i, row in enumerate(rows):
            single = model(row[None], **visual_inputs(videos[i], images[i])).logits[0]
            torch.testing.assert_close(batch[i, -len(row) :], single)


def test_generation_of_a_batch_equals_its_rows_and_greedy_equals_argmax(model):
    rows, videos, images = mixed_batch()
    ids, mask = left_pad(rows)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    inputs = visual_inputs(flat(videos), flat(images))
    batch = model.generate(ids, attention_mask=mask, **inputs, **settings)
    assert torch.equal(batch[:, : ids.shape[1]], ids)
    for i, row in enumerate(rows):
        inputs = visual_inputs(videos[i], images[i])
        single = model.generate(row[None], **inputs, **settings)[0]
        assert batch[i, -5:].tolist() == single[-5:].tolist()
        with torch.no_grad():
            logits = model(single[None, :-1], **inputs).logits[0]
        assert logits[-5:].argmax(-1).tolist() == single[-5:].tolist()


def test_an_answer_holds_no_placeholder(model):
    ids = prompt(1, 2, 3)[None]
    before = model.lm_head.weight[VIDEO].clone()
    with torch.no_grad():
        model.lm_head.weight[VIDEO] *= 100
    settings = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": None, "pad_token_id": 256}
    try:
        for suppress_tokens in (None, [5]):
            answer = model.generate(ids, suppress_tokens=suppress_tokens, **settings)[0, 3:].tolist()
            assert not {VIDEO, IMAGE, *(suppress_tokens or ())} & set(answer)
    finally:
        with torch.no_grad():
            model.lm_head.weight[VIDEO] = before


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_a_cache_is_taken_under_either_name_and_without_a_warning(model, name, recwarn):
    ids, inputs = prompt(1, "v", 2, 3)[None], visual_inputs([pixels(1, 4, 3, 48, 48)], [])
    whole = model(ids, **inputs)
    cache = model(ids[:, :-1], **inputs, use_cache=True)[CACHE_NAME]
    torch.testing.assert_close(model(ids[:, -1:], **{name: cache}).logits, whole.logits[:, -1:])
    assert cache.get_seq_length() == ids.shape[1]
    again = model.generate(ids, **inputs, max_new_tokens=2, return_dict_in_generate=True)[CACHE_NAME]
    assert again.get_seq_length() == ids.shape[1] + 1
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
    with pytest.raises(ValueError, match="both cache and past_key_values"):
        model(ids[:, -1:], cache=cache, past_key_values=cache)


def test_outputs_of_encoders_made_elsewhere_are_refused_by_name(model):
    ids = prompt(1, "v", 2)[None]
    with pytest.raises(ValueError, match="mm_encoder_outputs"):
        model.generate(ids, mm_encoder_outputs={"video": torch.zeros(1, 16, 64)}, max_new_tokens=1)
    with pytest.raises(ValueError, match="mm_encoder_outputs are not read"):
        model(ids, mm_encoder_outputs={"video": torch.zeros(1, 16, 64)})


def test_beams_encode_a_video_once(model):
    calls = []
    handle = model.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    inputs = visual_inputs([pixels(1, 4, 3, 48, 48)], [])
    ids = prompt(1, "v", 2)[None]
    try:
        beams = model.generate(ids, **inputs, num_beams=3, max_new_tokens=3, do_sample=False, eos_token_id=None)
    finally:
        handle.remove()
    assert len(calls) == 1
    assert beams.shape == (1, ids.shape[1] + 3)


def test_visual_embeds_stand_for_pixels(model):
    clips = pixels(2, 4, 3, 48, 48)
    ids = prompt(1, "v", "v", 2)[None]
    with torch.no_grad():
        tokens = model.model.get_video_features(clips)
        from_pixels = model(ids, pixel_values_videos=clips).logits
        torch.testing.assert_close(model(ids, visual_embeds=tokens).logits, from_pixels)
    with pytest.raises(ValueError, match="both pixels and visual_embeds"):
        model(ids, visual_embeds=tokens, pixel_values_videos=clips)


def test_visual_mask_numbers_the_items_of_every_row(model):
    rows, videos, images = mixed_batch()
    ids, _ = left_pad(rows)
    _, mask = model.model.embed(ids, **visual_inputs(flat(videos), flat(images)))
    assert mask[0].max() == 0
    assert mask[1, -51:].tolist() == [0] + [1] * 16 + [2] * 32 + [0, 0]
    assert mask[2].max() == 2
    assert mask[3].sum() == 48


def test_placeholders_that_do_not_match_name_both_counts(model):
    with pytest.raises(ValueError, match=r"17 video placeholders, but the 1 video\(s\) given make 16 tokens"):
        model(torch.tensor([[VIDEO] * 17]), pixel_values_videos=pixels(1, 4, 3, 48, 48))
    with pytest.raises(ValueError, match=r"16 image placeholders, but the 0 image\(s\) given make 0 tokens"):
        model(torch.tensor([[IMAGE] * 16]), pixel_values_videos=None)
    with pytest.raises(ValueError, match=r"video_num_clips \[1, 2\] adds up to 3, but there are 2 clips"):
        model.model.get_video_features(pixels(2, 4, 3, 48, 48), torch.tensor([1, 2]))


def video_tokens(*lengths):
    return [torch.randn(length, 64) for length in lengths]


@pytest.mark.parametrize(
    ("parts", "lengths", "words"),
    [
        ([[VIDEO] * 3, [1], [VIDEO] * 5], (4, 4), r"row 0 has runs of \[3, 5\] .* 1 of 2, which .* makes 4 tokens"),
        ([[VIDEO] * 5, [1], [VIDEO] * 3], (4, 4), r"row 0 has runs of \[5, 3\] .* 2 of 2, which .* makes 4 tokens"),
        ([[IMAGE] * 3, [VIDEO] * 5], (4, 4), r"row 0 has runs of \[3, 5\] .* 1 of 2, which .* makes 4 tokens"),
        ([[IMAGE] * 2, [VIDEO] * 4], (4, 2), r"row 0 has runs of \[2, 4\] .* 1 of 2, which .* makes 4 tokens"),
        ([[IMAGE] * 2, [VIDEO] * 2], (4,), r"row 0 has runs of \[2, 2\] .* 1 of 1, which .* makes 4 tokens"),
    ],
)
def test_every_video_must_fill_its_own_placeholders(model, parts, lengths, words):
    ids = torch.tensor([[0, *(token for part in parts for token in part), 0]])
    with pytest.raises(ValueError, match=words):
        model.model.embed(ids, visual_embeds=video_tokens(*lengths))


def test_no_token_of_a_video_lands_in_another_row(model):
    ids = torch.tensor([[1, *[VIDEO] * 3, 2, 2, 2], [1, *[VIDEO] * 5, 2]])
    with pytest.raises(ValueError, match=r"row 0 has runs of \[3\] .* 1 of 2, which .* makes 4 tokens"):
        model.model.embed(ids, visual_embeds=video_tokens(4, 4))
    _, mask = model.model.embed(ids, visual_embeds=video_tokens(3, 5))
    assert mask.tolist() == [[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0]]


def test_a_video_that_text_interrupts_is_one_span(model):
    clips, image = pixels(2, 4, 3, 48, 48), pixels(1, 3, 48, 48)
    inputs = {"pixel_values_videos": clips, "pixel_values": image, "video_num_clips": torch.tensor([2])}
    ids = prompt(1, "v", 2, "i", 3, "v", 4)[None]
    embeds, mask = model.model.embed(ids, **inputs)
    assert mask[0].tolist() == [0] + [1] * 16 + [0] + [2] * 16 + [0] + [1] * 16 + [0]
    tokens = model.model.get_video_features(clips)[0]
    torch.testing.assert_close(embeds[0, mask[0] == 1], tokens)


def test_the_loss_in_training_is_the_loss_in_evaluation(model):
    ids = prompt(1, "v", 2, 3, 4)[None]
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    inputs = {"pixel_values_videos": pixels(1, 4, 3, 48, 48), "labels": labels}
    evaluated = model(ids, **inputs)
    reference = torch.nn.functional.cross_entropy(evaluated.logits[0, -3:-1], ids[0, -2:])
    torch.testing.assert_close(evaluated.loss, reference.float())
    try:
        trained = model.train()(ids, **inputs)
    finally:
        model.eval()
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, evaluated.loss)


def test_gradient_checkpointing_changes_no_gradient():
    ids = prompt(1, "v", 2, 3)[None]
    inputs = {"pixel_values_videos": pixels(1, 4, 3, 48, 48), "labels": ids.masked_fill(ids == VIDEO, -100)}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = HicoForConditionalGeneration(HicoConfig.preset("tiny")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.encoder.gradient_checkpointing
        model(ids, **inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("model.encoder") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_round_trip(tied, tmp_path):
    config = HicoConfig.preset("tiny")
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
    model = HicoForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is HicoForConditionalGeneration
    assert again.config.vision == model.config.vision
    assert again.config.text_config.to_diff_dict().keys() >= model.config.text_config.to_diff_dict().keys()
    assert (again.config.video_token_id, again.config.tie_word_embeddings) == (VIDEO, tied)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


def test_presets_say_how_many_tokens_a_video_takes():
    for name, tokens in (("videochat-flash-7b-224", 64), ("videochat-flash-2b-448", 64), ("tiny", 16)):
        assert HicoConfig.preset(name).vision.num_video_tokens(8) == 2 * tokens
    assert HicoConfig.preset("longva-7b").vision.num_video_tokens(2) == 288
    assert HicoConfig.preset("videochat-flash-7b-224").vision.num_image_tokens((2, 3)) == 7 * 64
    with pytest.raises(ValueError, match="6 frames do not split into clips of 4; drop 2 or pad 2"):
        HicoConfig.preset("tiny").vision.num_video_tokens(6)
    with pytest.raises(ValueError, match="unknown preset 'tny'"):
        HicoConfig.preset("tny")


def test_unknown_parts_are_named_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown encoder 'utm'; did you mean 'umt'"):
        HicoConfig(encoder="utm")
    with pytest.raises(ValueError, match="unknown compressor 'token_merg'; did you mean 'token_merge'"):
        HicoConfig(compressor={"name": "token_merg"})


def test_a_checkpoint_with_missing_or_other_weights_is_refused(tmp_path):
    model = HicoForConditionalGeneration(HicoConfig.preset("tiny"))
    weights = dict(model.state_dict())
    weights["model.projector.mlp.9.weight"] = weights.pop("model.projector.mlp.2.weight")
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"1 missing: .*mlp\.2\.weight; 1 unexpected: .*mlp\.9\.weight.*strict=False"):
        HicoForConditionalGeneration.from_pretrained(tmp_path)
    weights = dict(model.state_dict())
    del weights["model.encoder.blocks.0.attn.q_bias"]
    model.save_pretrained(tmp_path, state_dict=weights)
    again = HicoForConditionalGeneration.from_pretrained(tmp_path, strict=False)
    assert not again.model.encoder.blocks[0].attn.q_bias.any()


def test_the_model_without_its_head_loads_from_the_same_directory(tmp_path):
    model = HicoForConditionalGeneration(HicoConfig.preset("tiny")).eval()
    model.save_pretrained(tmp_path)
    inner = HicoModel.from_pretrained(tmp_path)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(inner.state_dict()[name], tensor), name


def test_a_generation_config_of_the_users_is_kept_and_taken_by_position(model, caplog):
    ids = prompt(1, 2, 3)[None]
    settings = GenerationConfig(max_new_tokens=5, suppress_tokens=[7], eos_token_id=None, pad_token_id=256)
    answer = model.generate(ids, settings)
    assert torch.equal(answer, model.generate(ids, generation_config=settings))
    assert answer.shape == (1, 8)
    assert settings.suppress_tokens == [7]
    assert "deprecated" not in caplog.text


def test_generation_refuses_right_padding(model):
    ids = torch.tensor([[1, 2, 256], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"1 of 2 rows end in padding.*padding_side='left'"):
        model.generate(ids, attention_mask=(ids != 256).long(), max_new_tokens=1)


def test_pixels_without_their_prompt_are_refused(model):
    clips = pixels(1, 4, 3, 48, 48)
    embeds = model.get_input_embeddings()(torch.tensor([[1, 2]]))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="pixel_values_videos given without input_ids"):
            call(inputs_embeds=embeds, pixel_values_videos=clips)


def test_visual_inputs_of_another_kind_are_refused(model):
    with pytest.raises(ValueError, match=r"visual_embeds of shape \(16, 32\) .* \(tokens, 64\)"):
        model(prompt("v")[None], visual_embeds=[torch.zeros(16, 32)])
    with pytest.raises(ValueError, match=r"pixels are torch\.int64; give uint8, or floats"):
        model(prompt("v")[None], pixel_values_videos=pixels(1, 4, 3, 48, 48).long())


def test_outputs_may_be_tuples(model):
    ids = prompt(1, 2, 3)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
        assert torch.equal(model.model(ids, return_dict=False)[0], model.model(ids).last_hidden_state)


def test_a_preset_takes_known_fields_only():
    assert HicoConfig.preset("tiny", clip_len=2, dtype="bfloat16").clip_len == 2
    with pytest.raises(ValueError, match="HicoConfig has no field compresor"):
        HicoConfig.preset("tiny", compresor="identity")


def test_an_encoder_is_not_split_across_devices():
    assert "UMTEncoder" in HicoForConditionalGeneration(HicoConfig.preset("tiny"))._no_split_modules


def test_weights_may_be_offloaded(model, tmp_path):
    inputs = {"input_ids": prompt(1, "v", 2)[None], "pixel_values_videos": pixels(1, 4, 3, 48, 48)}
    model.save_pretrained(tmp_path)
    places = {
        "model.encoder": "cpu",
        "model.compressor": "cpu",
        "model.projector": "disk",
        "model.language_model": "cpu",
    }
    offloaded = HicoForConditionalGeneration.from_pretrained(
        tmp_path, device_map={**places, "lm_head": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits)
