"""Tiny models, batches and runs that one process and several must agree on."""

import copy
import multiprocessing
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2ForCausalLM

from hico import HicoConfig, HicoForConditionalGeneration
from hico.parallel import make_mesh, patch

ENCODER = {"name": "umt", "image_size": 24, "patch_size": 12, "hidden_size": 16, "depth": 2, "num_heads": 2}
VIDEO, IMAGE = 151_656, 151_655


@dataclass(frozen=True)
class Case:
    """What is trained, and on what.

    Args:
        heads: query and key-value heads.
        batch: name of a function below.
        ulysses: asked-for Ulysses size.
        size: processes that share a sequence; all if omitted.
        wrap: how data parallelism is done.
        drop: schedule of visual dropout.
        drop_options: of `set_drop_schedule`.
        video: video compressor that keeps up to all tokens, or whose placeholders the settings of the batch count.
        checkpointing: recompute layers in the backward pass.
        settings: of the batch.
    """

    heads: tuple[int, int] = (4, 4)
    batch: str = "videos"
    ulysses: int | None = None
    size: int | None = None
    wrap: str | None = None
    drop: str | None = None
    drop_options: dict = field(default_factory=dict)
    video: dict | None = None
    checkpointing: bool = False
    settings: dict = field(default_factory=dict)


def build(case: Case) -> HicoForConditionalGeneration:
    """Build a model with weights large enough for attention to differ from token to token."""
    heads, groups = case.heads
    text = {
        "model_type": "qwen2",
        "hidden_size": 8 * heads,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    config = HicoConfig.preset("tiny", encoder=ENCODER, text_config=text)
    config.compressor = {"name": "token_merge", "tokens_per_frame": 2, "tokens_per_image": 2}
    config.video_token_id, config.image_token_id = 62, 63
    torch.manual_seed(0)
    model = HicoForConditionalGeneration(config).train()
    if case.drop:
        model.set_drop_schedule(case.drop, **case.drop_options)
    model.set_video_compressor(case.video)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def videos(seed: int, *, text=(7, 5, 4), clips=(3, 1), side: str | None = None, per_clip: int = 8) -> dict:
    """One row, or two of which one is padded: text and videos in turn, the end of the text is learned."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(1 if side is None else 2):
        parts = [torch.randint(1, 60, (text[0] + number,), generator=generator)]
        for length, count in zip(text[1:], clips, strict=True):
            parts.append(torch.full((count * per_clip,), 62))
            parts.append(torch.randint(1, 60, (length + 3 * number,), generator=generator))
        rows.append(torch.cat(parts))
    length = max(map(len, rows))
    ids, labels, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100), None
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[number, at], mask[number, at] = row, 1
        answer = torch.where(torch.arange(len(row)) >= len(row) - text[-1], row, -100)
        answer[2] = row[2]
        labels[number, at] = answer
    count = sum(clips) * len(rows)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "pixel_values_videos": torch.randn(count, 4, 3, 24, 24, generator=generator),
        "video_num_clips": torch.tensor(clips * len(rows)),
        "use_cache": False,
    }


def text(seed: int, *, lengths=(37,)) -> dict:
    """Documents in one sequence, all of it learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions, "use_cache": False}


LOADED = ("hico.modeling_hico", "hico.parallel", "transformers.models.qwen2.modeling_qwen2", "torch.distributed.fsdp")
"""Loaded once, by the process that all others are forked from."""
BATCHES = {"videos": videos, "text": text}


def run(case: Case, *, processes: int) -> dict:
    """Train three steps; with several processes, each has a part of every row."""
    model = build(case)
    rank, size = (dist.get_rank(), case.size or processes) if processes > 1 else (0, 1)
    parts = processes // size
    if processes > 1:
        mesh = make_mesh(size, num_key_value_heads=case.heads[1], ulysses=case.ulysses)
        model.set_sequence_parallel(mesh)
        mine = [mesh.data_rank]
    else:
        mine = range(2 if case.wrap else 1)
    called = model
    if processes > 1 and case.wrap == "ddp":
        called = DistributedDataParallel(model)
    if processes > 1 and case.wrap == "fsdp2":
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    found = {"losses": [], "gradients": {}, "kept": None}
    for step in range(3):
        total = 0.0
        for part in mine:
            output = called(**BATCHES[case.batch](10 * step + part, **case.settings))
            loss = output.loss / len(mine)
            loss.backward()
            if step == 0 and output.drop_plan is not None:
                found["kept"] = output.drop_plan.kept_indices
            found["trimmed"] = output.trim is not None
            total += loss.detach()
        for name, parameter in model.named_parameters():
            if processes > 1 and case.wrap is None and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= processes
            if step == 0 and parameter.grad is not None:
                found["gradients"][name] = whole(parameter.grad).clone()
        if processes > 1:  # data-parallel devices have losses of their own
            dist.all_reduce(total)
            total /= size * parts
        found["losses"].append(total)
        optimizer.step()
        optimizer.zero_grad()
    found["weights"] = {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}
    found["losses"] = torch.stack(found["losses"])
    if processes > 1:
        found["split"] = (mesh.ring_size, mesh.ulysses_size)
    return found if rank == 0 else {}


def answers(*, processes: int) -> dict:
    """Run causal LMs without learning: a stock one, and one that sees videos; all of it, and a few positions."""
    torch.manual_seed(0)
    case = Case(heads=(4, 2))
    whole = build(case).eval()
    stock = Qwen2ForCausalLM(copy.deepcopy(whole.config.text_config)).eval()
    if processes > 1:
        mesh = make_mesh(processes, num_key_value_heads=2)
        whole.set_sequence_parallel(mesh)
        patch(stock, mesh)
    found, batch, encoded = {}, videos(0, side="left", clips=(2, 1)), torch.zeros(())

    def count(_, given):
        encoded.add_(len(given[0]))

    whole.model.encoder.register_forward_pre_hook(count)
    ids = text(0)["input_ids"]
    with torch.no_grad():
        for name, keep in (("all", 0), ("last", 3), ("some", torch.tensor([0, 11, 36]))):
            found[f"stock {name}"] = stock(input_ids=ids, logits_to_keep=keep, use_cache=False).logits
            valid = batch["attention_mask"][:, slice(-keep, None) if isinstance(keep, int) else keep].bool()
            found[f"hico {name}"] = whole(**batch, logits_to_keep=keep).logits[valid]
    if processes > 1:
        dist.all_reduce(encoded)
    loss = stock(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradient = stock.model.layers[0].self_attn.k_proj.weight.grad
    if processes > 1:
        dist.all_reduce(gradient)
    return found | {"encoded": encoded, "loss": loss.detach(), "gradient": gradient / processes}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Put the parts of a sharded tensor together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def worker(rank: int, processes: int, port: int, folder: Path, jobs: dict) -> None:
    """Do jobs, functions of keywords, one after the other; the first process writes what comes of them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    found = {name: job(processes=processes, **given) for name, (job, given) in jobs.items()}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(processes: int, folder: Path, jobs: dict) -> dict:
    """Do jobs in several processes; return what the first of them found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(list(LOADED))
    mp.start_processes(worker, (processes, port, folder, jobs), nprocs=processes, start_method="forkserver")
    return torch.load(folder / "found.pt")
