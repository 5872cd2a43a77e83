"""`HicoProcessor`: chat messages with videos and images in, model inputs out."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import TextKwargs

from hico.configuration_hico import HicoConfig, VisionSpec
from hico.grids import anyres_grids, unires_grids
from hico.preprocessing import cut_tiles, resize_frames, to_pil
from hico.prompt import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    expand_placeholders,
    insert_time_message,
    take_answers,
)
from hico.prompt import time_message as write_time_message
from hico.published import is_published, translate
from hico.tokenizer import add_placeholders, load_llm_tokenizer
from hico.video_io import ReadSettings, Video, VideoInfo, VideoStream, read_video

IMAGE_GRIDS = {
    "single": lambda: [],
    "anyres_nopad": anyres_grids,
    "unires": unires_grids,
}
"""Tilings of an image by name: the whole image alone, VideoChat-Flash's grids, LongVA's."""


class HicoProcessor(ProcessorMixin):
    """Turn text, videos and images into what `HicoForConditionalGeneration` takes.

    Pixels are returned as bytes; the model normalises them on its own device.

    Args:
        tokenizer: with the tokens ``<|video_pad|>`` and ``<|image_pad|>``.
        vision: a `VisionSpec` or its fields; taken from the model's configuration by `from_config`.
        video: settings for `hico.video_io.read_video`, for videos whose message sets nothing else.
        time_message: ``"short"``, ``"long"`` or ``None``, see `hico.prompt.time_message`.
        image_tiling: ``"single"``, ``"anyres_nopad"`` or ``"unires"``, or the grids to choose from as a list of
            ``(columns, rows)``.
        chat_template: Jinja template; ChatML if neither it nor the tokenizer has one.

    Raises:
        ValueError, TypeError: if the tokenizer lacks a placeholder or a setting is unknown.
    """

    def __init__(
        self,
        tokenizer=None,
        vision: VisionSpec | Mapping[str, Any] | None = None,
        video: Mapping[str, Any] | None = None,
        time_message: str | None = "short",
        image_tiling: str | Sequence[tuple[int, int]] = "anyres_nopad",
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        if isinstance(image_tiling, str) and image_tiling not in IMAGE_GRIDS:
            raise ValueError(f"unknown image_tiling {image_tiling!r}; use one of {', '.join(IMAGE_GRIDS)}")
        known = tokenizer.get_vocab()
        missing = [token for token in (VIDEO_TOKEN, IMAGE_TOKEN) if token not in known]
        if missing:
            raise ValueError(
                f"the tokenizer has no {' and no '.join(missing)}; add them with "
                "tokenizer.add_special_tokens and put their ids into the config"
            )
        self.vision = vision if isinstance(vision, VisionSpec) else VisionSpec(**vision)
        self.video = dict(video or {})
        ReadSettings.of(self.video)
        write_time_message(time_message, duration=0.0, seconds=[])
        self.time_message = time_message
        self._known_templates: dict[str, bool] = {}
        self.image_tiling = image_tiling if isinstance(image_tiling, str) else [tuple(grid) for grid in image_tiling]

    @classmethod
    def from_config(cls, config: HicoConfig, tokenizer, **settings: Any) -> "HicoProcessor":
        """Make the processor that goes with a model's configuration."""
        if config.image_layout != "mosaic":
            settings = {"image_tiling": "unires", "time_message": None, **settings}  # as LongVA was trained
        return cls(tokenizer, vision=config.vision, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs: Any) -> "HicoProcessor":
        """Load a saved processor, or make the one that goes with a checkpoint of VideoChat-Flash or LongVA.

        Code that lies beside it is never run, not even with ``trust_remote_code=True``.

        Raises:
            ValueError: if a published checkpoint has no tokenizer, or a tokenizer cannot do without its own code.
        """
        kwargs.pop("trust_remote_code", None)
        path = str(pretrained_model_name_or_path)
        published, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
        if not is_published(published):
            return super().from_pretrained(path, trust_remote_code=False, **kwargs)
        tokenizer = load_llm_tokenizer(path, known=False, **kwargs)
        if tokenizer is None:
            raise ValueError(f"{path} has no tokenizer; put the files of the LLM's tokenizer beside its config.json")
        add_placeholders(tokenizer)
        tokenizer.padding_side = "left"
        settings = {"chat_template": CHAT_TEMPLATE, **translate(published).processor}
        return cls.from_config(HicoConfig.from_pretrained(path, **kwargs), tokenizer, **settings)

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        fields["vision"] = vars(self.vision)
        return fields

    @property
    def model_input_names(self) -> list[str]:
        visual = ["pixel_values", "image_grids", "pixel_values_videos", "video_num_clips"]
        return [*self.tokenizer.model_input_names, *visual]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        *,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        video_kwargs: Mapping[str, Any] | None = None,
        **tokenizer_kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            text: prompts, with one placeholder per video or image.
            images: in the order of their placeholders, nested or flat: paths, PIL images or uint8 pixels.
            videos: likewise: whatever `read_video` opens, a `Video`, uint8 frames ``(F, 3, H, W)`` or
                ``(F, H, W, 3)``, as a tensor, an array or a list of PIL images, or a
                `VideoStream`, for which no pixels are returned (give the model its ``visual_embeds``).
            padding: as tokenizers take it.
            return_tensors: ``"pt"``.
            video_kwargs: sampling settings for this call, see `hico.video_io.read_video`.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, S)``; with videos ``pixel_values_videos`` ``(N, T, 3, H, W)``
            uint8 and ``video_num_clips`` ``(V,)``; with images ``pixel_values`` ``(M, 3, H, W)`` uint8 and
            ``image_grids`` ``(I, 2)``; where texts mark answers (`hico.prompt.ANSWER_MARKS`) ``assistant_masks``
            ``(B, S)``, 1 for every token with a character of theirs.

        Raises:
            ValueError: if placeholders and media do not match in number, or a medium cannot be read.
            TypeError: if an argument is unknown.
        """
        _refuse_unknown(tokenizer_kwargs, known=TextKwargs.__annotations__)
        texts = [text] if isinstance(text, str) else list(text)
        images, videos = _flat(images, leaf=_is_image), _flat(videos, leaf=_is_video)
        videos = [self._open(video, video_kwargs or {}) for video in videos]
        tiles, grids = self._tile(images)
        texts = expand_placeholders(texts, VIDEO_TOKEN, [self._video_text(video) for video in videos])
        image_texts = [IMAGE_TOKEN * self.vision.num_image_tokens(grid) for grid in grids]
        texts = expand_placeholders(texts, IMAGE_TOKEN, image_texts)
        texts, answers = map(list, zip(*map(take_answers, texts), strict=True))
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            tokenizer_kwargs.setdefault("add_special_tokens", False)  # the chat template wrote them
        if any(answers):
            tokenizer_kwargs["return_offsets_mapping"] = True
        data = dict(self.tokenizer(texts, padding=padding, **tokenizer_kwargs))
        data.pop("token_type_ids", None)
        if any(answers):
            data["assistant_masks"] = list(map(_inside, data.pop("offset_mapping"), answers))
        if images:
            data |= {"pixel_values": torch.cat(tiles), "image_grids": torch.tensor(grids)}
        decoded = [video for video in videos if isinstance(video, Video)]
        if decoded:
            clips = [self._clips(video.frames) for video in decoded]
            data["pixel_values_videos"] = torch.cat(clips)
            data["video_num_clips"] = torch.tensor([len(some) for some in clips])
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature:
        """Write conversations as prompts and, if asked, open their videos and images and prepare them.

        Args:
            conversation: messages ``{"role", "content"}``, or a list of such lists. Content is text or a list of
                ``{"type": "text", "text"}``, ``{"type": "image", "path"}`` and ``{"type": "video", "path"}``; the
                latter takes settings of `read_video` too, such as ``num_frames``, ``start`` and ``end``.
            chat_template: instead of the processor's own.
            tokenize: return model inputs, not text.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, for the model to go on with it.
            return_dict: with ``tokenize``, return all inputs; otherwise ``input_ids`` alone.
            processor_kwargs: with ``tokenize``, for `__call__`.
            kwargs: likewise.

        Raises:
            ValueError: if there is no message, a medium cannot be read, or a setting of a video has no effect.
            TypeError: if an argument is unknown.
        """
        kwargs |= processor_kwargs or {}
        if not len(conversation):
            raise ValueError("the conversation has no messages; give at least one")
        is_batch = not isinstance(conversation[0], Mapping)
        conversations = conversation if is_batch else [conversation]
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        template = chat_template or self.chat_template
        texts = [self._write(messages, template, **options) for messages in conversations]
        if not tokenize:
            _refuse_unknown(kwargs, known=TextKwargs.__annotations__)
            return texts if is_batch else texts[0]
        parts = [part for messages in conversations for part in _media_parts(messages)]
        video_kwargs = kwargs.pop("video_kwargs", None) or {}
        videos = [self._open_part(part, video_kwargs) for part in parts if part["type"] == "video"]
        images = [_source(part, "image") for part in parts if part["type"] == "image"]
        inputs = self(texts, images=images, videos=videos, **kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def _write(self, messages: Sequence[Mapping[str, Any]], template: str, **options: Any) -> str:
        if any(not isinstance(message["content"], str) for message in messages) and not self._takes_parts(template):
            messages = [{**message, "content": _as_text(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    def _takes_parts(self, template: str) -> bool:
        """Say whether a template writes contents of several parts; that of an LLM takes texts only."""
        if template not in self._known_templates:
            probe = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Hello"}]}]
            try:
                text = self.tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
            except Exception:  # templates fail in any way at what they do not expect
                text = ""
            self._known_templates[template] = VIDEO_TOKEN in text and "Hello" in text and "'type'" not in text
        return self._known_templates[template]

    def _open_part(self, part: Mapping[str, Any], video_kwargs: Mapping[str, Any]) -> Video | VideoStream:
        own = {key: value for key, value in part.items() if key not in ("type", "path", "video", "url")}
        video = _source(part, "video")
        if own and isinstance(video, (Video, VideoStream, Tensor, np.ndarray, list, tuple)):
            raise ValueError(f"{', '.join(own)} have no effect on frames that are sampled already; choose among them")
        return self._open(video, {**video_kwargs, **own})

    def _open(self, video: Any, video_kwargs: Mapping[str, Any]) -> Video | VideoStream:
        if isinstance(video, (Video, VideoStream)):
            return video
        if isinstance(video, (list, tuple)):
            video = resize_frames(video, self.vision.image_size)
        if isinstance(video, np.ndarray):
            video = torch.from_numpy(video)
        if isinstance(video, Tensor):
            if video.ndim != 4 or not len(video):
                raise ValueError(f"frames of shape {tuple(video.shape)} are not (F, 3, H, W) with at least one frame")
            # Frames without a clock: they are taken to be one second apart, as in a folder of images.
            seconds = torch.arange(len(video), dtype=torch.float64)
            info = VideoInfo("frames", len(video), 1.0, float(len(video)), *video.shape[:-3:-1], 0, "frames")
            return Video(video, seconds, info, start=0.0, duration=info.duration)
        settings = self.video_settings(video_kwargs)
        return read_video(video, size=self.vision.image_size, clip_len=self.vision.clip_len, **settings)

    def video_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Complete settings of `read_video` from the processor's own.

        Args:
            given: what this video asks for; None is no wish. A number of frames, a rate or a mode replaces all that
                the processor says about how many frames there are.
        """
        given = {name: value for name, value in given.items() if value is not None}
        own = dict(self.video)
        if given.keys() & {"mode", "num_frames", "fps"}:
            replaced = {"mode", "num_frames", "fps", "min_frames", "max_frames"}
            if "num_frames" in own and "num_frames" in given:
                replaced.discard("mode")  # it takes a number of frames, so it takes another one too
            own = {name: value for name, value in own.items() if name not in replaced}
        return own | given

    def _video_text(self, video: Video | VideoStream) -> str:
        num_frames = len(video.seconds)
        padded = num_frames + -num_frames % self.vision.clip_len
        message = write_time_message(self.time_message, duration=video.duration, seconds=video.seconds)
        return VIDEO_TOKEN * self.vision.num_video_tokens(padded) + insert_time_message(message)

    def _clips(self, frames_FCHW: Tensor) -> Tensor:
        frames_FCHW = resize_frames(frames_FCHW, self.vision.image_size)
        return split_clips(frames_FCHW, self.vision.clip_len)

    def _tile(self, images: Sequence[Any]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        tiling = self.image_tiling
        candidates = IMAGE_GRIDS[tiling]() if isinstance(tiling, str) else tiling
        fit = "stretch" if self.vision.image_layout == "mosaic" else "pad"
        cut = [cut_tiles(_open_image(image), self.vision.image_size, grids=candidates, fit=fit) for image in images]
        return [tiles for tiles, _ in cut], [grid for _, grid in cut]


def split_clips(frames_FCHW: Tensor, clip_len: int) -> Tensor:
    """Split frames into clips ``(N, T, 3, H, W)``, repeating the last frame to fill the last clip."""
    missing = -len(frames_FCHW) % clip_len
    if missing:
        frames_FCHW = torch.cat([frames_FCHW, frames_FCHW[-1:].expand(missing, -1, -1, -1)])
    return frames_FCHW.unflatten(0, (-1, clip_len))


def _as_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Write the parts of a turn as `CHAT_TEMPLATE` does: a newline follows a video or image."""
    if isinstance(content, str):
        return content
    signs = {"video": VIDEO_TOKEN + "\n", "image": IMAGE_TOKEN + "\n"}
    texts = [part["text"] if part["type"] == "text" else signs[part["type"]] for part in content]
    return "".join(texts[:-1]) + texts[-1] if content[-1]["type"] == "text" else "".join(texts).removesuffix("\n")


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Say of tokens at offsets of characters whether they hold any character of the spans."""
    return [int(any(start < b and max(end, start + 1) > a for a, b in spans)) for start, end in offsets]


def _media_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] != "text"]


def _source(part: Mapping[str, Any], kind: str) -> Any:
    for key in ("path", kind, "url"):
        if key in part:
            return part[key]
    raise ValueError(f"the {kind} part {dict(part)} names no file; give it a 'path'")


def _refuse_unknown(given: Mapping[str, Any], *, known: Container[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"unknown arguments {', '.join(unknown)}; settings of videos go into video_kwargs")


def _open_image(image: Any) -> Any:
    if not isinstance(image, (str, Path)):
        return image
    try:
        with Image.open(image) as opened:
            return to_pil(opened)
    except FileNotFoundError as error:
        raise ValueError(f"{image}: no such image file; check the path") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{image}: not an image that Pillow can read ({error}); convert it to png or jpeg") from error


def _is_image(value: Any) -> bool:
    return not isinstance(value, (list, tuple))


def _is_video(value: Any) -> bool:
    """A list of PIL images is one video; a list of anything else is several."""
    return not isinstance(value, (list, tuple)) or (len(value) > 0 and isinstance(value[0], Image.Image))


def _flat(values: Any, *, leaf) -> list[Any]:
    if values is None:
        return []
    return [values] if leaf(values) else [item for value in values for item in _flat(value, leaf=leaf)]


AutoProcessor.register(HicoConfig, HicoProcessor, exist_ok=True)
