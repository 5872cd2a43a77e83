"""Parts of video vision transformers: patches, positions, attention, blocks."""

import importlib.util
import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hico.encoders.base import Grid, VisionEncoder, blocks_beyond
from hico.ops.positions import sinusoid_table


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def position_table(
    grid: Grid,
    width: int,
    *,
    pretrained_grid: Grid,
    trained_side: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Fit the sinusoidal position table of a pretrained grid to another one, as `resize_positions` does.

    The last few tables are remembered, for all encoders of the process; do not write into the result.

    Args:
        grid: steps, rows and columns wanted.
        width: width D of a token.
        pretrained_grid: the grid whose raster positions ``0, 1, 2, ...`` the encoder was trained with.
        trained_side: rows and columns to go by, see `hico.encoders.umt.UMTEncoder`; at one step if omitted.
        device: where the table goes; it is always computed on the CPU, so it is the same everywhere.
        dtype: dtype of the result; the table is computed in float32 from float64 angles.

    Returns:
        ``(1, L, D)``, time-major, then rows.

    Source: Li et al., "Unmasked Teacher", arXiv:2303.16058; resizing as in the release of VideoChat-Flash.
    """
    table_LD = sinusoid_table(math.prod(pretrained_grid), width)
    if trained_side:
        trained_grid = (pretrained_grid[0], trained_side, trained_side)
        table_LD = resize_positions(table_LD, trained_grid, pretrained_grid=pretrained_grid)
        pretrained_grid = trained_grid
    table_LD = resize_positions(table_LD, grid, pretrained_grid=pretrained_grid)
    return table_LD[None].contiguous().to(device=device, dtype=dtype)


def resize_positions(table_LD: Tensor, grid: Grid, *, pretrained_grid: Grid) -> Tensor:
    """Resize a position table from one grid to another.

    Rows and columns are resized first (bicubic, half-pixel centres, no antialiasing), then time (linear); the order
    makes a difference in rounding only.

    Args:
        table_LD: ``(L, D)`` float32, time-major, then rows.
        grid: steps, rows and columns wanted.
        pretrained_grid: those of the table.

    Returns:
        ``(L, D)`` of the wanted grid.
    """
    steps, rows, _ = pretrained_grid
    table = rearrange(table_LD, "(t h w) d -> t d h w", t=steps, h=rows)
    if pretrained_grid[1:] != grid[1:]:
        table = F.interpolate(table, size=grid[1:], mode="bicubic", align_corners=False)
    table = rearrange(table, "t d h w -> (h w) d t")
    if steps != grid[0]:
        table = F.interpolate(table, size=grid[0], mode="linear", align_corners=False)
    return rearrange(table, "l d t -> (t l) d")


class PatchConv(nn.Conv3d):
    """A convolution over patches that do not overlap, as a matrix product.

    Same parameters as ``nn.Conv3d``, whose half precision kernels are slow for these shapes.
    """

    def __init__(self, out_channels: int, *, kernel_size: tuple[int, int, int]):
        super().__init__(3, out_channels, kernel_size, stride=kernel_size)

    def forward(self, clips_NTCHW: Tensor) -> Tensor:
        """Return ``(N, L, out_channels)``, time-major, then rows."""
        steps, rows, columns = self.kernel_size
        patches = rearrange(
            clips_NTCHW, "n (t dt) c (h dh) (w dw) -> n (t h w) (c dt dh dw)", dt=steps, dh=rows, dw=columns
        )
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Turn clips into patch tokens without positions."""

    def __init__(self, hidden_size: int, *, patch_size: int, tubelet_size: int):
        super().__init__()
        self.proj = PatchConv(hidden_size, kernel_size=(tubelet_size, patch_size, patch_size))

    def forward(self, clips_NTCHW: Tensor) -> Tensor:
        return self.proj(clips_NTCHW)


def eager_attention(query_NALC: Tensor, key_NALC: Tensor, value_NALC: Tensor) -> Tensor:
    """Attend with the weights written out: L * L numbers per head. For inspection and comparison."""
    scores = (query_NALC * query_NALC.shape[-1] ** -0.5) @ key_NALC.mT
    return scores.softmax(dim=-1) @ value_NALC


def flash_attention_2(query_NALC: Tensor, key_NALC: Tensor, value_NALC: Tensor) -> Tensor:
    """Attend through the package flash-attn: float16 or bfloat16 on CUDA."""
    from flash_attn import flash_attn_func  # optional package

    query, key, value = (x.transpose(1, 2) for x in (query_NALC, key_NALC, value_NALC))
    return flash_attn_func(query, key, value).transpose(1, 2)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": F.scaled_dot_product_attention,
    "eager": eager_attention,
    "flash_attention_2": flash_attention_2,
}
"""Full attention over ``(N, A, L, C)`` with scale ``C ** -0.5``, by the names that transformers uses."""


def attention_function(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Look up an attention.

    Raises:
        ValueError: if the name is unknown.
        ImportError: if its package is not installed.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"unknown attn_implementation {name!r}; known: {', '.join(ATTENTIONS)}")
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ImportError(
            "attn_implementation 'flash_attention_2' needs the package flash-attn, which is not installed; "
            "run `pip install flash-attn --no-build-isolation`, or use 'sdpa'"
        )
    return ATTENTIONS[name]


class Attention(nn.Module):
    """Full self-attention, without a bias on query, key and value."""

    def __init__(self, hidden_size: int, *, num_heads: int, attn_implementation: str):
        super().__init__()
        self.num_heads = num_heads
        self.attend = attention_function(attn_implementation)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, tokens_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value ``(N, L, D)``, all heads side by side."""
        return self.qkv(tokens_NLD).chunk(3, dim=-1)

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        heads = (rearrange(x, "n l (a c) -> n a l c", a=self.num_heads) for x in self.project(tokens_NLD))
        return self.proj(rearrange(self.attend(*heads), "n a l c -> n l (a c)"))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens_NLD)))


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block: attention and MLP, each scaled and added to its input.

    Args:
        attention: tokens ``(N, L, D)`` in and out.
        mlp: the same.
        norm: makes what comes before each of them.
        scale: makes what comes after each of them; nothing if omitted.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        norm: Callable[[], nn.Module],
        scale: Callable[[], nn.Module] = nn.Identity,
    ):
        super().__init__()
        self.norm1 = norm()
        self.attn = attention
        self.ls1 = scale()
        self.norm2 = norm()
        self.mlp = mlp
        self.ls2 = scale()

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        tokens_NLD = tokens_NLD + self.ls1(self.attn(self.norm1(tokens_NLD)))
        return tokens_NLD + self.ls2(self.mlp(self.norm2(tokens_NLD)))


class VideoTransformer(VisionEncoder):
    """Patches and blocks of an encoder that attends over all frames of a clip jointly.

    Any number of frames is taken, and any sides that are multiples of the patch, whatever ``image_size`` says.

    Args:
        make_block: makes a block.
        num_blocks: how many.

    The others are as in `hico.encoders.umt.UMTEncoder`.

    Raises:
        ValueError: if the settings contradict each other.
    """

    def __init__(
        self,
        make_block: Callable[[], Block],
        *,
        num_blocks: int,
        image_size: int,
        hidden_size: int,
        num_heads: int,
        patch_size: int,
        tubelet_size: int = 1,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} does not split into {num_heads} heads")
        self.image_size = image_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.grid(tubelet_size, image_size, image_size)

        self.patch_embed = PatchEmbed(hidden_size, patch_size=patch_size, tubelet_size=tubelet_size)
        self.blocks = nn.ModuleList(make_block() for _ in range(num_blocks))
        self._keys_to_ignore_on_load_unexpected = (blocks_beyond(num_blocks, prefix="encoder.blocks."),)

    def _attentions(self) -> list[nn.Module]:
        return [block.attn for block in self.blocks]

    def _queries_and_keys(self, attention: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return attention.project(tokens)[:2]

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """See ``VisionEncoder.grid``."""
        patch, tubelet = self.patch_size, self.tubelet_size
        if min(height, width) < patch or height % patch or width % patch:
            nearest = " x ".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
            raise ValueError(
                f"frames of {height} x {width} pixels do not split into patches of {patch}; resize to {nearest}"
            )
        if num_frames < 1 or num_frames % tubelet:
            raise ValueError(
                f"clips of {num_frames} frames do not split into tubelets of {tubelet}; use a multiple of {tubelet}"
            )
        return num_frames // tubelet, height // patch, width // patch
