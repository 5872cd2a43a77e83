"""The video encoder of VideoChat-Flash: UMT, a transformer over all patches of a clip."""

from torch import Tensor, nn

from hico.encoders.base import Grid, VisionEncoder, blocks_beyond, num_blocks_to_build
from hico.encoders.vit import Block, PatchEmbed, position_table


class UMTEncoder(VisionEncoder):
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
            not built. The output passes a final LayerNorm in any case.
        pretrained_frames: steps of the position table in pretraining; an image takes the first one.
        pretrained_side: rows and columns of that table. If omitted, as published: those of a 224-pixel frame if
            ``image_size`` is 224, otherwise 14. The same for patches of 16.
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
        pretrained_frames: int = 4,
        pretrained_side: int | None = None,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} does not split into {num_heads} heads")
        self.image_size = image_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        side = pretrained_side or (image_size // patch_size if image_size == 224 else 14)
        self.pretrained_grid: Grid = (pretrained_frames, side, side)
        self.grid(tubelet_size, image_size, image_size)

        self.patch_embed = PatchEmbed(hidden_size, patch_size=patch_size, tubelet_size=tubelet_size)
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                eps=1e-6,
                attn_implementation=attn_implementation,
            )
            for _ in range(num_blocks_to_build(depth, return_index, setting="return_index"))
        )
        self.vision_layernorm = nn.LayerNorm(hidden_size, eps=1e-12)
        self._keys_to_ignore_on_load_unexpected = (blocks_beyond(len(self.blocks), prefix="encoder.blocks."),)

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
            device=like.device,
            dtype=like.dtype,
        )
