"""The larger video encoder of VideoChat-Flash: InternVideo2, a transformer over all patches of a clip."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from hico.encoders.base import Grid, num_blocks_to_build
from hico.encoders.vit import MLP, Attention, Block, VideoTransformer, resize_positions


def sincos_table(grid: Grid, width: int) -> Tensor:
    """Compute the position table that training starts with.

    A quarter of the channels tells the time, three eighths the column and three eighths the row, in this order. Each
    part holds the sines of a position ``p`` at frequencies ``10000^(-i / n)``, ``i = 0 .. n - 1``, and then their
    cosines.

    Args:
        grid: steps, rows and columns.
        width: width D of a token, a multiple of 16.

    Returns:
        ``(1, 1 + L, D)`` float32 on the CPU, computed in float64: zeros for the class token, then the positions,
        time-major, then rows.

    Source: Wang et al., "InternVideo2", arXiv:2403.15377.
    """
    axes = [torch.arange(size, dtype=torch.float64, device="cpu") for size in grid]
    time, row, column = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    parts = []
    for position, num_channels in ((time, width // 4), (column, 3 * width // 8), (row, 3 * width // 8)):
        index = torch.arange(num_channels // 2, dtype=torch.float64, device="cpu")
        angles = position[:, None] * 10000 ** (-2 * index / num_channels)
        parts += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, 0, 1, 0))[None].float()


class RMSNorm(nn.RMSNorm):
    """Norm by the root mean square, computed in float32 and rounded to the input's dtype before it is scaled.

    `torch.nn.RMSNorm` rounds once, after scaling, which gives other values in half precision.
    """

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        return self.weight * F.rms_norm(tokens_NLD, self.normalized_shape, eps=self.eps)


class LayerScale(nn.Module):
    """A factor per channel, small at the start of training."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.init_own_weights()

    def init_own_weights(self) -> None:
        initialization.constant_(self.weight, 1e-5)

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        return (tokens_NLD * self.weight).to(tokens_NLD.dtype)


class NormedAttention(Attention):
    """Full self-attention, with queries and keys normed over all heads together."""

    def __init__(self, hidden_size: int, *, num_heads: int, eps: float, attn_implementation: str):
        super().__init__(hidden_size, num_heads=num_heads, attn_implementation=attn_implementation)
        self.q_norm = RMSNorm(hidden_size, eps=eps)
        self.k_norm = RMSNorm(hidden_size, eps=eps)

    def project(self, tokens_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(tokens_NLD)
        # Under autocast the norms are wider than the value.
        return self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype), value


class InternVideo2Encoder(VideoTransformer):
    """Encode clips with attention over all frames and a class token jointly; the class token is dropped at the end.

    The defaults are the tower of 1 billion parameters. Parameters carry the published names, so loading is a change of
    prefix. Positions are parameters: a table for clips and one for images, which are clips of one frame. Any number of
    frames is taken, and any sides that are multiples of the patch, whatever ``image_size`` says: the tables are
    resized to the grid of the clip if it is another than that of pretraining, and remain as they are in the state
    dict.

    Args:
        image_size: pixels per side that frames are resized to.
        hidden_size: width D, a multiple of 16.
        intermediate_size: width of a block's MLP.
        depth: blocks of the pretrained network; see ``return_index``.
        num_heads: attention heads.
        patch_size: pixels per side of a patch.
        return_index: the block whose output is returned, counted from the end: -1 is the last one. No norm follows it,
            and later blocks are not built.
        pretrained_frames: steps of the position table for clips.
        pretrained_side: rows and columns of both tables.
        attn_implementation: ``"sdpa"``, ``"flash_attention_2"`` or ``"eager"``.

    Raises:
        ValueError: if the settings contradict each other.
        ImportError: if the attention needs a package that is not installed.

    Source: Wang et al., "InternVideo2", arXiv:2403.15377; settings of VideoChat-Flash, arXiv:2501.00574. The released
    code takes clips of 1 or 4 frames at 224 pixels only.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        hidden_size: int = 1408,
        intermediate_size: int = 6144,
        depth: int = 40,
        num_heads: int = 16,
        patch_size: int = 14,
        return_index: int = -2,
        pretrained_frames: int = 4,
        pretrained_side: int = 16,
        attn_implementation: str = "sdpa",
    ):
        if hidden_size % 16:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of 16, as time, rows and columns share it")
        eps = 1e-6
        super().__init__(
            lambda: Block(
                NormedAttention(hidden_size, num_heads=num_heads, eps=eps, attn_implementation=attn_implementation),
                MLP(hidden_size, intermediate_size),
                norm=lambda: RMSNorm(hidden_size, eps=eps),
                scale=lambda: LayerScale(hidden_size),
            ),
            num_blocks=num_blocks_to_build(depth, return_index, setting="return_index"),
            image_size=image_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            patch_size=patch_size,
        )
        self.pretrained_grid: Grid = (pretrained_frames, pretrained_side, pretrained_side)
        num_patches = pretrained_side**2
        self.cls_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + pretrained_frames * num_patches, hidden_size))
        self.img_pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, hidden_size))
        self.init_own_weights()

    def init_own_weights(self) -> None:
        """Initialise class token and position tables."""
        initialization.normal_(self.cls_token, std=0.02)
        initialization.copy_(self.pos_embed, sincos_table(self.pretrained_grid, self.hidden_size))
        initialization.copy_(self.img_pos_embed, sincos_table((1, *self.pretrained_grid[1:]), self.hidden_size))

    def forward(self, clips_NTCHW: Tensor) -> Tensor:
        """See ``VisionEncoder.forward``."""
        grid = self.clip_grid(clips_NTCHW)
        tokens_NLD = self.patch_embed(clips_NTCHW)
        tokens_NLD = torch.cat([self.cls_token.expand(len(tokens_NLD), -1, -1), tokens_NLD], dim=1)
        tokens_NLD = tokens_NLD + self._positions(grid)
        for block in self.blocks:
            tokens_NLD = block(tokens_NLD)
        return tokens_NLD[:, 1:]

    def _positions(self, grid: Grid) -> Tensor:
        steps, rows, columns = self.pretrained_grid
        table, other = self.pos_embed, self.img_pos_embed
        if grid[0] == 1:
            table, other, steps = other, table, 1
        # Distributed training waits for a gradient of every parameter, so the other table gets one of zeros.
        table = table + 0 * other[:, :1]
        pretrained_grid = steps, rows, columns
        if grid == pretrained_grid:
            return table
        wide = table[0, 1:].to(torch.promote_types(table.dtype, torch.float32))
        patches_LD = resize_positions(wide, grid, pretrained_grid=pretrained_grid)
        return torch.cat([table[:, :1], patches_LD[None].to(table.dtype)], dim=1)
