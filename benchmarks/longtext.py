"""What long text costs in training: losses in chunks, the three keys that save memory, and the tiny model's speed.

    python benchmarks/longtext.py [--lengths 4096 8192 16384 32768] [--quick]

Losses are measured with torch's profiler. What a card of 141 GB holds is counted at 7B shapes on steps without numbers
(`hico.train.footprint`), and the count is held against the profiler on a model that fits here.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measure import peak_megabytes
from transformers import AutoModelForCausalLM, Qwen2Config

from hico import HicoConfig
from hico.ops.chunks import sum_over_chunks
from hico.train.footprint import MemoryKeys, footprint
from hico.train.lm_head import with_text_loss
from hico.train.memory import chunk_mlps

CARD = 141e9
KEYS = {
    "none": {},
    "mlp_chunk": {"mlp_chunk": 2048},
    "offload_activations": {"offload_activations": True},
    "both": {"mlp_chunk": 2048, "offload_activations": True},
}
SMALL = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1 << 20}


def lm(**sizes: int) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(Qwen2Config(**SMALL, **sizes)).train()


def step(model: torch.nn.Module, length: int, ids: torch.Tensor | None = None) -> None:
    ids = torch.randint(model.config.vocab_size, (1, length)) if ids is None else ids
    model(input_ids=ids, labels=ids).loss.backward()


def cpu_seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def backward(function, *tensors: torch.Tensor, size: int) -> None:
    sum_over_chunks(function, *tensors, size=size).backward()


def losses(lengths: list[int], vocabulary: int = 16_000) -> None:
    """The loss of hidden states: in chunks, against cross entropy of all logits."""
    print(f"\nloss, forward and backward: all logits over {vocabulary:,} words at once, against chunks of 512 tokens")
    print(f"{'tokens':>8} {'at once MB':>11} {'chunks MB':>10} {'less':>6} {'CPU s':>7} {'CPU s':>7} {'time':>6}")
    head = torch.nn.Linear(128, vocabulary, bias=False)

    def loss(hidden_nE: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden_nE).float(), targets_n, reduction="sum")

    for length in lengths:
        hidden, targets = torch.randn(length, 128, requires_grad=True), torch.randint(vocabulary, (length,))
        ways = [partial(backward, loss, hidden, targets, size=size) for size in (length, 512)]
        memory = [peak_megabytes(way, device="cpu") for way in ways]
        seconds = [cpu_seconds(way) for way in ways]
        print(
            f"{length:>8,} {memory[0]:>11,.0f} {memory[1]:>10,.0f} {memory[0] / memory[1]:>5.1f}x "
            f"{seconds[0]:>7.1f} {seconds[1]:>7.1f} {seconds[1] / seconds[0]:>5.2f}x",
            flush=True,
        )


def vocabularies(lengths: list[int]) -> None:
    """Peak memory against the vocabulary, at lengths that double."""
    print("\nvocabulary: peak MB of a step beside weights, chunks of 256 tokens")
    print(f"{'tokens':>8} {'32,000':>10} {'152,064':>10} {'difference':>11}")
    for length in lengths:
        found = []
        for size in (32_000, 152_064):
            model = with_text_loss(lm(intermediate_size=512, num_hidden_layers=2, vocab_size=size), loss_chunk=256)
            found.append(peak_megabytes(partial(step, model, length), device="cpu"))
        print(f"{length:>8,} {found[0]:>10,.0f} {found[1]:>10,.0f} {found[1] - found[0]:>11,.0f}", flush=True)


def check_count(length: int) -> None:
    """Hold what is counted against what the profiler measures."""
    sizes = {"intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 4000}
    print(f"\ncounted without numbers against measured on this CPU: 4 layers, {length:,} tokens, MB")
    for name, keys in (("plain", {}), ("mlp_chunk", {"mlp_chunk": 256})):
        model = with_text_loss(lm(**sizes), loss_chunk=256)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if keys:
            chunk_mlps(model, 256)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        measured = peak_megabytes(partial(step, model, length), device="cpu")
        counted = footprint(model.config, MemoryKeys(loss_chunk=256, **keys)).at(length) / 1e6
        print(f"  {name:<12} {counted:>8.1f} {measured:>8.1f}  ratio {counted / measured:.3f}", flush=True)


def card() -> None:
    """What a card holds of a 7B model, by bytes per token."""
    config = HicoConfig.preset("longva-7b").text_config
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    fixed = 4.0 * weights
    print(
        f"\nQwen2-7B shapes on a card of 141 GB: bfloat16 weights and gradients ({fixed / 1e9:.1f} GB), the optimizer"
    )
    print("optimizer on the host, checkpointed layers, chunks of 2,048 tokens; attention that keeps no scores")
    print(f"{'keys':<22} {'bytes a token':>14} {'longest':>12}")
    for name, keys in KEYS.items():
        counted = footprint(config, MemoryKeys(weights=torch.bfloat16, **keys))
        slope = max(slope for _, slope in counted.lines)
        print(f"{name:<22} {slope:>14,.0f} {counted.longest(CARD - fixed):>12,}", flush=True)


def text_speed(num_steps: int) -> None:
    """Tokens per second of text extension with the tiny model."""
    from hico.tiny.model import write_untrained
    from hico.train import run
    from hico.train.recipes import make_recipe

    with tempfile.TemporaryDirectory() as folder:
        write_untrained(Path(folder) / "model")
        (Path(folder) / "text.txt").write_text("a red circle moves left then a blue square moves right . " * 20_000)
        recipe = make_recipe(
            {
                **{"extends": "text", "model": f"{folder}/model", "output_dir": f"{folder}/out", "max_length": 2048},
                **{"data": [{"json_path": f"{folder}/text.txt"}], "max_steps": num_steps, "bf16": False},
                **{"use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True},
                **{"save_strategy": "no", "logging_steps": num_steps // 2},
            }
        )
        prepared = run.prepare(recipe)
        trainer = run.make_trainer(recipe, run.training_arguments(recipe), prepared)
        trainer.train()
        found = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
        print(f"\ntext extension of the tiny model, sequences of 2,048: {found[-1]:,.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--quick", action="store_true", help="the first length alone, and fewer steps")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths = args.lengths[:1] if args.quick else args.lengths
    card()
    check_count(4096)
    text_speed(4 if args.quick else 10)
    vocabularies([1024, 2048] if args.quick else [1024, 2048, 4096])
    losses(lengths)


if __name__ == "__main__":
    main()
