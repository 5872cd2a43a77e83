"""Every decoder class of the installed transformers, tiny; and dropping tokens written as attention masks.

``python tests/decoder_zoo.py > docs/decoders.md`` writes the page of what is dropped rightly and what is refused.
"""

import inspect
import warnings

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from hico.compat import UnsupportedDecoder
from hico.llm_dropout import patch

NUM_LAYERS = 4
WINDOW = 9
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    # per-layer inputs
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
}

STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_expand": 2}
SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": WINDOW,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
OVERRIDES = {
    "BambaForCausalLM": {"attn_layer_indices": [1, 3], **STATE_SPACE},
    "CohereCompassForCausalLM": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "DbrxForCausalLM": {
        **{"d_model": 32, "n_heads": 4, "n_layers": NUM_LAYERS},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "Dots3NoteForCausalLM": {
        **{"head_dim": 16, "num_key_value_heads": 4, "shared_experts_intermediate_size": 16, "per_layer_config": {}},
        **{"index_head_dim": 8, "index_n_heads": 2, "index_topk": 8},
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64, **STATE_SPACE},
    "Gemma4ForCausalLM": {"hidden_size_per_layer_input": 0},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"] * 2, **STATE_SPACE},
    "Inkling2ForCausalLM": {**SLIDING, "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": 61},
    "Inkling2LoopForCausalLM": {
        **{**SLIDING, "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": 61, "n_layers_per_attn_res_block": 1},
        **{"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2, "loop_gate_rank": 4},
    },
    "KimiLinearForCausalLM": {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "Qwen4ExpForCausalLM": {
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2},
        **{"linear_num_value_heads": 4, "hc_lowrank": 8, "hc_count": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1},
        **{"indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "RecurrentGemmaForCausalLM": {"lru_width": 32, "attention_window_size": WINDOW, "block_types": ["attention"]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
"""Fields of configurations that `SIZES` does not fit."""

OF_THREE_AXES = [
    *("Cosmos3EdgeTextModel", "Glm4vMoeTextModel", "Glm4vTextModel", "GlmImageTextModel", "GlmOcrTextModel"),
    *("HunYuanVLTextModel", "Qwen2VLTextModel", "Qwen2_5_VLTextModel", "Qwen3VLMoeTextModel", "Qwen3VLTextModel"),
]
THREE_AXES = {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
OVERRIDES |= {name: {"rope_parameters": THREE_AXES} for name in OF_THREE_AXES}
OVERRIDES["Qwen3VLMoeTextModel"]["sliding_window"] = None


def causal_lms() -> list[str]:
    """Name the classes behind `AutoModelForCausalLM`."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return sorted({name for entry in names for name in ([entry] if isinstance(entry, str) else entry)})


def text_decoders() -> list[str]:
    """Name the decoders of multimodal models that have a class of their own."""
    return sorted({name for kind, name in MODEL_MAPPING_NAMES.items() if kind.endswith("_text")})


def build_tiny(name: str, **overrides):
    """Build a class with random weights and four layers, where its configuration takes the sizes.

    Args:
        name: of the class.
        overrides: fields of its configuration.

    Raises:
        Exception: of any kind, where it does not.
    """
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    if any(part.model_type for part in config_class.sub_configs.values()):
        raise ValueError(f"{name} is made of several models")
    torch.manual_seed(0)
    default = config_class()
    default.allow_global_per_layer_attribute_access = True  # of sizes that differ between layers by default
    fixed = {key for key, value in vars(config_class).items() if isinstance(value, property) and value.fset is None}
    sizes = {key: value for key, value in SIZES.items() if key not in fixed and hasattr(default, key)}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # keys are expanded for every head
    kinds = getattr(default, "layer_types", None)
    if kinds is not None and config_class.attribute_map.get("layer_types", "layer_types") not in fixed:
        known = list(dict.fromkeys(kinds))
        sizes["layer_types"] = [known[place % len(known)] for place in range(NUM_LAYERS)]
    config = config_class(**{**sizes, **OVERRIDES.get(name, {}), **overrides})
    config._attn_implementation = "eager"
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if num_parameters > 2_000_000:
        raise ValueError(f"{name} has {num_parameters} parameters")
    model = model_class(config).eval()
    if name in text_decoders():
        model.register_forward_hook(lambda _, args, output: setattr(output, "logits", output.last_hidden_state))
    # Their eager attention returns weights without sinks.
    reports_sinks = name not in ("GraniteMoeSWAForCausalLM", "GraniteSWAForCausalLM")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim < 2 and not parameter.any():
                parameter.normal_(std=0.1)  # biases and sinks start at zero, which would hide them
            if key.endswith("sinks") and not reports_sinks:
                parameter.fill_(-30.0)
    return model


def masked(model, decoder, embeds_1SE, kept_after: dict[int, torch.Tensor], *, renumber: bool):
    """Run the stock model and hide dropped tokens from the layers instead of taking them out.

    Args:
        model: a causal LM with eager attention, not patched.
        decoder: its decoder.
        embeds_1SE: one row.
        kept_after: layer -> bool ``(S,)``, which tokens it and the next ones see.
        renumber: whether positions close the gaps.

    Returns:
        Logits ``(S, V)``; those of dropped tokens mean nothing.
    """
    length = embeds_1SE.shape[1]

    def hide(index, layer, args, kwargs):
        stages = [stage for stage in kept_after if stage <= index]
        if not stages:
            return None
        kept_S = kept_after[max(stages)]
        places_S = kept_S.long().cumsum(0) - 1
        distance = places_S[:, None] - places_S[None]
        seen = (distance >= 0) & kept_S[None] | torch.eye(length, dtype=torch.bool)
        own = kwargs["attention_mask"]
        window = length if own is None else (own == 0).sum(-1).max()  # tokens that a layer sees, by its eager mask
        seen &= distance < window
        mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
        kwargs = {**kwargs, "attention_mask": mask[None, None]}
        if renumber:
            positions = places_S.clamp(min=0)[None]
            given = inspect.signature(decoder.rotary_emb.forward).parameters
            kind = {"layer_type": decoder.config.layer_types[index]} if "layer_type" in given else {}
            if kwargs["position_embeddings"] is not None:
                axes = positions.expand(3, 1, -1) if decoder.config.rope_parameters.get("mrope_section") else positions
                kwargs["position_embeddings"] = decoder.rotary_emb(embeds_1SE, position_ids=axes, **kind)
            if "position_ids" in kwargs:
                kwargs["position_ids"] = positions
        return args, kwargs

    hooks = [
        layer.register_forward_pre_hook(lambda *a, index=index: hide(index, *a), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    try:
        return model(inputs_embeds=embeds_1SE, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def quietly(function, *args, **kwargs):
    """Call a function without the warnings of transformers."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)
    finally:
        transformers.logging.set_verbosity(level)


PAGE = """# Decoders

What progressive visual dropout does with every causal LM class of transformers {version}, and with every decoder of a
multimodal model that has a class of its own (`...TextModel`), written by
`python tests/decoder_zoo.py > docs/decoders.md`. A class is built tiny, with its own mix of types of layers;
`tests/test_llm_dropout_zoo.py` then holds its scores against its own eager attention, its logits against a slow
restatement, batches against rows, and cached decoding against one call. What is refused is refused with an error that
says why, by `patch` or by the first call that would drop.

## Dropped by any policy ({num_right})
{right}

## Refused ({num_refused})
| reason | classes |
|---|---|
{refused}

## Not tried ({num_untried})
Built of several models, or not to be had with a few thousand weights: {untried}.
"""


def verdict(name: str) -> str | None:
    """Say why a class is refused; None if it is not.

    Raises:
        Exception: of any kind, if it cannot be built tiny.
    """
    model = build_tiny(name)
    embeds = torch.randn(1, 12, model.get_input_embeddings().weight.shape[1])
    visual_mask = torch.zeros(1, 12, dtype=torch.long)
    visual_mask[:, 2:9] = 1
    try:
        with torch.no_grad(), patch(model, "attention@1:0.5"):
            model(inputs_embeds=embeds, visual_mask=visual_mask, use_cache=False)
    except UnsupportedDecoder as refusal:
        return str(refusal).partition(f"transformers {transformers.__version__} ")[2].partition(";")[0]
    return None


def write_page() -> str:
    """Write the page about the installed transformers."""
    right, refused, untried = [], {}, []
    for name in [*causal_lms(), *text_decoders()]:
        try:
            reason = quietly(verdict, name)
        except Exception:
            untried.append(name)
            continue
        if reason is None:
            right.append(name)
        else:
            refused.setdefault(reason, []).append(name)
    rows = sorted(refused.items(), key=lambda row: (-len(row[1]), row[0]))
    return PAGE.format(
        version=transformers.__version__,
        num_right=len(right),
        right=", ".join(right),
        num_refused=sum(map(len, refused.values())),
        refused="\n".join(f"| {reason} | {', '.join(names)} |" for reason, names in rows),
        num_untried=len(untried),
        untried=", ".join(untried),
    )


if __name__ == "__main__":
    print(write_page(), end="")
