"""Peak memory of a prefill that drops by attention: query rows alone, against the attention map written out.

``OMP_NUM_THREADS=1 python benchmarks/dropping.py`` prints a table; ``--preset``, ``--device`` and ``--dtype`` choose
the model. The map is what a model gives out with ``output_attentions``: all rows of the ranking layer, in float32 for
the softmax and then in the model's dtype, of which the last row is read.
"""

import argparse
from unittest.mock import patch as replace

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from hico.bench import NARROW, MemoryWatch
from hico.compat import attention_call
from hico.configuration_hico import HicoConfig
from hico.llm_dropout import patch
from hico.llm_dropout.scoring import score_tokens
from hico.rotary import keep_rotary_in_float32

SCHEDULES = ("none", "uniform@2:0.5", "attention@2:0.5", "fastv", "attention_merge@2:0.5")


def score_by_the_map(layer, hidden_states, kwargs, query_index_BQ, *, window, **unused):
    """Rank as `hico.llm_dropout.scoring.score_tokens` does for one row, by the whole map of a layer."""
    call = attention_call(layer, hidden_states, kwargs, window=window)
    keys_BANC = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    logits_BANN = call.query @ keys_BANC.transpose(2, 3) * call.scaling
    length = logits_BANN.shape[-1]
    later_NN = torch.ones(length, length, dtype=torch.bool, device=logits_BANN.device).triu(1)
    logits_BANN = logits_BANN.masked_fill(later_NN, float("-inf"))
    map_BANN = logits_BANN.softmax(-1, dtype=torch.float32).to(logits_BANN.dtype)
    return map_BANN[:, :, query_index_BQ[0, -1]].float().mean(1)


def measure(model, schedule: str, num_visual: int, *, writes_map: bool) -> tuple[float, list[int]]:
    """Return by how many bytes memory rose, and the tokens that left the last layer."""
    device, dtype = model.device, model.dtype
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, num_visual + 64, model.config.hidden_size, generator=generator).to(device, dtype)
    visual_mask = torch.zeros(1, num_visual + 64, dtype=torch.long, device=device)
    visual_mask[:, 32 : 32 + num_visual] = 1
    score = score_by_the_map if writes_map else score_tokens
    with (
        torch.inference_mode(),
        patch(model, schedule),
        replace("hico.llm_dropout.plan.score_tokens", score),
        MemoryWatch(device) as memory,
    ):
        out = model(inputs_embeds=embeds, visual_mask=visual_mask, use_cache=True, logits_to_keep=1)
    plan = getattr(out, "drop_plan", None)
    return memory.rise, [] if plan is None else plan.kept_indices[0].tolist()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", help="size of the LLM, as HicoConfig.preset names it; a narrow one if omitted")
    parser.add_argument("--layers", type=int, default=4, help="of the LLM (%(default)s)")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    config = HicoConfig.preset(args.preset).text_config if args.preset else Qwen2Config(**NARROW)
    config.num_hidden_layers = args.layers
    config.layer_types = config.layer_types[: args.layers]
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype), attn_implementation="sdpa")
    keep_rotary_in_float32(model.eval())
    print("| visual tokens | schedule | peak MiB | to none | with the map MiB | to none | same tokens |")
    print("|---|---|---|---|---|---|---|")
    for num_visual in args.visual_tokens:
        base = None
        for schedule in SCHEDULES:
            measure(model, schedule, num_visual, writes_map=False)  # warms up
            rise, kept = measure(model, schedule, num_visual, writes_map=False)
            base = base or rise
            cells = [num_visual, schedule, f"{rise / 2**20:.0f}", f"{rise / base:.2f}"]
            if schedule.startswith(("attention", "fastv")):
                with_map, kept_by_map = measure(model, schedule, num_visual, writes_map=True)
                alike = len({*kept} & {*kept_by_map}) / len(kept)
                cells += [f"{with_map / 2**20:.0f}", f"{with_map / base:.2f}", f"{alike:.1%}"]
            print("|", " | ".join(map(str, [*cells, "", "", ""][:7])), "|", flush=True)


if __name__ == "__main__":
    main()
