"""Tokens that are added to a tokenizer get embeddings before they are trained on."""

import json
import shutil

import pytest
import torch
from train_corpus import make, train, weights, write_model

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.tokenizer import byte_tokenizer
from hico.train import run
from hico.train.parts import fit_vocabulary

NEW = ["<time>", "<place>", *(f"<extra_{number}>" for number in range(60))]


@pytest.fixture
def more_tokens(folder):
    """A recipe for rows with tokens that lie beyond the vocabulary of the model, which the processor knows."""
    write_model(folder / "own")
    processor = HicoProcessor.from_pretrained(folder / "own")
    processor.tokenizer.add_tokens(NEW)
    processor.save_pretrained(folder / "own")
    rows = [{"conversations": [{"from": "human", "value": "When?"}, {"from": "gpt", "value": "<extra_59> now"}]}] * 4
    (folder / "tokens.json").write_text(json.dumps(rows))
    data = [{"json_path": str(folder / "tokens.json")}]
    return {"model": str(folder / "own"), "data": data}


def test_added_tokens_get_embeddings_that_are_saved(folder, more_tokens, caplog):
    known = HicoConfig.from_pretrained(folder / "own").text_config.vocab_size
    recipe = make(folder, **more_tokens)
    final = run.run_stage(recipe)
    processor = HicoProcessor.from_pretrained(final)
    largest = processor.tokenizer.convert_tokens_to_ids("<extra_59>")
    assert largest >= known
    assert HicoConfig.from_pretrained(final).text_config.vocab_size == largest + 1
    model = HicoForConditionalGeneration.from_pretrained(final)
    assert len(model.lm_head.weight) == model.get_input_embeddings().num_embeddings == largest + 1
    assert f"{largest + 1 - known} token(s) more than the LLM" in caplog.text
    # The second stage starts from what the first one made, and adds nothing.
    caplog.clear()
    train(make(folder, **{**more_tokens, "model": str(final)}, output_dir=str(folder / "second")))
    assert "more than the LLM" not in caplog.text


def test_a_stopped_stage_with_added_tokens_goes_on(folder, more_tokens):
    whole = weights(run.run_stage(make(folder, **more_tokens)))
    settings = {**more_tokens, "output_dir": str(folder / "parts"), "save_strategy": "steps", "save_steps": 1}
    run.run_stage(make(folder, **settings))
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(folder / "parts" / name)
    for name, weight in weights(run.run_stage(make(folder, **settings))).items():
        assert torch.equal(weight, whole[name]), name


def test_added_tokens_that_would_not_learn_are_an_error(folder, more_tokens):
    seen = {"json_path": str(folder / "rows.json"), "data_root": str(folder)}
    recipe = make(folder, model=more_tokens["model"], data=[*more_tokens["data"], seen], trainable=["projector"])
    with pytest.raises(ValueError, match="tokens that the LLM does not, and `trainable` leaves it out"):
        run.run_stage(recipe)


def test_placeholders_beyond_the_vocabulary_need_no_embeddings():
    tokenizer = byte_tokenizer()
    config = HicoConfig.preset(
        "tiny", text_config={**HicoConfig.preset("tiny").text_config.to_dict(), "vocab_size": 259}
    )

    assert max(tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|image_pad|>"])) > 258
    assert fit_vocabulary(HicoForConditionalGeneration(config), tokenizer) == 0
