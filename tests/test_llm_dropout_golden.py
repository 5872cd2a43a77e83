"""Progressive visual dropout against the numbers of the published system."""

import pytest
import torch
from helpers import GoldenCase, golden_cases
from transformers import Qwen2Config, Qwen2ForCausalLM

from hico.llm_dropout import DropSchedule, patch
from hico.ops.dropping import keep_count, uniform_keep_indices

CASES = [case for case in golden_cases("D") if case.path.suffix == ".safetensors" and "seed" in case.config]
INFERENCE = [case for case in CASES if "llm_compress" in case.config]
TRAINING = [case for case in CASES if "turns" in case.config]
COUNTS = [case for case in golden_cases("D") if "counts" in case.facts]
pytestmark = pytest.mark.golden


def by_name(cases: list[GoldenCase]):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def build_model(case: GoldenCase) -> Qwen2ForCausalLM:
    known = Qwen2Config().to_dict()
    settings = {key: value for key, value in case.config.items() if key in known}
    rope = {"rope_type": "default", "rope_theta": case.config["rope_theta"]}
    model = Qwen2ForCausalLM(Qwen2Config(**settings, rope_parameters=rope)).eval()
    model.load_state_dict(case.weights)
    return model


def published_schedule(case: GoldenCase) -> DropSchedule:
    if not case.config.get("llm_compress", True):
        return DropSchedule()
    return DropSchedule.from_published(
        case.config["llm_compress_type"],
        case.config["llm_compress_layer_list"],
        case.config["llm_image_token_ratio_list"],
    )


def spans(starts: list[int], counts: list[int], length: int) -> torch.Tensor:
    mask = torch.zeros(len(starts), length, dtype=torch.long)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        mask[row, start : start + count] = 1
    return mask


class LayerInputs:
    """Record hidden states and rotary positions that enter each layer."""

    def __init__(self, model: Qwen2ForCausalLM):
        self.hidden, self.positions = [], []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, layer, args, kwargs):
        self.hidden.append(args[0].detach())
        self.positions.append(kwargs["position_ids"].detach())


@by_name(INFERENCE)
@torch.no_grad()
def test_prefill_and_cached_decoding_match(case):
    model = build_model(case)
    schedule = published_schedule(case)
    handle = patch(model, schedule, queries="published")
    seen = LayerInputs(model)
    embeds, start = case["inputs_embeds"], case.config["image_position"]
    visual_mask = spans([start], [case.config["visual_len"]], embeds.shape[1])

    out = model(inputs_embeds=embeds, visual_mask=visual_mask, use_cache=True)
    lengths = [hidden.shape[1] for hidden in seen.hidden]
    assert lengths == case["hidden_len_per_layer"].tolist()
    for name in case.tensors:
        if name.startswith("hidden_into_layer"):
            case.assert_close(seen.hidden[int(name.removeprefix("hidden_into_layer"))][0], name)
    case.assert_close(out.logits[0, -1], "prefill_logits_last")
    case.assert_close(out.logits[0, -case.config["suffix_len"] :], "prefill_logits_suffix")
    if "prefill_positions_last" in case.tensors:
        assert [p[0, -1].item() for p in seen.positions] == case["prefill_positions_last"].tolist()
    check_stages(case, schedule, getattr(out, "drop_plan", None), row=0, start=start)

    cache, tokens, step_logits, positions = out.past_key_values, [], [out.logits[0, -1]], []
    for _ in range(len(case["tokens"]) - 1):
        tokens.append(step_logits[-1].argmax())
        seen.positions.clear()
        out = model(input_ids=tokens[-1].view(1, 1), past_key_values=cache, use_cache=True)
        step_logits.append(out.logits[0, -1])
        positions.append([p.item() for p in seen.positions])
    tokens.append(step_logits[-1].argmax())
    case.assert_close(torch.stack(tokens), "tokens")
    case.assert_close(torch.stack(step_logits), "step_logits")
    assert positions == case["decode_positions"].tolist()
    assert [cache.get_seq_length(layer) for layer in range(len(cache))] == [n + len(positions) for n in lengths]

    handle.remove()


@by_name(INFERENCE)
def test_generate_matches(case):
    model = build_model(case)
    patch(model, published_schedule(case), queries="published")
    embeds = case["inputs_embeds"]
    visual_mask = spans([case.config["image_position"]], [case.config["visual_len"]], embeds.shape[1])
    num_tokens = len(case["tokens"])
    tokens = model.generate(
        inputs_embeds=embeds, visual_mask=visual_mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens
    )
    case.assert_close(tokens[0], "tokens")


@by_name(TRAINING)
def test_training_matches(case):
    model = build_model(case)
    schedule = published_schedule(case)
    patch(model, schedule, queries="published")
    seen = LayerInputs(model)
    embeds = case["inputs_embeds"].clone().requires_grad_()
    starts, labels = case.config["image_positions"], case["labels"]
    out = model(
        inputs_embeds=embeds,
        attention_mask=case["attention_mask"],
        visual_mask=spans(starts, case.config["visual_lens"], embeds.shape[1]),
        labels=labels,
        use_cache=False,
    )
    out.loss.backward()

    assert [hidden.shape[1] for hidden in seen.hidden] == case["hidden_len_per_layer"].tolist()
    case.assert_close(out.loss.detach(), "loss")
    new_labels = out.drop_plan.gather(labels, fill=-100)
    real = out.drop_plan.gather(case["attention_mask"], fill=0).bool()
    case.assert_close(new_labels[real], case["new_labels"][real])
    case.assert_close(out.logits.detach()[real], case["logits"][real])
    case.assert_close(embeds.grad, "grad_inputs_embeds")
    for name, expected in case.tensors.items():
        if name.startswith("grad_norm."):
            case.assert_close(model.get_parameter(name.removeprefix("grad_norm.")).grad.norm(), expected)
    for row, start in enumerate(starts):
        check_stages(case, schedule, out.drop_plan, row=row, start=start)


def check_stages(case, schedule, plan, *, row, start):
    """Compare kept indices, relative to the span as it entered a stage, and scores."""
    prefix = f"sample{row}." if f"sample{row}.stage0.kept" in case.tensors else ""
    entering = torch.arange(case.config.get("visual_lens", [case.config.get("visual_len")])[row])
    for place, stage in enumerate(schedule.stages):
        name = f"{prefix}stage{place}"
        if prefix == "" and "turns" in case.config:
            continue  # the row has no golden stages
        columns = plan.kept_at(stage.layer)[row] - start
        kept = columns[torch.isin(columns, entering)]
        if f"{name}.kept" in case.tensors:
            case.assert_close(torch.searchsorted(entering, kept), f"{name}.kept")
        if f"{name}.kept_original" in case.tensors:
            case.assert_close(kept, f"{name}.kept_original")
        if f"{name}.scores" in case.tensors:
            case.assert_close(plan.scores_at(stage.layer)[row, start + entering], f"{name}.scores")
        entering = kept


@by_name(COUNTS)
def test_counts_and_uniform_indices_match(case):
    for num_tokens, ratio, expected in case.facts["counts"]["rows"]:
        assert keep_count(num_tokens, ratio) == expected
    for row in case.facts["uniform"]:
        assert uniform_keep_indices(row["n"], row["keep"]).tolist() == row["indices"]
