"""Loss and gradients while tokens are dropped, and what that costs."""

import copy
from functools import partial

import pytest
import torch
from dropout_reference import (
    BOTH_SIDES,
    EVERY_POSITION,
    EVERY_SCHEDULE,
    build,
    close,
    kept_in_row,
    prompt,
    stage_layers,
    written_out,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from hico.llm_dropout import patch

# Training


def training_batch(side):
    batch = prompt([5, 14, 4, 6, 6], [3, 6, 9], [9], side=side)
    labels = torch.full(batch.visual_mask.shape, -100)
    for row, labelled in enumerate([[19, 20, 33, 34], [14, 15, 16, 17], [5, 6]]):
        labels[row, batch.valid(row)[labelled]] = torch.tensor(labelled) + 3
    return batch, labels


@BOTH_SIDES
@EVERY_POSITION
def test_loss_and_gradient_equal_the_selection_written_out(side, positions):
    model, (batch, labels) = build(), training_batch(side)
    reference = copy.deepcopy(model)
    schedule = "uniform@1:0.6,attention@3:0.3"
    patch(model, schedule, positions=positions)
    embeds = batch.inputs_embeds.clone().requires_grad_()
    out = model(**{**batch.inputs, "inputs_embeds": embeds}, labels=labels, use_cache=False)
    out.loss.backward()

    by_hand = batch.inputs_embeds.clone().requires_grad_()
    losses, count = [], 0
    for row in range(len(batch)):
        valid = batch.valid(row)
        kept = kept_in_row(out.drop_plan, batch, row, stage_layers(schedule))
        logits = written_out(reference, by_hand[row, valid], kept, positions=positions)
        targets = labels[row, valid][kept[3]][1:]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
        count += (targets != -100).sum()
    loss = sum(losses) / count
    loss.backward()
    close(out.loss, loss)
    close(embeds.grad, by_hand.grad)
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@EVERY_SCHEDULE
def test_gradient_checkpointing_changes_nothing(schedule, reentrant):
    batch, labels = training_batch("right")
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        patch(model, schedule)
        embeds = batch.inputs_embeds.clone().requires_grad_()
        loss = model(**{**batch.inputs, "inputs_embeds": embeds}, labels=labels).loss
        loss.backward()
        grads.append([loss.detach(), embeds.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("patched_first", [True, False])
def test_wrapping_layers_in_checkpoints_changes_nothing(patched_first):
    batch, labels = training_batch("right")
    grads = []
    for wraps in (False, True):
        model = build().train()
        steps = [lambda m: patch(m, "attention@1:0.5,attention_merge@2:0.25:previous")]
        if wraps:
            steps.append(partial(apply_activation_checkpointing, check_fn=lambda m: isinstance(m, Qwen2DecoderLayer)))
        for step in steps if patched_first else reversed(steps):
            step(model)
        embeds = batch.inputs_embeds.clone().requires_grad_()
        model(**{**batch.inputs, "inputs_embeds": embeds}, labels=labels, use_cache=False).loss.backward()
        grads.append([embeds.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, wrapped in zip(*grads, strict=True):
        assert torch.equal(plain, wrapped)


def test_loss_options_of_transformers_work():
    model, (batch, labels) = build(), training_batch("right")
    patch(model, "uniform@1:0.5")
    out = model(**batch.inputs, labels=labels)
    summed = model(**batch.inputs, labels=labels, num_items_in_batch=torch.tensor(5))
    close(summed.loss, out.loss * (labels != -100).sum() / 5)
    as_tuple = model(**batch.inputs, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)
    assert next(iter(out.keys())) == "loss"
    last = model(**batch.inputs, labels=labels, logits_to_keep=out.logits.shape[1] - 2)
    assert last.logits.shape[1] == out.logits.shape[1] - 2
    text = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask, "labels": labels}
    plain = model(**text).loss
    assert torch.equal(model(**text, visual_mask=torch.zeros_like(batch.visual_mask)).loss, plain)


# Cost


class LargestTensor(TorchDispatchMode):
    """Note the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("queries", ["last_prompt", "before_answers"])
@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_length(queries):
    model = build()
    patch(model, "attention@1:0.5,uniform@3:0.2", queries=queries)
    sizes = []
    for num_visual in (1000, 2000):
        batch = prompt([4, num_visual, 12])
        with LargestTensor() as largest:
            model(**batch.inputs, use_cache=True, logits_to_keep=1)
        sizes.append(largest.numel)
    assert sizes[1] < 2.1 * sizes[0]
    assert sizes[1] < 2000**2 / 10
