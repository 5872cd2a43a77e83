"""InternVideo2's forward pass, restated from its formulas alone, head by head and in float64."""

import math

import torch
from torch import Tensor


def encode(weights: dict[str, Tensor], clips_NTCHW: Tensor, *, num_heads: int) -> Tensor:
    """Encode clips of the size that the position tables were made for.

    Args:
        weights: by their published names, what follows ``vision_tower.vision_tower.``; either name of a scale.
        clips_NTCHW: clips or, with T = 1, images.
        num_heads: attention heads.

    Returns:
        ``(N, L, D)`` float64, without the class token.
    """
    weights = {name.replace(".gamma", ".weight"): weight.double() for name, weight in weights.items()}
    num_blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    table = weights["img_pos_embed" if clips_NTCHW.shape[1] == 1 else "pos_embed"][0]
    rows = []
    for clip_TCHW in clips_NTCHW.double():
        tokens_LD = torch.stack([weights["cls_token"][0, 0], *_patches(weights, clip_TCHW)]) + table
        for index in range(num_blocks):
            prefix = f"blocks.{index}."
            block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            attended = _attention(block, _rms(tokens_LD) * block["norm1.weight"], num_heads)
            tokens_LD = tokens_LD + block["ls1.weight"] * attended
            hidden = _linear(block, "mlp.fc1", _rms(tokens_LD) * block["norm2.weight"])
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            tokens_LD = tokens_LD + block["ls2.weight"] * _linear(block, "mlp.fc2", hidden)
        rows.append(tokens_LD[1:])
    return torch.stack(rows)


def _patches(weights: dict[str, Tensor], clip_TCHW: Tensor) -> list[Tensor]:
    """Return the tokens of the patches, frame by frame, row by row."""
    kernel, bias = weights["patch_embed.proj.weight"][:, :, 0], weights["patch_embed.proj.bias"]
    side = kernel.shape[-1]
    return [
        torch.einsum("dchw,chw->d", kernel, frame[:, top : top + side, left : left + side]) + bias
        for frame in clip_TCHW
        for top in range(0, frame.shape[1], side)
        for left in range(0, frame.shape[2], side)
    ]


def _rms(tokens_LD: Tensor) -> Tensor:
    return tokens_LD / torch.sqrt((tokens_LD**2).mean(dim=-1, keepdim=True) + 1e-6)


def _linear(block: dict[str, Tensor], name: str, tokens_LD: Tensor) -> Tensor:
    return tokens_LD @ block[f"{name}.weight"].T + block[f"{name}.bias"]


def _attention(block: dict[str, Tensor], tokens_LD: Tensor, num_heads: int) -> Tensor:
    width = tokens_LD.shape[-1]
    query, key, value = (tokens_LD @ part.T for part in block["attn.qkv.weight"].split(width))
    query = _rms(query) * block["attn.q_norm.weight"]
    key = _rms(key) * block["attn.k_norm.weight"]
    size = width // num_heads
    heads = []
    for head in range(num_heads):
        mine = slice(head * size, (head + 1) * size)
        scores_LL = query[:, mine] @ key[:, mine].T / math.sqrt(size)
        heads.append(scores_LL.softmax(dim=-1) @ value[:, mine])
    return _linear(block, "attn.proj", torch.cat(heads, dim=-1))
