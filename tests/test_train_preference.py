"""Learning which of two answers is the better one: losses, gradients, the reference, and a run from end to end."""

import json
import math
from pathlib import Path

import pytest
import torch
from train_corpus import history, make, train, trainer_for, weights, write_pairs

from hico import HicoForConditionalGeneration, HicoProcessor
from hico.ops.preference import compare_answers
from hico.prompt import IGNORE_INDEX
from hico.train import run
from hico.train.__main__ import main
from hico.train.config import PreferenceSettings
from hico.train.preference import PreferenceTrainer, RewardMeter
from hico.train.recipes import load_recipes
from hico.train.trainer import unwrapped

LOG_2 = math.log(2)
LORA = {"lora": {"r": 4, "lora_alpha": 16}, "trainable": ["projector"]}
ROWS = range(6)


@pytest.fixture
def pairs(folder):
    write_pairs(folder)
    return folder


def recipe_for(folder, **changes):
    settings = {"objective": "preference", "data": str(folder / "pairs.yaml"), "learning_rate": 1e-3, **changes}
    return make(folder, **settings)


def batch_of(trainer, rows=ROWS):
    batch = trainer.data_collator([trainer.train_dataset[0, row] for row in rows])
    return {name: value for name, value in batch.items() if name not in ("num_rows", "bad_rows")}


def compared(trainer, rows=ROWS):
    """Return the losses of pairs, and the mean rewards."""
    meter = RewardMeter()
    losses = trainer.compare(trainer.model, batch_of(trainer, rows), meter)
    return losses, meter.mean_losses(meter.totals(torch.Tensor.cpu))


def disturb(model):
    """Let a policy be another model than its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


# The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_one_computed_by_hand():
    policy, reference = torch.tensor([-1.0, -4.0, -2.0, -1.0]), torch.tensor([-1.5, -3.0, -1.0, -2.0])
    found = compare_answers(policy, reference, beta=0.5)
    # Rewards are half of what became likelier: chosen +0.5 and -1, rejected -1 and +1. Margins are 0.75 and -1.
    assert found.chosen.tolist() == [0.25, -0.5]
    assert found.rejected.tolist() == [-0.5, 0.5]
    losses = [math.log(1 + math.exp(-0.75)), math.log(1 + math.exp(1.0))]
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-6)
    flipped = [math.log(1 + math.exp(0.75)), math.log(1 + math.exp(-1.0))]
    smoothed = compare_answers(policy, reference, beta=0.5, label_smoothing=0.2)
    expected = [0.8 * loss + 0.2 * other for loss, other in zip(losses, flipped, strict=True)]
    assert smoothed.losses.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, LORA, {"trainable": ["llm"], "gradient_checkpointing": True}, {"drop_schedule": "attention@1:0.5"}],
)
def test_a_policy_that_is_its_reference_has_loss_log_2_and_no_margin(pairs, changes):
    trainer = trainer_for(recipe_for(pairs, **changes))
    for mode in (True, False):
        trainer.model.train(mode)
        losses, rewards = compared(trainer)
        assert losses.tolist() == [-torch.nn.functional.logsigmoid(torch.zeros(())).item()] * len(ROWS)
        assert {rewards[f"rewards/{name}"] for name in RewardMeter.REWARDS} == {0.0}


def test_margins_begin_at_0_in_half_precision_too(pairs):
    for changes in ({}, LORA):
        first = train(recipe_for(pairs, bf16=True, max_steps=1, **changes)).state.log_history[0]
        assert first["loss"] == pytest.approx(LOG_2, rel=1e-6)
        assert first["rewards/margins"] == first["rewards/chosen"] == 0


def independent_loss(policy, reference, dataset, *, beta):
    """Compute the mean loss of rows by whole logits, one answer at a time."""
    total = 0.0
    for row in ROWS:
        example = dataset[0, row]
        log_ratios = []
        for answer in (example, example["rejected"]):
            pixels = {name: example[name] for name in example if "pixel" in name or "num_clips" in name}
            pixels |= {"image_grids": example["image_grids"]} if "image_grids" in example else {}
            targets = answer["labels"][1:]
            learned = targets != IGNORE_INDEX
            log_probabilities = [
                model(input_ids=answer["input_ids"][None], **pixels).logits[0, :-1][learned].log_softmax(dim=-1)
                for model in (policy, reference)
            ]
            of_answer = [part.gather(1, targets[learned][:, None]).sum() for part in log_probabilities]
            log_ratios.append(of_answer[0] - of_answer[1].detach())
        total = total - torch.log(torch.sigmoid(beta * (log_ratios[0] - log_ratios[1])))
    return total / len(ROWS)


def in_float64(trainer):
    for model in (trainer.model, trainer.reference):
        if model is not None:
            model.double()
    return trainer


def test_loss_and_gradients_are_those_of_an_independent_computation(pairs, monkeypatch):
    monkeypatch.setattr(HicoForConditionalGeneration, "tokens_per_loss_chunk", 7)
    trainer = in_float64(trainer_for(recipe_for(pairs, preference={"beta": 0.3})))
    disturb(trainer.model)
    expected = independent_loss(trainer.model, trainer.reference, trainer.train_dataset, beta=0.3)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    loss = compared(trainer)[0].mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-7, atol=1e-10, msg=name)


def test_the_loss_is_that_of_trl(pairs):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import Qwen2ForCausalLM

    texts = (2, 5, 8, 11)
    trainer = trainer_for(recipe_for(pairs, preference={"beta": 0.2}))
    disturb(trainer.model)
    losses, rewards = compared(trainer, texts)
    processor = HicoProcessor.from_pretrained(pairs / "init")
    rows, tokenizer = [], processor.tokenizer
    tokenizer.eos_token = "<|im_end|>"
    for row in texts:
        example = trainer.train_dataset[0, row]
        start = int((example["labels"] != IGNORE_INDEX).nonzero()[0])
        answers = {}
        for name, answer in (("chosen", example), ("rejected", example["rejected"])):
            answers[name] = tokenizer.decode(answer["input_ids"][answer["labels"] != IGNORE_INDEX])
        rows.append({"prompt": tokenizer.decode(example["input_ids"][:start]), **answers})

    def causal_lm(model):
        copied = Qwen2ForCausalLM(model.config.text_config)
        copied.model.load_state_dict(model.model.language_model.state_dict())
        copied.lm_head.load_state_dict(model.lm_head.state_dict())
        return copied

    options = {"beta": 0.2, "per_device_train_batch_size": 4, "report_to": "none"}
    other = trl.DPOTrainer(
        causal_lm(trainer.model),
        causal_lm(trainer.reference),
        args=trl.DPOConfig(output_dir=str(pairs / "trl"), use_cpu=True, bf16=False, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected = other.compute_loss(other.model, other.data_collator(list(other.train_dataset)))
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    for name in RewardMeter.REWARDS:
        logged = other._metrics["train"][f"rewards/{name}"][-1]
        assert rewards[f"rewards/{name}"] == pytest.approx(logged, rel=1e-4, abs=1e-5), name


def test_logits_never_exist_for_whole_rows(pairs, monkeypatch):
    monkeypatch.setattr(HicoForConditionalGeneration, "tokens_per_loss_chunk", 5)
    trainer, sizes = trainer_for(recipe_for(pairs)), []
    for model in (trainer.model, trainer.reference):
        model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    compared(trainer)
    assert max(sizes) == 2 * len(ROWS)  # one position of every row, whose logits are not read
    assert sorted(set(sizes))[:-1][-1] <= 5


@pytest.mark.parametrize("changes", [{}, LORA])
def test_keys_that_save_memory_change_no_reward(pairs, changes):
    saving = {"loss_chunk": 5, "mlp_chunk": 16, "gradient_checkpointing": True}
    found = []
    for more in ({}, saving):
        trainer = trainer_for(recipe_for(pairs, **changes, **more))
        disturb(trainer.model)
        losses, rewards = compared(trainer)
        losses.sum().backward()
        found.append((losses, rewards, [p.grad for p in trainer.model.parameters() if p.grad is not None]))
    (losses, rewards, gradients), (again, other, same) = found
    torch.testing.assert_close(again, losses)
    assert other == pytest.approx(rewards, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(same, gradients, rtol=1e-4, atol=1e-6)


# The reference ----------------------------------------------------------------------------------------------------


def test_adapters_are_compared_with_the_model_below_them(pairs):
    """Without its adapters and the parts learned beside them, a model is the copy that full training would keep."""
    trainer = trainer_for(recipe_for(pairs, **LORA))
    assert trainer.reference is None
    disturb(trainer.model)
    losses, rewards = compared(trainer)
    copied = trainer_for(recipe_for(pairs)).reference
    trainer.reference, trainer._frozen_encoder = copied, None
    again, expected = compared(trainer)
    assert rewards["rewards/margins"] != 0
    torch.testing.assert_close(losses, again)
    assert rewards == pytest.approx(expected)
    assert all(parameter.requires_grad == ("original" not in name) for name, parameter in learned_of(trainer.model))


def learned_of(model):
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name or ".projector." in name]


def test_a_reference_shares_what_does_not_learn_and_never_changes(pairs):
    recipe = recipe_for(pairs, trainable=["llm"], num_train_epochs=1)
    trainer = trainer_for(recipe)
    model, reference = trainer.model, trainer.reference
    assert reference.model.encoder is model.model.encoder
    assert reference.model.projector is model.model.projector
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    trainer.train()
    before = weights(pairs / "init")
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not torch.equal(model.lm_head.weight, reference.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [({"trainable": ["llm"]}, 1), ({"trainable": ["projector", "llm"]}, 1), (LORA, 1), ({}, 2)],
)
def test_a_frozen_encoder_runs_once_for_both_answers_and_both_models(pairs, changes, passes):
    trainer, seen = trainer_for(recipe_for(pairs, **changes)), []
    encoders = {unwrapped(trainer.model).model.encoder}
    if trainer.reference is not None:
        encoders.add(trainer.reference.model.encoder)
    for encoder in encoders:
        layer = next(iter(encoder.children()))
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    batch = batch_of(trainer)
    expected = len(batch["pixel_values_videos"]) + len(batch["pixel_values"])
    for _ in range(2):
        seen.clear()
        compared(trainer)
        assert sum(seen) == passes * expected


def test_an_encoder_is_whole_again_after_a_step_that_fails(pairs):
    trainer = trainer_for(recipe_for(pairs, trainable=["llm"]))
    trainer.reference.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compared(trainer)
    assert "forward" not in vars(trainer.model.model.encoder)


@pytest.mark.parametrize("schedule", ["uniform@1:0.5", "random@1:0.25", "attention@1:0.5"])
def test_dropping_sees_the_same_tokens_with_either_answer(pairs, schedule):
    trainer = trainer_for(recipe_for(pairs, drop_schedule=schedule))
    disturb(trainer.model)
    plans, labels = [], batch_of(trainer)["labels"]
    trainer.model.register_forward_hook(lambda module, args, output: plans.append(output.drop_plan))
    losses, rewards = compared(trainer)
    (plan,) = plans
    targets = plan.shift_labels(labels)
    assert torch.equal((targets != IGNORE_INDEX).sum(dim=1), (labels[:, 1:] != IGNORE_INDEX).sum(dim=1))
    one_by_one = torch.cat([compared(trainer, [row])[0] for row in ROWS])
    torch.testing.assert_close(losses, one_by_one, rtol=1e-4, atol=1e-6)
    without = compared(trainer_for(recipe_for(pairs, drop_schedule="none")))
    assert rewards != without[1]


# Runs -------------------------------------------------------------------------------------------------------------


def test_margins_rise_in_a_few_steps(pairs):
    changes = {"per_device_train_batch_size": 4, "num_train_epochs": 4, "eval_data": str(pairs / "pairs.yaml")}
    final = run.run_stage(recipe_for(pairs, learning_rate=3e-3, lr_scheduler_type="constant", **changes))
    logged = history(final)
    steps = [entry for entry in logged if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(LOG_2, rel=1e-6)
    assert steps[0]["rewards/margins"] == 0
    evaluated = [entry for entry in logged if "eval_loss" in entry]
    margins = [entry["eval_rewards/margins"] for entry in evaluated]
    assert len(margins) == 4
    assert margins == sorted(margins)
    assert margins[-1] > 0.2
    assert evaluated[-1]["eval_rewards/accuracies"] == 1
    assert evaluated[-1]["eval_loss"] < 0.6
    for entry in (steps[-1], {name.removeprefix("eval_"): value for name, value in evaluated[-1].items()}):
        assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"])
    # What comes out is a model like any other.
    assert weights(final).keys() == weights(pairs / "init").keys()


def test_evaluation_weighs_every_pair_alike(pairs):
    trainer = trainer_for(recipe_for(pairs, eval_data=str(pairs / "pairs.yaml"), per_device_eval_batch_size=5))
    disturb(trainer.model)
    trainer.model.eval()
    losses, rewards = zip(*(compared(trainer, [row]) for row in range(12)), strict=True)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    for name in RewardMeter.REWARDS:
        expected = sum(one[f"rewards/{name}"] for one in rewards) / 12
        assert metrics[f"eval_rewards/{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_accumulated_steps_equal_one_large_batch(pairs):
    large = train(recipe_for(pairs, per_device_train_batch_size=5, max_steps=3))
    small = train(recipe_for(pairs, per_device_train_batch_size=1, gradient_accumulation_steps=5, max_steps=3))
    for one, other in zip(large.state.log_history[:3], small.state.log_history[:3], strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


class Killed(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, pytest.param(LORA, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(pairs, monkeypatch, changes):
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **changes}
    whole = run.run_stage(recipe_for(pairs, output_dir=str(pairs / "whole"), **common))
    recipe, real = recipe_for(pairs, **common), run.PreferenceTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run.PreferenceTrainer, "training_step", training_step)
        with pytest.raises(Killed):
            run.run_stage(recipe)
    resumed = run.run_stage(recipe)

    def logged(final):
        kept = ("loss", "grad_norm", "step")
        return [{k: v for k, v in e.items() if k in kept or "rewards" in k} for e in history(final) if "loss" in e]

    assert len(logged(whole)) == 4
    assert logged(resumed) == logged(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_rows_that_cannot_be_read_are_left_out(pairs):
    rows = json.loads((pairs / "pairs.json").read_text())
    (pairs / "broken.mp4").write_bytes(b"no video")
    rows[0]["video"] = "broken.mp4"
    del rows[2]["rejected"]
    (pairs / "pairs.json").write_text(json.dumps(rows))
    trainer = train(recipe_for(pairs, on_bad_sample="skip", max_bad_fraction=0.5))
    assert sum(entry.get("bad_rows", 0) for entry in trainer.state.log_history) == 1
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_a_dry_run_says_what_the_reference_takes(pairs, capsys):
    settings = {**vars(recipe_for(pairs)), **recipe_for(pairs).arguments}
    settings = {key: value for key, value in settings.items() if key != "arguments"}

    def printed(**changes):
        (pairs / "recipe.yaml").write_text(json.dumps({**settings, **changes}))
        assert main(["--config", str(pairs / "recipe.yaml"), "--dry_run"]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "reference" in printed()
    assert "reference" not in printed(**LORA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": {"beta": 0}}, "preference has beta 0 and label_smoothing 0.0; use a beta above 0"),
        ({"preference": {"label_smoothing": 0.5}}, "label_smoothing 0.5; use a beta above 0, and a share below 0.5"),
        ({"preference": {"loss_type": "ipo"}}, "loss_type is 'ipo'; it must be 'sigmoid'"),
        ({"preference": {"betta": 0.1}}, "unknown preference key 'betta'; did you mean 'beta'"),
        ({"preference": {"beta": "high"}}, "beta is 'high'; it must be a number"),
        ({"objective": "answers", "preference": {}}, "preference is for objective: preference"),
        ({"packing": True, "max_tokens_per_batch": 8192}, "packing cannot be combined with objective preference"),
        ({"label_scheme": "longva"}, "objective preference compares answers alone; label_scheme longva"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(pairs, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_for(pairs, **changes)


def test_the_recipe_of_longva_holds_the_published_values(pairs, monkeypatch, capsys):
    monkeypatch.setenv("DATA_ROOT", "/data")
    path = Path(__file__).parents[1] / "train/longva/dpo.yaml"
    (found,) = load_recipes(path)
    assert found.objective == "preference"
    assert PreferenceSettings.of(found.preference) == PreferenceSettings(beta=0.1)
    assert found.arguments["learning_rate"] == 5e-7
    assert (found.trainable, found.global_batch_size, found.arguments["num_train_epochs"]) == (["llm"], 128, 3)
    assert Path(found.arguments["deepspeed"]).is_file()
    flags = ["--model", str(pairs / "init"), "--data", str(pairs / "pairs.yaml"), "--deepspeed", "null"]
    flags += ["--world_size", "4", "--report_to", "none", "--num_train_epochs", "8"]
    for more in ([], ["--lora", "{r: 4}"]):
        assert main(["--config", str(path), *flags, *more, "--dry_run"]) == 0, capsys.readouterr().err
        assert "4 device(s), 32 micro-batch(es) per step, 12 rows" in capsys.readouterr().out


def test_sharded_weights_are_refused(pairs, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = recipe_for(pairs)
    needed = run.prepare(recipe).needed(world_size=2)
    with pytest.raises(ValueError, match="runs two models whole on every device; use DDP, ZeRO-1 or ZeRO-2"):
        PreferenceTrainer(torch.nn.Linear(1, 1), None, recipe=recipe, needed=needed)


def rewards_of(found):
    logged = [entry for entry in history(found["final"]) if "loss" in entry]
    return [entry[f"rewards/{name}"] for entry in logged for name in RewardMeter.REWARDS]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"trainable": ["encoder", "projector", "llm"]}, LORA])
def test_two_processes_equal_one_though_the_last_step_misses_one_of_them(pairs, changes):
    from test_train_devices import assert_same, launch

    common = {"objective": "preference", "data": str(pairs / "pairs.yaml"), "learning_rate": 1e-3, **changes}
    common |= {"per_device_train_batch_size": 5}
    alone = launch(pairs, "alone", processes=1, gradient_accumulation_steps=2, **common)
    together = launch(pairs, "together", processes=2, **common)
    assert len(alone["losses"]) == 4
    assert_same(together, alone)
    assert rewards_of(together) == pytest.approx(rewards_of(alone), rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"trainable": ["projector", "llm"]}, LORA])
def test_two_processes_that_share_rows_equal_one(pairs, changes):
    from test_train_devices import assert_same, launch

    common = {"objective": "preference", "data": str(pairs / "pairs.yaml"), "learning_rate": 1e-3, **changes}
    common |= {"per_device_train_batch_size": 4}
    alone = launch(pairs, "alone", processes=1, **common)
    together = launch(pairs, "together", processes=2, sequence_parallel=2, **common)
    assert_same(together, alone)
    assert rewards_of(together) == pytest.approx(rewards_of(alone), rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (2, True)])
def test_zero_follows_one_process(pairs, stage, bf16):
    pytest.importorskip("deepspeed")
    from test_train_devices import launch, zero

    common = {"objective": "preference", "data": str(pairs / "pairs.yaml"), "learning_rate": 1e-3}
    common |= {"trainable": ["projector", "llm"]}
    alone = launch(pairs, "alone", processes=1, per_device_train_batch_size=4, **common)
    common |= {"deepspeed": zero(stage), "bf16": bf16}
    found = launch(pairs, "zero", processes=2, per_device_train_batch_size=2, **common)
    assert found["losses"][0] == pytest.approx(LOG_2, rel=1e-6)  # the reference computes in the policy's dtype
    assert found["losses"] == pytest.approx(alone["losses"], rel=0.02 if bf16 else 1e-4)
