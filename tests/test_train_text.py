"""An LLM learns packed text: from its folder or inside a model, killed or not, and what comes of it is whole."""

import json

import pytest
import torch
from test_train_devices import needs_deepspeed, zero
from text_corpus import text_recipe, write_documents, write_lm
from train_corpus import history, losses, make, weights, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor, cli
from hico.train import run
from hico.train.__main__ import main
from hico.train.checkpoint import is_complete
from hico.train.plan import prepare
from hico.train.stage_trainer import StageTrainer


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_lm(folder / "lm")
    write_documents(folder)
    write_model(folder / "init")
    return folder


@pytest.fixture
def folder(texts, tmp_path):
    for path in texts.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


class Killed(Exception):
    pass


def kill_after(step, monkeypatch):
    real = StageTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)


def lm_weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_the_result_is_a_plain_lm_of_the_new_positions(folder):
    final = run.run_stage(text_recipe(folder))
    assert is_complete(final)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.config.max_position_embeddings == 128
    assert model.config.use_cache
    before = AutoModelForCausalLM.from_pretrained(folder / "lm")
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in before.named_parameters()}
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert len(tokenizer) == 261
    found = losses(history(final))
    assert found[4] < found[1]


def test_the_result_becomes_a_model_that_sees(folder):
    from published import tiny_clip

    final = run.run_stage(text_recipe(folder, max_steps=1))
    config = HicoConfig(text_config=json.loads((final / "config.json").read_text()))
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    tiny_clip().save_pretrained(folder / "clip")
    assert cli.main(["convert", str(final), str(folder / "whole"), "--encoder", str(folder / "clip")]) == 0
    whole = weights(folder / "whole")
    for name, weight in lm_weights(final).items():
        ours = name if name.startswith("lm_head") else "model.language_model." + name.removeprefix("model.")
        assert torch.equal(whole[ours], weight), name


@pytest.mark.parametrize("changes", [{}, {"long_share": 0.5, "across_documents": False, "dataloader_num_workers": 1}])
def test_a_killed_run_goes_on_bit_for_bit(folder, monkeypatch, changes):
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "long_documents": 64, **changes}
    whole = run.run_stage(text_recipe(folder, output_dir=str(folder / "whole"), **common))
    recipe = text_recipe(folder, **common)
    with monkeypatch.context() as patch:
        kill_after(7, patch)  # in the second pass over the documents
        with pytest.raises(Killed):
            run.run_stage(recipe)
    resumed = run.run_stage(recipe)
    assert losses(history(resumed)) == losses(history(whole))
    for name, weight in lm_weights(whole).items():
        assert torch.equal(weight, lm_weights(resumed)[name]), name


def test_a_model_that_sees_learns_text_with_its_llm_alone(folder):
    recipe = text_recipe(folder, model=str(folder / "init"), rope_parameters={"rope_theta": 1e8}, max_steps=2)
    final = run.run_stage(recipe)
    before, after = weights(folder / "init"), weights(final)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if "language_model" in name or "lm_head" in name}
    model = HicoForConditionalGeneration.from_pretrained(final)
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e8
    assert HicoProcessor.from_pretrained(final).tokenizer.eos_token_id == 258


def test_both_kinds_of_model_learn_the_same_of_the_same_text(folder):
    model = HicoForConditionalGeneration.from_pretrained(folder / "init")
    text = model.config.text_config
    lm = AutoModelForCausalLM.from_config(text)
    lm.model.load_state_dict(model.model.language_model.state_dict())
    lm.lm_head.load_state_dict(model.lm_head.state_dict())
    lm.save_pretrained(folder / "its_lm")
    HicoProcessor.from_pretrained(folder / "init").tokenizer.save_pretrained(folder / "its_lm")
    common = {"rope_parameters": None, "max_steps": 3}
    whole = run.run_stage(text_recipe(folder, model=str(folder / "init"), output_dir=str(folder / "a"), **common))
    alone = run.run_stage(text_recipe(folder, model=str(folder / "its_lm"), output_dir=str(folder / "b"), **common))
    assert losses(history(whole)) == pytest.approx(losses(history(alone)), rel=1e-6)


def test_the_loss_is_that_of_transformers(folder):
    recipe = text_recipe(folder, loss_chunk=50)
    trainer = run.make_trainer(recipe, run.training_arguments(recipe), run.prepare(recipe))
    batch = next(iter(trainer.get_train_dataloader()))
    stock = AutoModelForCausalLM.from_pretrained(folder / "lm", config=trainer.model.config)
    expected = stock(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    expected.backward()
    found = trainer.model(**batch).loss
    found.backward()
    torch.testing.assert_close(found, expected)
    for (name, parameter), other in zip(trainer.model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_other_packing_is_other_data(folder):
    common = {"save_strategy": "steps", "save_steps": 2}
    run.run_stage(text_recipe(folder, **common))
    with pytest.raises(ValueError, match="trained on other data: datasets"):
        run.run_stage(text_recipe(folder, max_steps=6, long_documents=64, long_share=0.9, **common))


def write(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": None}, "max_length 128 is beyond the 64 positions of qwen2; set rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "change nothing"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 2.0}}, "sets factor, which has no effect"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 1.5}}, "beyond the 96 positions that rope_type yarn"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "make positions that are no numbers"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "make positions that are no numbers"),
        ({"max_length": 0}, "max_length is 0; it must be at least 2"),
        ({"max_length": 100_000}, "one sequence has 100,000; lower max_length"),
        (
            {"max_frames": 3, "packing": True, "max_tokens_per_batch": 99999},
            "objective text has no use for max_frames",
        ),
        ({"trainable": ["projector"]}, "objective text trains the LLM, all of it"),
        ({"eval_fraction": 0.1}, "objective text has no evaluation"),
        ({"offload_activations": True}, "set gradient_checkpointing: true"),
        ({"across_documents": False, "per_device_train_batch_size": 2}, "set per_device_train_batch_size: 1"),
    ],
)
def test_what_cannot_be_is_one_clear_line(folder, changes, said, capsys):
    recipe = {**json.loads(json.dumps(ARGUMENTS)), "model": str(folder / "lm"), "data": str(folder / "text.yaml")}
    path = write(folder, "recipe.yaml", json.dumps({**recipe, "output_dir": str(folder / "out"), **changes}))
    assert main(["--config", path]) == 1
    error = capsys.readouterr().err
    assert said in error.strip().splitlines()[-1]
    assert not (folder / "out").exists()


ARGUMENTS = {
    "objective": "text",
    "rope_parameters": {"rope_theta": 1e6},
    "max_length": 128,
    "max_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "per_device_train_batch_size": 1,
}


def test_a_tokenizer_without_separator_and_documents_without_text_are_one_clear_line(folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    write_lm(folder / "other")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "other")
    with pytest.raises(ValueError, match="the tokenizer has no eos_token, which separates packed documents"):
        run.run_stage(text_recipe(folder, model=str(folder / "other")))
    rows = [{"text": "some words " * 20}, {"body": "no text"}, {"text": "  "}]
    write(folder, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = [{"json_path": str(folder / "rows.jsonl")}]
    with pytest.raises(ValueError, match=r"2 documents: the document at .*rows.jsonl:2 has no text .*text_key"):
        run.run_stage(text_recipe(folder, data=data))
    final = run.run_stage(text_recipe(folder, data=data, on_bad_sample="skip", max_steps=1))
    assert is_complete(final)


def test_text_starts_from_an_lm_or_a_model_of_ours_and_nothing_else(folder):
    (folder / "tower").mkdir()
    write(folder / "tower", "config.json", json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(ValueError, match="holds 'clip_vision_model'; give the folder of a causal LM"):
        run.run_stage(text_recipe(folder, model=str(folder / "tower")))
    with pytest.raises(FileNotFoundError, match="does not exist or holds no config"):
        run.run_stage(text_recipe(folder, model=str(folder / "nothing")))


def test_a_chain_goes_on_from_text_with_its_positions(folder):
    recipe = text_recipe(folder, model=str(folder / "init"), rope_parameters={"rope_theta": 1e8}, max_length=64)
    planned = prepare(recipe).config
    common = {"model": str(folder / "init"), "data": [{"json_path": str(folder / "rows.jsonl")}], "max_steps": 1}
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    write(folder, "rows.jsonl", json.dumps({"conversations": talk}) + "\n")
    answers = make(folder, **common)
    assert prepare(answers, start=planned).config.text_config.rope_parameters["rope_theta"] == 1e8
    second = make(folder, **{**common, "model": str(folder / "out/final"), "output_dir": str(folder / "next")})
    final = run.run_chain([recipe, second])
    model = HicoForConditionalGeneration.from_pretrained(final)
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e8


def test_an_lm_without_rotary_positions_and_grouped_heads_learns_text(folder):
    write_lm(folder / "gpt2", GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=128))
    final = run.run_stage(text_recipe(folder, model=str(folder / "gpt2"), rope_parameters=None, max_steps=1))
    assert AutoModelForCausalLM.from_pretrained(final).config.max_position_embeddings == 128


def test_keys_of_text_are_errors_elsewhere(folder):
    with pytest.raises(ValueError, match="rope_parameters, long_share has an effect with objective: text only"):
        text_recipe(folder, objective="answers", long_share=0.5)


def in_processes(folder, name, num_processes, **changes):
    """Train in several processes; return what the first one recorded, see `train_worker`."""
    from test_train_devices import WORKER, run_in

    recipe = vars(text_recipe(folder, output_dir=str(folder / name), max_grad_norm=0.0, **changes))
    settings = {key: value for key, value in recipe.items() if key != "arguments"} | recipe["arguments"]
    (folder / f"{name}.json").write_text(json.dumps(settings))
    codes, errors = run_in(num_processes, [str(WORKER), str(folder / f"{name}.json"), str(folder / f"{name}.pt")])
    assert codes == [0] * num_processes, errors
    return torch.load(folder / f"{name}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [("lm", {}), ("lm", {"across_documents": False}), ("init", {"mlp_chunk": 30, "rope_parameters": None})],
)
def test_processes_that_share_text_train_as_one_does(folder, model, changes):
    read = weights if model == "init" else lm_weights

    def assert_same(found, expected):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        for name, weight in read(expected["final"]).items():
            torch.testing.assert_close(read(found["final"])[name], weight, rtol=1e-3, atol=1e-3, msg=name)

    common = {"model": str(folder / model), "loss_chunk": 20, "max_length": 131, "max_steps": 3, **changes}
    alone = in_processes(folder, "alone", 1, **common)
    assert_same(in_processes(folder, "shared", 2, **common, sequence_parallel=2), alone)
    halves = {"gradient_accumulation_steps": 1}
    assert_same(in_processes(folder, "halves", 2, **{**common, **halves}), alone)


@pytest.mark.slow
@needs_deepspeed
def test_zero3_over_processes_that_share_text(folder):
    common = {"model": str(folder / "lm"), "loss_chunk": 20, "max_length": 131, "max_steps": 3}
    alone = in_processes(folder, "zero_alone", 1, **common)
    found = in_processes(folder, "zero_shared", 2, **common, sequence_parallel=2, deepspeed=zero(3))
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, weight in lm_weights(alone["final"]).items():
        torch.testing.assert_close(lm_weights(found["final"])[name], weight, rtol=1e-3, atol=1e-3, msg=name)
