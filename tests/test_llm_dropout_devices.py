"""Progressive visual dropout on several processes, and on a GPU."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from dropout_reference import TINY, WIDTH, build, close, prompt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import is_flash_attn_2_available

from hico.llm_dropout import patch
from hico.rotary import keep_rotary_in_float32

SCHEDULE = "uniform@1:0.6,attention@3:0.3"
ROWS = ([5, 14, 4, 6, 6], [3, 6, 9])


def loss_of_row(model, number):
    batch = prompt(ROWS[number], seed=number)
    labels = torch.full(batch.visual_mask.shape, -100)
    labels[0, -4:] = torch.arange(4) + 3
    return model(**batch.inputs, labels=labels, use_cache=False).loss


def ddp_worker(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = build()
    patch(model, SCHEDULE)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model.train(), find_unused_parameters=True)  # the prompt comes embedded
    loss_of_row(wrapped, rank).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def tensor_parallel_worker(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == WIDTH // 2
    patch(model, "attention@1:0.5,attention@3:0.2")
    with torch.no_grad():
        out = model(**prompt([4, 12, 3], [2, 6, 5]).inputs)
    torch.save([out.logits, out.drop_plan.kept_indices, out.drop_plan.scores_at(1)], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_processes_that_share_the_heads_keep_what_one_process_keeps(tmp_path):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**TINY, "vocab_size": 62})).eval()
    model.save_pretrained(tmp_path)
    mp.spawn(tensor_parallel_worker, (free_port(), tmp_path), nprocs=2)
    patch(model, "attention@1:0.5,attention@3:0.2")
    with torch.no_grad():
        out = model(**prompt([4, 12, 3], [2, 6, 5]).inputs)
    for rank in range(2):
        logits, kept, scores = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(kept, out.drop_plan.kept_indices)
        close(scores, out.drop_plan.scores_at(1))
        close(logits[kept >= 0], out.logits[kept >= 0])


def sharded_worker(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh, model = init_device_mesh("cpu", (2,)), build()
    for index, layer in enumerate(model.model.layers):
        if index < 2:  # one may shard attention apart from its layer, too
            fully_shard(layer.self_attn, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    patch(model, "attention@1:0.6,attention@3:0.3")
    loss_of_row(model, rank).backward()
    torch.save(
        {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None},
        folder / f"{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def test_processes_that_share_the_weights_train_as_one(tmp_path):
    mp.spawn(sharded_worker, (free_port(), tmp_path), nprocs=2)
    model = build()
    patch(model, "attention@1:0.6,attention@3:0.3")
    ((loss_of_row(model, 0) + loss_of_row(model, 1)) / 2).backward()
    gradients = torch.load(tmp_path / "0.pt")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_an_offloaded_model_computes_the_same():
    model, batch = build(), prompt([4, 12, 3], [2, 6, 5])
    patch(model, "attention@1:0.5,attention@3:0.2")
    expected = model.generate(**batch.inputs, max_new_tokens=4, min_new_tokens=4)
    logits = model(**batch.inputs).logits
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(**batch.inputs).logits, logits)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.generate(**batch.inputs, max_new_tokens=4, min_new_tokens=4), expected)
    remove_hook_from_submodules(model)
    wrapped = build()
    for layer in wrapped.model.layers:  # as a device map does
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    patch(wrapped, "attention@1:0.5,attention@3:0.2")
    assert torch.equal(wrapped(**batch.inputs).logits, logits)


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_their_rows(tmp_path):
    mp.spawn(ddp_worker, (free_port(), tmp_path), nprocs=2)
    model = build().train()
    patch(model, SCHEDULE)
    ((loss_of_row(model, 0) + loss_of_row(model, 1)) / 2).backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gpu_computes_what_the_cpu_does(attention, side):
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn")
    batch = prompt([5, 40, 6], [3, 30, 4], [9], side=side)
    expected_model = build()
    patch(expected_model, "uniform@1:0.6,uniform@3:0.3")  # scores in half precision may choose otherwise
    model = build(attention=attention)
    keep_rotary_in_float32(model)
    dtype = torch.bfloat16 if attention == "flash_attention_2" else torch.float32
    model.to("cuda", dtype)
    patch(model, "uniform@1:0.6,uniform@3:0.3")
    inputs = {name: value.cuda() for name, value in batch.inputs.items()}
    inputs["inputs_embeds"] = inputs["inputs_embeds"].to(dtype)
    with torch.no_grad():
        out, expected = model(**inputs, use_cache=True), expected_model(**batch.inputs)
    assert torch.equal(out.drop_plan.kept_indices.cpu(), expected.drop_plan.kept_indices)
    real = expected.drop_plan.kept_indices >= 0
    tolerance = {"rtol": 0.1, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(out.logits.float().cpu()[real], expected.logits[real], **tolerance)
    if side == "left":
        together = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
        assert together.shape == (3, 4)
        for row in range(3):
            alone = {name: value.cuda() for name, value in batch.row(row).inputs.items()}
            alone["inputs_embeds"] = alone["inputs_embeds"].to(dtype)
            if dtype == torch.float32:
                assert torch.equal(model.generate(**alone, max_new_tokens=4, min_new_tokens=4)[0], together[row])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_scoring_on_a_gpu_takes_memory_linear_in_the_length():
    model = build().to("cuda", torch.bfloat16)
    patch(model, "attention@1:0.5,attention@3:0.2")
    peaks = []
    for num_visual in (20_000, 40_000):
        batch = prompt([4, num_visual, 12])
        inputs = {name: value.cuda() for name, value in batch.inputs.items()}
        inputs["inputs_embeds"] = inputs["inputs_embeds"].bfloat16()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**inputs, use_cache=True, logits_to_keep=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]
