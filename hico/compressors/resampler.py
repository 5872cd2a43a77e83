"""Let learned queries read a clip."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization

from hico.compressors.base import Compressor
from hico.ops.positions import sinusoid_table


class ResamplerCompressor(Compressor):
    """Read the tokens of a clip by cross-attention, from learned queries of every frame.

    Each query attends to all tokens of the clip, whose keys carry their row, column and time, and belongs to a time
    itself. Any number of frames works, since times are sinusoids. Tokens come out by time, then query.

    Args:
        hidden_size: width D.
        num_heads: attention heads, as the encoder's.
        tokens_per_frame: queries of each step of a clip's time axis; an image has as many.

    Raises:
        ValueError: if the settings do not fit.

    Source: one layer of cross-attention from learned queries, with positions in queries and keys, as Bai et al.,
    "Qwen-VL", arXiv:2308.12966, section 2.1; time is added.
    """

    def __init__(self, *, hidden_size: int, num_heads: int, tokens_per_frame: int = 16):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} does not split into {num_heads} heads")
        if tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame {tokens_per_frame} must be at least 1")
        self.num_heads = num_heads
        self.tokens_per_frame = tokens_per_frame
        self.queries = nn.Parameter(torch.empty(tokens_per_frame, hidden_size))
        self.query_norm, self.token_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.q_proj, self.out_proj = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        # Softmax cannot see a bias of keys, which would get no gradient.
        self.k_proj, self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False), nn.Linear(hidden_size, hidden_size)
        self.init_own_weights()

    def init_own_weights(self) -> None:
        """Initialise the queries."""
        initialization.normal_(self.queries, std=0.02)

    def num_output_tokens(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_output_tokens``."""
        return grid[0] * self.tokens_per_frame

    def num_steps(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_steps``."""
        return grid[0]

    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.forward``."""
        self.check_grid(tokens_NLD, grid)
        times, rows, columns = (
            sinusoid_table(length, tokens_NLD.shape[-1]).to(tokens_NLD.device, tokens_NLD.dtype) for length in grid
        )
        places_LD = (times[:, None, None] + rows[:, None] + columns).flatten(0, 2)
        queries_KD = (self.query_norm(self.queries) + times[:, None]).flatten(0, 1)
        normed_NLD = self.token_norm(tokens_NLD)
        heads = "... l (a c) -> ... a l c"
        read_NAKC = F.scaled_dot_product_attention(
            rearrange(self.q_proj(queries_KD), heads, a=self.num_heads).expand(len(tokens_NLD), -1, -1, -1),
            rearrange(self.k_proj(normed_NLD + places_LD), heads, a=self.num_heads),
            rearrange(self.v_proj(normed_NLD), heads, a=self.num_heads),
        )
        return self.out_proj(rearrange(read_NAKC, "n a k c -> n k (a c)"))
