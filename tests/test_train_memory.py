"""Every way to save memory leaves losses and gradients as they are, and does save it."""

import pytest
import torch
from text_corpus import SIZES, text_recipe, write_documents, write_lm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_corpus import make, trainer_for
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteMoeConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    TrainerCallback,
)
from transformers.models.gpt_oss import GptOssConfig

from hico.ops.chunks import map_over_chunks, sum_over_chunks
from hico.train.lm_head import with_text_loss
from hico.train.memory import Offloader, chunk_mlps, offload_activations

KEYS = {
    "loss_chunk": {"loss_chunk": 3},
    "mlp_chunk": {"mlp_chunk": 5},
    "offload_activations": {"offload_activations": True, "gradient_checkpointing": True},
    "all": {"loss_chunk": 3, "mlp_chunk": 5, "offload_activations": True, "gradient_checkpointing": True},
}


class Recorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_step(recipe):
    """Make a step; return its loss and gradients."""
    trainer, recorder = trainer_for(recipe), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return trainer.state.log_history[0]["loss"], recorder.gradients


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


# Recipes ---------------------------------------------------------------------------------------------------------


ANSWERS = {"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 4}
OBJECTIVES = {
    "all parts": ANSWERS,
    "frozen LLM": {**ANSWERS, "trainable": ["projector"]},
    "LoRA": {**ANSWERS, "trainable": ["projector"], "lora": {"r": 2}},
}


@pytest.fixture(scope="module")
def plain_steps():
    return {}


@pytest.mark.parametrize(
    ("objective", "key"), [*(("all parts", key) for key in KEYS), ("frozen LLM", "all"), ("LoRA", "all")]
)
def test_answers_are_learned_as_without(folder, objective, key, plain_steps):
    changes = OBJECTIVES[objective]
    if "lora" in changes:
        pytest.importorskip("peft")
    if objective not in plain_steps:
        plain_steps[objective] = first_step(make(folder, **changes))
    found = first_step(make(folder, **changes, **KEYS[key]))
    assert found[1]
    assert_same(found, plain_steps[objective])


@pytest.mark.parametrize("key", ["all"])
def test_text_is_learned_as_without(tmp_path, key):
    write_lm(tmp_path / "lm")
    write_documents(tmp_path)
    common = {"max_steps": 1, "max_grad_norm": 0.0}
    expected = first_step(text_recipe(tmp_path, **common))
    assert_same(first_step(text_recipe(tmp_path, **common, **KEYS[key])), expected)


def test_what_saves_nothing_is_an_error(folder):
    with pytest.raises(ValueError, match="offload_activations moves what gradient checkpointing saves"):
        make(folder, offload_activations=True)
    with pytest.raises(ValueError, match="objective tracks trains no LLM; leave out loss_chunk, mlp_chunk"):
        make(folder, objective="tracks", trainable=["encoder"], loss_chunk=2, mlp_chunk=4)
    with pytest.raises(ValueError, match="loss_chunk is 0; it must be at least 1"):
        make(folder, loss_chunk=0)


# Models ----------------------------------------------------------------------------------------------------------


ENABLE = "activation_checkpointing_enable"  # its name from transformers 5.24 on
MOE = {**SIZES, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "capped logits": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5),
    "tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**MOE, initializer_range=0.3),
    "qwen3_moe": Qwen3MoeConfig(**MOE, head_dim=8, initializer_range=0.3),
}


def build(config, *, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def checkpoint_layers(model):
    getattr(model, ENABLE, model.gradient_checkpointing_enable)()


def loss_and_gradients(model, *, scale=1.0):
    ids = torch.randint(250, (2, 23), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids.masked_fill(ids < 20, -100)).loss * scale
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("scale", [1.0, 37.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_are_equal_for_llms_of_any_kind_also_when_the_loss_is_scaled(name, scale):
    expected = loss_and_gradients(build(CONFIGS[name]), scale=scale)
    model = build(CONFIGS[name])
    with_text_loss(model, loss_chunk=7)
    chunk_mlps(model, 5)
    checkpoint_layers(model)
    offload_activations(model, Offloader(Moved(), least=1))
    found = loss_and_gradients(model, scale=scale)
    tolerance = {"atol": 1e-5 * scale, "rtol": 1e-5}
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, **tolerance, msg=key)


def test_an_mlp_that_cannot_be_cut_is_refused():
    model = build(GptOssConfig(**MOE, head_dim=8, sliding_window=8))
    with pytest.raises(ValueError, match=r"GptOssDecoderLayer .* has an `mlp` that returns more than hidden states"):
        chunk_mlps(model, 4)
    model = build(GraniteMoeConfig(**MOE))
    with pytest.raises(ValueError, match=r"GraniteMoeDecoderLayer .* has no `mlp` of hidden states alone, but none"):
        chunk_mlps(model, 4)


class Sizes(TorchDispatchMode):
    """Note the shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(value.shape) for value in tree_leaves(result) if isinstance(value, torch.Tensor)}
        return result

    def with_last(self, width):
        """Return the tokens of the largest tensor whose last axis is ``width``."""
        return max(torch.Size(shape[:-1]).numel() for shape in self.shapes if shape and shape[-1] == width)


def test_neither_logits_nor_wide_activations_exist_for_more_than_a_chunk():
    model = build(Qwen2Config(**{**SIZES, "intermediate_size": 44}))
    with Sizes() as sizes:
        loss_and_gradients(model)
    assert (sizes.with_last(320), sizes.with_last(44)) == (46, 46)
    with_text_loss(model, loss_chunk=8)
    chunk_mlps(model, 3)
    with Sizes() as sizes:
        loss_and_gradients(model)
    assert sizes.with_last(320) <= 16  # of weights and their gradients
    assert sizes.with_last(44) <= 16


# Offloading ------------------------------------------------------------------------------------------------------


class Moved:
    """Copies tensors as a device would move them, and notes what happens."""

    def __init__(self):
        self.events, self.num_sent = [], 0

    def send(self, tensor):
        self.events.append(("send", self.num_sent))
        self.num_sent += 1
        return {"number": self.num_sent - 1, "tensor": tensor.detach().clone()}

    def wait_until_gone(self, copy):
        self.events.append(("gone", copy["number"]))

    def prefetch(self, copy):
        self.events.append(("prefetch", copy["number"]))

    def fetch(self, copy):
        self.events.append(("fetch", copy["number"]))
        return copy["tensor"].clone()


def test_two_tensors_leave_at_a_time_and_one_comes_back_beside_each_layer():
    model, moved = build(Qwen2Config(**{**SIZES, "num_hidden_layers": 4})), Moved()
    checkpoint_layers(model)
    offload_activations(model, Offloader(moved, least=1))
    for _ in range(2):
        moved.events.clear()
        moved.num_sent = 0
        loss_and_gradients(model)
        out = [("send", 0), ("send", 1), ("gone", 0), ("send", 2), ("gone", 1), ("send", 3)]
        back = [
            ("fetch", 3),
            ("prefetch", 2),
            ("fetch", 2),
            ("prefetch", 1),
            ("fetch", 1),
            ("prefetch", 0),
            ("fetch", 0),
        ]
        assert moved.events == [*out, *back]


def test_a_pass_that_nobody_goes_back_through_is_forgotten():
    model, moved = build(Qwen2Config(**SIZES)), Moved()
    checkpoint_layers(model)
    offload_activations(model, Offloader(moved, least=1))
    expected = loss_and_gradients(build(Qwen2Config(**SIZES)))
    model(input_ids=torch.arange(9)[None])
    moved.events.clear()
    assert_same(loss_and_gradients(model), expected)
    assert ("prefetch", 1) not in moved.events[-3:]


def test_there_is_nothing_to_offload_without_checkpointing():
    with pytest.raises(ValueError, match="no layer is checkpointed"):
        offload_activations(build(Qwen2Config(**SIZES)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_activations_come_back_from_the_host_as_they_were():
    expected = loss_and_gradients(build(CONFIGS["qwen2"]))
    model = build(CONFIGS["qwen2"]).cuda()
    checkpoint_layers(model)
    offload_activations(model, Offloader(least=1))
    ids = torch.randint(250, (2, 23), generator=torch.Generator().manual_seed(0)).cuda()
    model(input_ids=ids, labels=ids.masked_fill(ids < 20, -100)).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), expected[1][name], atol=1e-4, rtol=1e-4, msg=name)


# Chunks ----------------------------------------------------------------------------------------------------------


def test_chunks_of_nothing_and_of_one_are_the_function_itself():
    empty = torch.zeros(0, 3)
    assert sum_over_chunks(lambda x: x.sum(), empty, size=4) == 0
    assert map_over_chunks(lambda x: x * 2, empty, size=4).shape == (0, 3)
    hidden = torch.randn(2, 9, 3)
    torch.testing.assert_close(map_over_chunks(torch.tanh, hidden, size=4), hidden.tanh())
    with torch.no_grad():
        torch.testing.assert_close(map_over_chunks(torch.tanh, hidden, size=100), hidden.tanh())
