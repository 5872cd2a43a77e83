"""What a model is made of: `HicoConfig` and its presets."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from hico.grids import IMAGE_LAYOUTS, ImageLayout
from hico.llm_dropout import DropSchedule
from hico.published import is_published, translate, what_it_is
from hico.registry import COMPRESSORS, ENCODERS, VIDEO_COMPRESSORS, Registry

logger = logging.getLogger(__name__)

QWEN2_VIDEO_TOKEN_ID, QWEN2_IMAGE_TOKEN_ID = 151656, 151655

_QWEN2_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}
_QWEN2_5_1_5B = {
    **_QWEN2_7B,
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_TINY_LLM = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "text_config": _TINY_LLM,
        "encoder": {
            "name": "umt",
            "image_size": 48,
            "patch_size": 12,
            "hidden_size": 64,
            "depth": 3,
            "num_heads": 2,
        },
        "compressor": {"name": "token_merge", "tokens_per_frame": 4, "tokens_per_image": 16},
        "video_token_id": 260,
        "image_token_id": 259,
    },
    "videochat-flash-2b-448": {"text_config": _QWEN2_5_1_5B, "encoder": {"name": "umt", "image_size": 448}},
    "videochat-flash-7b-224": {"text_config": _QWEN2_7B, "encoder": {"name": "umt", "image_size": 224}},
    "videochat-flash-7b-448": {"text_config": _QWEN2_7B, "encoder": {"name": "umt", "image_size": 448}},
    "videochat-flash-7b-internvideo2": {
        "text_config": _QWEN2_7B,
        "encoder": {"name": "internvideo2", "image_size": 224},
    },
    "longva-7b": {
        "text_config": {
            **_QWEN2_7B,
            "max_position_embeddings": 224000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        },
        "encoder": {"name": "clip", "image_size": 336},
        "compressor": {"name": "pooling", "stride": 2},
        "projector_first": True,
        "clip_len": 1,
        "image_layout": "tiles",
    },
}
_CALLER_KEYS = ("attn_implementation", "_attn_implementation", "transformers_weights")
"""What transformers reads here names code to download and run, or files that nobody checked; a file may not say it."""
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class HicoConfig(PreTrainedConfig):
    """Describe a model: an LLM, and how clips become its visual tokens.

    Args:
        text_config: the LLM, as any transformers text configuration or its dict; Qwen2-7B if omitted.
        encoder: name in `hico.registry.ENCODERS`, such as ``"umt"`` or ``"timm:resnet50"``, or a dict of ``name`` and
            settings.
        compressor: name in `hico.registry.COMPRESSORS`, or a dict of ``name`` and settings.
        video_compressor: name in `hico.registry.VIDEO_COMPRESSORS`, or a dict of ``name`` and settings: what becomes
            of all tokens of a video between projector and LLM; nothing if omitted.
        clip_len: frames T that the encoder sees together.
        projector_first: project tokens before compressing them, as LongVA does.
        image_layout: order of the tokens of a tiled image. ``"mosaic"``: thumbnail, then one map across all tiles
            (VideoChat-Flash). ``"tiles"``: tile after tile, without the thumbnail (LongVA's UniRes). ``"flat"``:
            thumbnail, then tile after tile, none of them compressed (LongVA's other merge type). ``"anyres"``:
            thumbnail, then one map across all tiles, none of them compressed: an image is then no longer like a video,
            which is what LongVA holds UniRes against.
        video_token_id: placeholder of a visual token of a video; may lie beyond the vocabulary.
        image_token_id: placeholder of a visual token of an image.
        drop_schedule: progressive visual dropout inside the LLM, see `hico.llm_dropout`; none if omitted.
        drop_options: further arguments of `hico.llm_dropout.patch`.

    Raises:
        ValueError: if a name is unknown or a setting is out of range.
    """

    model_type = "hico"
    sub_configs = {"text_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    encoder: dict | str = "umt"
    compressor: dict | str = "token_merge"
    video_compressor: dict | str | None = None
    clip_len: int = 4
    projector_first: bool = False
    image_layout: str = "mosaic"
    video_token_id: int = QWEN2_VIDEO_TOKEN_ID
    image_token_id: int = QWEN2_IMAGE_TOKEN_ID
    drop_schedule: str | list | None = None
    drop_options: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = self._text_config(**(self.text_config or _QWEN2_7B))
        self.encoder = named_part(self.encoder, ENCODERS)
        self.compressor = named_part(self.compressor, COMPRESSORS)
        if self.video_compressor is not None:
            self.video_compressor = named_part(self.video_compressor, VIDEO_COMPRESSORS)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        if self.clip_len < 1:
            raise ValueError(f"clip_len is {self.clip_len}; a clip has at least one frame")
        if self.image_layout not in IMAGE_LAYOUTS:
            raise ValueError(f"unknown image_layout {self.image_layout!r}; use one of {', '.join(IMAGE_LAYOUTS)}")
        schedule = DropSchedule.parse(self.drop_schedule)
        schedule.check_depth(self.text_config.num_hidden_layers)
        self.drop_schedule = str(schedule) if schedule else None

    @staticmethod
    def _text_config(model_type: str = "qwen2", **settings: Any) -> PreTrainedConfig:
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise ValueError(f"text_config has the model_type {model_type!r}, which this transformers does not know")
        try:
            config = CONFIG_MAPPING[model_type](**settings)
        except Exception as error:  # settings that contradict each other make transformers fail in any way
            reason = " ".join(str(error).split())
            raise ValueError(f"text_config does not describe a {model_type!r}: {reason}") from error
        if not hasattr(config, "num_hidden_layers"):
            raise ValueError(f"text_config describes a {model_type!r}, which has no layers of its own and is no LLM")
        return config

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "HicoConfig":
        """Return a ready-made configuration.

        Args:
            name: ``tiny`` (untrained, runs anywhere), ``videochat-flash-2b-448``, ``videochat-flash-7b-224``,
                ``videochat-flash-7b-448``, ``videochat-flash-7b-internvideo2`` or ``longva-7b``.
            changes: fields to set otherwise.

        Raises:
            ValueError: if the name or a field is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; use one of {', '.join(PRESETS)}")
        unknown = [field for field in changes if not hasattr(cls, field)]
        if unknown:
            raise ValueError(f"HicoConfig has no field {', '.join(unknown)}; see its documentation for those it has")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a configuration, in our layout or in that of VideoChat-Flash or LongVA; see `hico.published`.

        Raises:
            OSError: if there is none; transformers would take the defaults, and so make a model of 7 billion weights.
            ValueError: if it is in another layout; the message says in which.
        """
        # Tokenizers of transformers import its configurations, and this module is imported while those are.
        from hico.tokenizer import add_placeholders, load_llm_tokenizer

        hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not settings:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json; is it a checkpoint, and complete?")
        for key in _CALLER_KEYS:
            settings.pop(key, None)
        if is_published(settings):
            found = translate(settings)
            if found.unknown:
                _warn_once(f"{pretrained_model_name_or_path}: keys that are not known have no effect: {found.unknown}")
            tokenizer = load_llm_tokenizer(str(pretrained_model_name_or_path), known=False, **hub_kwargs)
            settings = {**found.config, **(add_placeholders(tokenizer) if tokenizer else {})}
        elif settings.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(f"{pretrained_model_name_or_path} holds no model that hico reads. {what_it_is(settings)}")
        return settings, kwargs

    @property
    def vision(self) -> "VisionSpec":
        """The part that decides how many tokens a video or image takes."""
        return VisionSpec(
            self.encoder,
            self.compressor,
            clip_len=self.clip_len,
            image_layout=self.image_layout,
            video_compressor=self.video_compressor,
        )


def named_part(spec: str | Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Write the name of a part, or its name and settings, as a config stores them.

    Raises:
        ValueError: if it is neither, or the name is unknown.
    """
    if not isinstance(spec, (str, Mapping)):
        raise ValueError(f"the {registry.kind} is {spec!r}; it must be a name, or a mapping with a name and settings")
    settings = registry.settings(spec)
    registry.get(settings.get("name"))
    return settings


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    logger.warning(message)


@dataclass(frozen=True)
class VisionSpec:
    """How pixels become tokens: what a processor must know of a model.

    It owns no number: it asks the encoder and the compressor, which it builds without weights.

    Args:
        encoder: ``name`` and settings.
        compressor: ``name`` and settings.
        clip_len: frames per clip.
        image_layout: as in `HicoConfig`.
        video_compressor: ``name`` and settings, or None.
    """

    encoder: dict[str, Any]
    compressor: dict[str, Any]
    clip_len: int = 4
    image_layout: str = "mosaic"
    video_compressor: dict[str, Any] | None = None

    @property
    def image_size(self) -> int:
        """Pixels per side of a frame or tile."""
        return self._parts[0].image_size

    def num_video_tokens(self, num_frames: int) -> int:
        """Return how many tokens a video takes in the LLM; the most if its content decides (`has_exact_counts`).

        Raises:
            ValueError: if ``num_frames`` is no multiple of ``clip_len``, or so few cannot be compressed as asked.
        """
        if num_frames % self.clip_len:
            raise ValueError(
                f"{num_frames} frames do not split into clips of {self.clip_len}; "
                f"drop {num_frames % self.clip_len} or pad {-num_frames % self.clip_len}"
            )
        num_clips, num_tokens = num_frames // self.clip_len, self._num_tokens(self.clip_len)
        encoder, compressor, video_compressor = self._parts
        if video_compressor is None:
            return num_clips * num_tokens
        num_steps = compressor.num_steps(encoder.grid(self.clip_len, encoder.image_size, encoder.image_size))
        return video_compressor.num_kept(num_clips * num_steps, num_tokens // num_steps)

    @property
    def has_exact_counts(self) -> bool:
        """Whether `num_video_tokens` is exact, and not the most that a video may take."""
        video_compressor = self._parts[2]
        return video_compressor is None or not video_compressor.by_content

    def num_image_tokens(self, grid: tuple[int, int] = (0, 0)) -> int:
        """Return how many tokens an image takes in the LLM.

        Args:
            grid: rows and columns of its tiles; ``(0, 0)`` is one tile alone.

        Raises:
            ValueError: if the tokens of a tile do not make the square that a mosaic is laid out of.
        """
        num_tokens = self._num_tokens(1, compress=self.layout.compresses)
        if grid != (0, 0) and self.layout.joins_tiles and math.isqrt(num_tokens) ** 2 != num_tokens:
            raise ValueError(
                f"{num_tokens} tokens per tile are no square, and a mosaic of {grid[0]} x {grid[1]} tiles needs one; "
                "set tokens_per_image of the compressor to a square, or image_tiling: single in the processor"
            )
        return self.layout.num_tiles(grid) * num_tokens

    @property
    def layout(self) -> ImageLayout:
        """The order of a tiled image's tokens."""
        return IMAGE_LAYOUTS[self.image_layout]

    def _num_tokens(self, num_frames: int, *, compress: bool = True) -> int:
        encoder, compressor, _ = self._parts
        grid = encoder.grid(num_frames, encoder.image_size, encoder.image_size)
        return compressor.num_output_tokens(grid) if compress else math.prod(grid)

    @property
    def _parts(self):
        specs = (self.encoder, self.compressor, self.video_compressor)
        return _parts_without_weights(*(json.dumps(spec, sort_keys=True) for spec in specs))


@lru_cache(maxsize=32)
def _parts_without_weights(*specs_json: str):
    encoder, compressor, video_compressor = map(json.loads, specs_json)
    with torch.device("meta"):
        encoder = ENCODERS.build(encoder)
        compressor = build_compressor(compressor, encoder, hidden_size=encoder.hidden_size)
        return encoder, compressor, build_video_compressor(video_compressor, encoder, compressor)


def build_compressor(spec: dict[str, Any], encoder, *, hidden_size: int):
    """Build a compressor for the tokens of an encoder, of ``hidden_size`` channels when they reach it."""
    return COMPRESSORS.build(spec, hidden_size=hidden_size, num_heads=encoder.num_heads)


def build_video_compressor(spec: dict[str, Any] | None, encoder, compressor):
    """Build a video compressor for what an encoder and a compressor make of videos; None if there is to be none.

    Raises:
        ValueError: if it needs attention, and the encoder gives none or the compressor loses it.
    """
    if spec is None:
        return None
    built = VIDEO_COMPRESSORS.build(spec)
    if built.needs_attention and not encoder.gives_attention:
        raise ValueError(
            f"the video compressor {spec['name']!r} ranks tokens by the encoder's attention, and "
            f"{type(encoder).__name__} gives none; use another encoder, or a method that needs no attention"
        )
    if built.needs_attention and not compressor.carries:
        raise ValueError(
            f"the video compressor {spec['name']!r} ranks tokens by the encoder's attention, and "
            f"{type(compressor).__name__} does not say which tokens it joins, so attention cannot follow them; use "
            "another compressor, or a method that needs no attention"
        )
    return built


AutoConfig.register(HicoConfig.model_type, HicoConfig, exist_ok=True)
