"""The video encoder of VideoChat-Flash: UMT, a transformer over all patches of a clip."""

import torch
from torch import Tensor, nn
from transformers import initialization

from hico.encoders.base import Grid, num_blocks_to_build
from hico.encoders.vit import MLP, Attention, Block, VideoTransformer, position_table


class BiasedAttention(Attention):
    """Full self-attention with a bias on query and value but none on the key."""

    def __init__(self, hidden_size: int, *, num_heads: int, attn_implementation: str):
        super().__init__(hidden_size, num_heads=num_heads, attn_implementation=attn_implementation)
        self.q_bias = nn.Parameter(torch.empty(hidden_size))
        self.v_bias = nn.Parameter(torch.empty(hidden_size))
        self.init_own_weights()

    def init_own_weights(self) -> None:
        initialization.zeros_(self.q_bias)
        initialization.zeros_(self.v_bias)

    def project(self, tokens_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return (self.qkv(tokens_NLD) + bias).chunk(3, dim=-1)


class UMTEncoder(VideoTransformer):
    """Encode clips with attention over all frames jointly.

    Parameters carry the published names (what follows ``encoder.`` there), so loading is a change of prefix.
    Positions are sinusoids of the pretrained grid, resized to the grid of the clip; they are no parameters and stand
    in no state dict. Any number of frames is taken, and any sides that are multiples of the patch, whatever
    ``image_size`` says.

    Args:
        image_size: pixels per side that frames are resized to.
        hidden_size: width D.
        depth: blocks of the pretrained network; see ``return_index``.
        num_heads: attention heads.
        patch_size: pixels per side of a patch.
        tubelet_size: frames per patch.
        mlp_ratio: width of a block's MLP over D.
        return_index: the block whose output is returned, counted from the end: -1 is the last one. Later blocks are
            not built.
        final_norm: whether the output passes a LayerNorm, as it does in what is published, whatever ``return_index``
            says; weights without a ``vision_layernorm`` have none.
        pretrained_frames: steps of the position table in pretraining; an image takes the first one.
        pretrained_side: rows and columns of that table. If omitted, as published: those of a 224-pixel frame if
            ``image_size`` is 224, otherwise 14. The same for patches of 16.
        trained_side: rows and columns of the frames that the encoder was trained with since, if they are fewer. The
            table is brought to that size first, and from there to the frames', so that larger frames get positions
            between those that were trained. As published, a table goes to any size at one step; sampled much more
            coarsely than it is (14 x 14 at 4 x 4), it then says little about sizes between.
        attn_implementation: ``"sdpa"``, ``"flash_attention_2"`` or ``"eager"``.

    Raises:
        ValueError: if the settings contradict each other.
        ImportError: if the attention needs a package that is not installed.

    Source: Li et al., "Unmasked Teacher", arXiv:2303.16058; settings of VideoChat-Flash, arXiv:2501.00574. The
    released code skips resizing rows and columns whenever a clip has 784 tokens, even if they are not 4 x 14 x 14; we
    resize.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        hidden_size: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        patch_size: int = 16,
        tubelet_size: int = 1,
        mlp_ratio: float = 4,
        return_index: int = -2,
        final_norm: bool = True,
        pretrained_frames: int = 4,
        pretrained_side: int | None = None,
        trained_side: int | None = None,
        attn_implementation: str = "sdpa",
    ):
        super().__init__(
            lambda: Block(
                BiasedAttention(hidden_size, num_heads=num_heads, attn_implementation=attn_implementation),
                MLP(hidden_size, int(hidden_size * mlp_ratio)),
                norm=lambda: nn.LayerNorm(hidden_size, eps=1e-6),
            ),
            num_blocks=num_blocks_to_build(depth, return_index, setting="return_index"),
            image_size=image_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            patch_size=patch_size,
            tubelet_size=tubelet_size,
        )
        side = pretrained_side or (image_size // patch_size if image_size == 224 else 14)
        self.pretrained_grid: Grid = (pretrained_frames, side, side)
        self.trained_side = trained_side
        self.vision_layernorm = nn.LayerNorm(hidden_size, eps=1e-12) if final_norm else nn.Identity()

    def forward(self, clips_NTCHW: Tensor) -> Tensor:
        """See ``VisionEncoder.forward``."""
        grid = self.clip_grid(clips_NTCHW)
        tokens_NLD = self.patch_embed(clips_NTCHW)
        tokens_NLD = tokens_NLD + self._positions(grid, tokens_NLD)
        for block in self.blocks:
            tokens_NLD = block(tokens_NLD)
        return self.vision_layernorm(tokens_NLD)

    def _positions(self, grid: Grid, like: Tensor) -> Tensor:
        steps, rows, columns = self.pretrained_grid
        return position_table(
            grid,
            self.hidden_size,
            pretrained_grid=(1 if grid[0] == 1 else steps, rows, columns),
            trained_side=self.trained_side,
            device=like.device,
            dtype=like.dtype,
        )
