"""What every vision encoder offers."""

import re
from abc import ABC, abstractmethod
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hico.compat import vision_attentions
from hico.ops.dropping import query_row_scores

Grid = tuple[int, int, int]
"""Tokens of one clip along time, rows and columns; ``L`` is their product."""


class VisionEncoder(nn.Module, ABC):
    """Turn clips of frames into tokens.

    Subclasses set these attributes in their constructor; they must be right on the meta device too.
    """

    hidden_size: int
    """Width D of a token."""
    num_heads: int
    """Attention heads; token merging splits the channels the same way."""
    image_size: int
    """Pixels per side that frames and image tiles are resized to."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means of pixels in [0, 1]."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations of pixels in [0, 1]."""
    _keys_to_ignore_on_load_unexpected: tuple[str, ...] = ()
    """Patterns of the weights that a whole pretrained network has and this encoder does not run; transformers asks."""

    @property
    def _no_split_modules(self) -> set[str]:
        """Classes that ``device_map="auto"`` keeps on one device; transformers asks."""
        return {type(self).__name__}

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training recomputes blocks in the backward pass instead of keeping their activations.

        Setting it reaches every block that has such a flag, as blocks of transformers do.
        """
        return any(block.gradient_checkpointing for block in self._checkpointable())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for block in self._checkpointable():
            block.gradient_checkpointing = value
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def _checkpointable(self) -> list[nn.Module]:
        return [m for m in self.modules() if m is not self and hasattr(m, "gradient_checkpointing")]

    def clip_grid(self, clips_NTCHW: Tensor) -> Grid:
        """Say how many tokens each of these clips yields.

        Raises:
            ValueError: if they are not ``(N, T, 3, H, W)``, or their sizes do not fit the encoder.
        """
        if clips_NTCHW.ndim != 5 or clips_NTCHW.shape[2] != 3:
            raise ValueError(
                f"clips of shape {tuple(clips_NTCHW.shape)} are not (clips, frames, 3, height, width); "
                "an image is a clip of one frame"
            )
        _, num_frames, _, height, width = clips_NTCHW.shape
        return self.grid(num_frames, height, width)

    @abstractmethod
    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """Say how many tokens a clip yields, without running it.

        Args:
            num_frames: frames per clip; 1 for an image.
            height: pixels.
            width: pixels.

        Raises:
            ValueError: if the sizes do not fit the encoder's patches.
        """

    @property
    def gives_attention(self) -> bool:
        """Whether `attend` works."""
        return bool(self._attentions())

    def attend(self, clips_NTCHW: Tensor, *, layer: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """Encode clips, and say what was attended to.

        Where there is a class token, which is the first, its attention counts, otherwise that of all tokens that
        attend together, on average; heads are averaged. One layer's queries and keys are computed again, and compared
        in blocks of queries: no map of all tokens is written out.

        Args:
            clips_NTCHW: ``(N, T, 3, H, W)``, normalised.
            layer: of those that run, counted from the end: -1 is the last one, whose output the tokens are.

        Returns:
            The tokens ``(N, L, D)`` as `forward` gives them; the attention ``(N, L)`` that each received, and its key
            ``(N, L, C)``, averaged over heads, both float32 or wider and without gradient.

        Raises:
            ValueError: if this encoder gives no attention, or has no such layer.
        """
        attentions = self._attentions()
        if not attentions:
            raise ValueError(f"{type(self).__name__} gives no attention; use an encoder whose gives_attention is true")
        if not -len(attentions) <= layer <= -1:
            raise ValueError(f"layer {layer} is none of {len(attentions)} that run; use -{len(attentions)} to -1")
        seen: list[tuple[Tensor, Tensor]] = []

        @torch.no_grad()
        def look(attention: nn.Module, args: tuple, kwargs: dict) -> None:
            # On the way, where weights that are sharded or offloaded are at hand.
            seen.append(self._queries_and_keys(attention, (args[0] if args else kwargs["hidden_states"]).detach()))

        handle = attentions[layer].register_forward_pre_hook(look, with_kwargs=True)
        try:
            tokens_NLD = self(clips_NTCHW)
        finally:
            handle.remove()
        with torch.no_grad():
            queries_MAXC, keys_MAXC = (rearrange(x, "m x (a c) -> m a x c", a=self.num_heads) for x in seen[0])
            num_rows, _, num_together, width = keys_MAXC.shape
            num_class = num_together - tokens_NLD.shape[:2].numel() // num_rows
            queries_MAQC = queries_MAXC[:, :, :1] if num_class else queries_MAXC
            last_MQ = torch.full((num_rows, queries_MAQC.shape[2]), num_together - 1, device=keys_MAXC.device)
            attention_MX = query_row_scores(queries_MAQC, keys_MAXC, last_MQ, scaling=width**-0.5)
            keys_MXC = keys_MAXC.mean(1, dtype=torch.promote_types(keys_MAXC.dtype, torch.float32))
        shape = tokens_NLD.shape[:2]
        keys_NLC = keys_MXC[:, num_class:].reshape(*shape, width)
        return tokens_NLD, attention_MX[:, num_class:].reshape(shape), keys_NLC

    def _attentions(self) -> list[nn.Module]:
        """List the self-attention modules of all layers, in order; none if they cannot be watched."""
        return []

    def _queries_and_keys(self, attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute queries and keys of what enters a self-attention, all heads side by side."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, clips_NTCHW: Tensor) -> Tensor:
        """Encode normalised clips ``(N, T, 3, H, W)`` to tokens ``(N, L, D)``, time-major, then rows."""


class FrameEncoder(VisionEncoder):
    """Encode frames one by one with a model of images, which knows frames of one size only.

    Subclasses set these attributes too.
    """

    patch_size: int
    """Pixels per side of a patch."""
    vision_model: nn.Module
    """Frames ``(F, 3, H, W)`` in, ``last_hidden_state`` out: class tokens if it has any, then patches by rows."""

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """See ``VisionEncoder.grid``. Pixels beyond the last whole patch are not seen."""
        self.check_frames(num_frames, height, width)
        side = self.image_size // self.patch_size
        return num_frames, side, side

    def check_frames(self, num_frames: int, height: int, width: int) -> None:
        """Check that there are frames, of the one size that is known.

        Raises:
            ValueError: if not.
        """
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"frames of {height} x {width} pixels do not fit the learned positions; "
                f"resize to {self.image_size} x {self.image_size}, or set image_size"
            )
        if num_frames < 1:
            raise ValueError(f"clips of {num_frames} frames hold nothing to encode; pass at least one frame")

    def forward(self, clips_NTCHW: Tensor) -> Tensor:
        """See ``VisionEncoder.forward``."""
        num_frames, rows, columns = self.clip_grid(clips_NTCHW)
        tokens = self.vision_model(rearrange(clips_NTCHW, "n t c h w -> (n t) c h w")).last_hidden_state
        return rearrange(tokens[:, -rows * columns :], "(n t) l d -> n (t l) d", t=num_frames)

    def _attentions(self) -> list[nn.Module]:
        return vision_attentions(self.vision_model)

    def _queries_and_keys(self, attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return attention.q_proj(tokens), attention.k_proj(tokens)


def blocks_beyond(num_blocks: int, *, prefix: str) -> str:
    """Write the pattern of the weights of blocks that are not built, for ``_keys_to_ignore_on_load_unexpected``."""
    built = "|".join(map(str, range(num_blocks)))
    return rf"{re.escape(prefix)}(?!(?:{built})\.)\d+\."


def unused_by_frame_encoders(num_layers: int) -> tuple[str, ...]:
    """List the patterns of weights that a vision model of transformers has beyond ``num_layers`` of its layers."""
    return (
        blocks_beyond(num_layers, prefix="vision_model.encoder.layers."),
        r"vision_model\.(post_layernorm|head)\.",
        r"vision_model\.embeddings\.position_ids$",
    )


def num_blocks_to_build(depth: int, index: int, *, setting: str) -> int:
    """Say how many of ``depth`` blocks yield the output of block ``index``, counted from the end (-1 is the last).

    Raises:
        ValueError: if there is no such block; the message calls the index ``setting``.
    """
    if not -depth <= index <= -1:
        raise ValueError(f"{setting} {index} is none of {depth} blocks; use -{depth} to -1")
    return depth + index + 1
