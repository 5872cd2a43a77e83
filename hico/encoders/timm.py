"""Any vision backbone of timm, frame by frame."""

from difflib import get_close_matches
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from hico.encoders.base import FrameEncoder, Grid

_OURS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes")
"""Arguments of ``timm.create_model`` that ``model_args`` must not hold: a config does not choose files to read."""


class TimmEncoder(FrameEncoder):
    """Encode frames one by one with a backbone of timm, without head and pooling, after its last norm.

    Parameters are ``vision_model.`` and timm's own names. Weights are random until a checkpoint brings them. Needs the
    extra ``timm``, and the torchvision that fits the installed torch.

    Args:
        model: name of the architecture in timm, such as ``vit_base_patch16_224``; a tag of weights behind a dot has no
            effect but on the pixels' means and deviations.
        image_size: pixels per side; the architecture's own if omitted.
        model_args: further keywords of the architecture, such as ``{"depth": 3}``.

    Raises:
        ImportError: if timm is not installed.
        ValueError: if timm has no such architecture (the message names the nearest), or settings do not fit it.

    Source: Wightman, "PyTorch Image Models", doi:10.5281/zenodo.4414861.
    """

    def __init__(self, *, model: str, image_size: int | None = None, model_args: dict[str, Any] | None = None):
        super().__init__()
        self.vision_model = _create(model, image_size, model_args or {})
        self._recomputes = False
        pixels = self.vision_model.pretrained_cfg
        self.image_size = image_size or pixels["input_size"][-1]
        self.image_mean, self.image_std = tuple(pixels["mean"]), tuple(pixels["std"])
        self.hidden_size = self.vision_model.num_features
        heads = next((m.num_heads for m in self.vision_model.modules() if isinstance(_heads(m), int)), 1)
        self.num_heads = heads if self.hidden_size % heads == 0 else 1
        with torch.device("meta"), torch.no_grad():
            frame = torch.empty(1, 3, self.image_size, self.image_size)
            features = _create(model, image_size, model_args or {}).eval().forward_features(frame)
        self._map = self._as_map(features).shape[1:3]

    @property
    def gradient_checkpointing(self) -> bool:
        """See ``VisionEncoder.gradient_checkpointing``."""
        return self._recomputes

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._recomputes = value

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """See ``VisionEncoder.grid``."""
        self.check_frames(num_frames, height, width)
        return num_frames, *self._map

    def forward(self, clips_NTCHW: Tensor) -> Tensor:
        """See ``VisionEncoder.forward``."""
        num_frames = self.clip_grid(clips_NTCHW)[0]
        self.vision_model.set_grad_checkpointing(self._recomputes and self.training)
        frames = rearrange(clips_NTCHW, "n t c h w -> (n t) c h w").to(next(self.parameters()).dtype)
        features = self.vision_model.forward_features(frames)
        return rearrange(self._as_map(features), "(n t) h w d -> n (t h w) d", t=num_frames)

    def _attentions(self) -> list[nn.Module]:
        """List those of plain vision transformers whose first token, if it is no patch, is a class token."""
        from timm.models.vision_transformer import Attention

        model = self.vision_model
        if getattr(model, "num_prefix_tokens", 0) and getattr(model, "cls_token", None) is None:
            return []
        return [m for m in model.modules() if type(m) is Attention and m.num_heads == self.num_heads]

    def _queries_and_keys(self, attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, _ = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
        return attention.q_norm(queries).flatten(-2), attention.k_norm(keys).flatten(-2)

    def _as_map(self, features: Tensor) -> Tensor:
        """Lay out what an architecture returns, tokens or maps, as ``(F, H, W, D)``."""
        if features.ndim == 4:
            return features if features.shape[-1] == self.hidden_size else features.permute(0, 2, 3, 1)
        patches = features[:, getattr(self.vision_model, "num_prefix_tokens", 0) :]
        side = round(patches.shape[1] ** 0.5)
        if side * side != patches.shape[1]:
            raise ValueError(f"{patches.shape[1]} tokens of a frame are no square; this architecture is not supported")
        return patches.unflatten(1, (side, side))


def _heads(module: nn.Module) -> Any:
    return getattr(module, "num_heads", None)


def _create(model: str, image_size: int | None, model_args: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that does not fit torch
        raise ImportError(
            f"the encoder timm:{model} needs timm (pip install 'hico[timm]') and a torchvision that fits torch: "
            f"{error}"
        ) from error
    known = timm.list_models()
    if model.partition(".")[0] not in known:
        nearest = get_close_matches(model, known, n=3)
        raise ValueError(f"timm {timm.__version__} has no model {model!r}; nearest are {', '.join(nearest) or 'none'}")
    if wrong := [name for name in model_args if name in _OURS]:
        raise ValueError(f"model_args of the encoder timm holds {wrong[0]!r}, which a configuration may not set")
    sized = {} if image_size is None else {"img_size": image_size}
    try:
        try:
            return timm.create_model(model, num_classes=0, global_pool="", **sized, **model_args)
        except TypeError:  # convolutional networks take frames of any size, and no argument for it
            return timm.create_model(model, num_classes=0, global_pool="", **model_args)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot build {model!r} with {sized | model_args}: {error}") from error
