"""`HicoProcessor`: chat messages with videos and images in, model inputs out."""

from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import TextKwargs

from hico.configuration_hico import HicoConfig, VisionSpec
from hico.grids import anyres_grids, unires_grids
from hico.media import flat_images, flat_videos, is_frames, metadata_of_each, open_image, video_of_frames
from hico.messages import Message, media_parts, mentions, normalize, source_of
from hico.preprocessing import cut_tiles, resize_frames
from hico.prompt import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    content_as_text,
    expand_placeholders,
    insert_time_message,
    join_lines,
    mark_answers,
    runs,
    take_answers,
    tokens_inside,
)
from hico.prompt import time_message as write_time_message
from hico.published import is_published, translate, what_it_is
from hico.tokenizer import add_placeholders, load_llm_tokenizer
from hico.video_io import ReadSettings, Video, VideoStream, read_video

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
        time_message: ``"short"``, ``"long"``, ``"chat"`` or ``None``, see `hico.prompt.time_message`.
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
        _refuse_owned(self.video, self.vision)
        write_time_message(time_message, duration=0.0, seconds=[])
        self.time_message = time_message
        self._known_templates: dict[str, bool] = {}
        self.image_tiling = image_tiling if isinstance(image_tiling, str) else [tuple(grid) for grid in image_tiling]

    @classmethod
    def from_config(cls, config: HicoConfig, tokenizer, **settings: Any) -> "HicoProcessor":
        """Make the processor that goes with a model's configuration."""
        if not config.vision.layout.stretches:  # as LongVA was trained
            video = {"fit": "crop", **(settings.get("video") or {})}
            settings = {"image_tiling": "unires", "time_message": None, **settings, "video": video}
        return cls(tokenizer, vision=config.vision, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs: Any) -> "HicoProcessor":
        """Load a saved processor, or make the one that goes with a checkpoint of VideoChat-Flash or LongVA.

        Code that lies beside it is never run, not even with ``trust_remote_code=True``.

        Raises:
            ValueError: if a published checkpoint has no tokenizer, a tokenizer cannot do without its own code, or the
                folder is in another layout.
        """
        kwargs.pop("trust_remote_code", None)
        path = str(pretrained_model_name_or_path)
        published, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
        if not is_published(published):
            if published.get("model_type", "hico") != "hico":
                raise ValueError(f"{path} holds no model that hico reads. {what_it_is(published)}")
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
        video_metadata: Any = None,
        **tokenizer_kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            text: prompts, with one placeholder per video or image.
            images: in the order of their placeholders, nested or flat: whatever `hico.media.open_image` opens.
            videos: likewise: whatever `read_video` opens, frames as `hico.media.video_of_frames` takes them, a
                `Video`, or a `VideoStream`, for which no pixels are returned (give the model its ``visual_embeds``).
                A list of names is several videos; inside two lists, for batch and prompt, it is the frames of one.
            padding: as tokenizers take it.
            return_tensors: ``"pt"``.
            video_kwargs: sampling settings for this call, see `hico.video_io.read_video`.
            video_metadata: of the videos that are given as frames, as transformers' video processors take it: one
                ``VideoMetadata`` or mapping, or a list of one per video, None where a video is read here.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, S)``; with videos ``pixel_values_videos`` ``(N, T, 3, H, W)``
            uint8 and ``video_num_clips`` ``(V,)``; with images ``pixel_values`` ``(M, 3, H, W)`` uint8 and
            ``image_grids`` ``(I, 2)``; where texts mark answers (`hico.prompt.ANSWER_MARKS`) ``assistant_masks``
            ``(B, S)``, 1 for every token with a character of theirs.

        Raises:
            ValueError: if placeholders and media do not match in number, a medium cannot be read, or a setting has no
                effect.
            TypeError: if an argument is unknown.
        """
        _refuse_unknown(tokenizer_kwargs, known=_TEXT_KWARGS)
        videos = flat_videos(videos)
        metadata = metadata_of_each(video_metadata, len(videos))
        opened = [self._open(*one, video_kwargs) for one in zip(videos, metadata, strict=True)]
        texts = [text] if isinstance(text, str) else list(text)
        data = self._prepare(texts, flat_images(images), opened, padding=padding, **tokenizer_kwargs)
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature:
        """Write conversations as prompts and, if asked, open their videos and images and prepare them.

        Args:
            conversation: messages ``{"role", "content"}``, or a list of such lists. Content is text or a list of
                ``{"type": "text", "text"}``, ``{"type": "image", "path"}`` and ``{"type": "video", "path"}``; the
                latter takes settings of `read_video` too, such as ``num_frames``, ``start`` and ``end``. All else
                that transformers' processors take is taken too, see `hico.messages`.
            chat_template: instead of the processor's own, or the name of one of several.
            tools: functions or their schemas, for the template.
            documents: for the template.
            tokenize: return model inputs, not text.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, for the model to go on with it.
            return_dict: with ``tokenize``, return all inputs; otherwise ``input_ids`` alone.
            return_assistant_tokens_mask: with ``tokenize``, return ``assistant_masks`` ``(B, S)`` too: 1 for what the
                template marks as generated.
            processor_kwargs: with ``tokenize``, for `__call__`.
            kwargs: for `__call__`, or, if it has no such argument, for the template, which must mention it
                (``enable_thinking``).

        Raises:
            ValueError: if there is no message, a medium cannot be read, or a setting has no effect.
            TypeError: if an argument is unknown.
        """
        template = self._template(chat_template)
        conversations, is_batch = normalize(conversation)
        media = [part for messages in conversations for part in media_parts(messages)]
        variables = {name: kwargs.pop(name) for name in kwargs.keys() - _ARGUMENTS if mentions(template, name)}
        kwargs |= processor_kwargs or {}
        _refuse_unused(template, conversations, tools=tools, documents=documents)
        render = partial(
            self.tokenizer.apply_chat_template,
            chat_template=template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )
        conversations = [self._as_taken(messages, template) for messages in conversations]
        texts = [render(messages, tokenize=False) for messages in conversations]
        if return_assistant_tokens_mask:
            if not (tokenize and return_dict):
                raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
            spans = [self._generated(template, render, messages) for messages in conversations]
            texts = [mark_answers(*one) for one in zip(texts, spans, strict=True)]
        if not tokenize:
            _refuse_unknown(kwargs, known=_TEXT_KWARGS)
            return texts if is_batch else texts[0]
        images, videos = self._shown(media, kwargs.pop("video_kwargs", None), kwargs.pop("video_metadata", None))
        return_tensors = kwargs.pop("return_tensors", "pt")
        data = self._prepare(texts, images, videos, **kwargs)
        if return_assistant_tokens_mask:
            data.setdefault("assistant_masks", [[0] * len(ids) for ids in data["input_ids"]])
        inputs = BatchFeature(data, tensor_type=return_tensors)
        return inputs if return_dict else inputs["input_ids"]

    def _template(self, name: str | None) -> str:
        """Return a chat template: the processor's own, one of its several by name, or the one that is given."""
        own = self.chat_template
        if not isinstance(own, Mapping):
            return name or own
        if name is None and "default" not in own:
            raise ValueError(f"there are several chat templates; name one with chat_template: {', '.join(own)}")
        return own.get(name or "default", name)

    def _as_taken(self, messages: list[Message], template: str) -> list[Message]:
        """Write the parts of contents as texts, if the template takes nothing else."""
        if any(isinstance(message.get("content"), list) for message in messages) and not self._takes_parts(template):
            return [{**message, "content": content_as_text(message.get("content", ""))} for message in messages]
        return messages

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

    def _generated(self, template: str, render, messages: list[Message]) -> list[tuple[int, int]]:
        """Return the spans of characters that the template marks as generated."""
        if not mentions(template, "generation"):
            raise ValueError("the chat template does not mark what is generated; put it into {% generation %} blocks")
        if not self.tokenizer.is_fast:
            raise ValueError("return_assistant_tokens_mask needs a fast tokenizer, which knows where its tokens lie")
        found = render(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        offsets = found["offset_mapping"]
        return [(offsets[first][0], offsets[end - 1][1]) for first, end in runs(found["assistant_masks"])]

    def _shown(
        self, media: list[Message], video_kwargs: Mapping[str, Any] | None, video_metadata: Any
    ) -> tuple[list[Any], list[Video | VideoStream]]:
        """Return the images among parts of messages, and the videos, opened."""
        parts = [(part["type"], *source_of(part)) for part in media]
        images = [(image, own) for kind, image, own in parts if kind == "image"]
        if without := [name for _, own in images for name in own]:
            raise ValueError(f"{', '.join(without)} have no effect on an image; leave them out")
        videos = [(video, own) for kind, video, own in parts if kind == "video"]
        metadata = metadata_of_each(video_metadata, len(videos))
        opened = [
            self._open(video, its_own, {**(video_kwargs or {}), **own})
            for (video, own), its_own in zip(videos, metadata, strict=True)
        ]
        return [image for image, _ in images], opened

    def _prepare(
        self,
        texts: list[str],
        images: Sequence[Any],
        videos: Sequence[Video | VideoStream],
        *,
        padding: bool | str = True,
        **tokenizer_kwargs: Any,
    ) -> dict[str, Any]:
        """Write placeholders out, tokenize, and cut pixels; for the arguments see `__call__`."""
        _refuse_unknown(tokenizer_kwargs, known=_TEXT_KWARGS)
        tiles, grids = self._tile(images)
        texts = [join_lines(text, self.time_message) for text in texts]
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
            data["assistant_masks"] = list(map(tokens_inside, data.pop("offset_mapping"), answers))
        if images:
            data |= {"pixel_values": torch.cat(tiles), "image_grids": torch.tensor(grids)}
        decoded = [video for video in videos if isinstance(video, Video)]
        if decoded:
            clips = [self._clips(video.frames) for video in decoded]
            data["pixel_values_videos"] = torch.cat(clips)
            data["video_num_clips"] = torch.tensor([len(some) for some in clips])
        return data

    def _open(
        self, video: Any, metadata: Mapping[str, Any] | None, video_kwargs: Mapping[str, Any] | None
    ) -> Video | VideoStream:
        """Read a video, or make one of frames; ``video_kwargs`` are the settings of this call."""
        given = {name: value for name, value in (video_kwargs or {}).items() if value is not None}
        ReadSettings.of(given)
        if is_frames(video):
            fit = given.pop("fit", self._fit)
            sizes = {"size": self.vision.image_size, "clip_len": self.vision.clip_len}
            return video_of_frames(video, metadata, given, fit=fit, **sizes)
        if metadata is not None:
            raise ValueError(f"video_metadata has no effect on {video!r}, which brings its own; give None for it")
        if not isinstance(video, (Video, VideoStream)):
            settings = self.video_settings(given)
            return read_video(video, size=self.vision.image_size, clip_len=self.vision.clip_len, **settings)
        if given:
            raise ValueError(
                f"{', '.join(given)} have no effect on frames that are sampled already; choose among them"
            )
        return video

    def video_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Complete settings of `read_video` from the processor's own.

        Args:
            given: what this video asks for; None is no wish. A number of frames, a rate or a mode replaces all that
                the processor says about how many frames there are, and a bound the other one if they contradict.

        Raises:
            TypeError: if the model says what is asked for, as it does the frames of a clip.
        """
        given = {name: value for name, value in given.items() if value is not None}
        _refuse_owned(given, self.vision)
        own = dict(self.video)
        if given.keys() & {"mode", "num_frames", "fps"}:
            replaced = {"mode", "num_frames", "fps", "min_frames", "max_frames", "multiple_of", "bounds"}
            if "num_frames" in own and "num_frames" in given:
                replaced -= {"mode", "bounds"}  # it takes a number of frames, so it takes another one too
            own = {name: value for name, value in own.items() if name not in replaced}
        elif given.keys() & {"min_frames", "max_frames"}:
            own.pop("bounds", None)  # with the published ones, a number of frames wins over a bound
            least, most = (own | given).get("min_frames"), (own | given).get("max_frames")
            if least is not None and most is not None and least > most > 0:
                own.pop("min_frames" if "max_frames" in given else "max_frames", None)
        return own | given

    @property
    def _fit(self) -> str:
        return self.video.get("fit", "stretch")

    def _video_text(self, video: Video | VideoStream) -> str:
        num_frames = len(video.seconds)
        padded = num_frames + -num_frames % self.vision.clip_len
        message = write_time_message(self.time_message, duration=video.duration, seconds=video.seconds)
        return VIDEO_TOKEN * self.vision.num_video_tokens(padded) + insert_time_message(message)

    def _clips(self, frames_FCHW: Tensor) -> Tensor:
        frames_FCHW = resize_frames(frames_FCHW, self.vision.image_size, fit=self._fit)
        return split_clips(frames_FCHW, self.vision.clip_len)

    def _tile(self, images: Sequence[Any]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        tiling = self.image_tiling
        candidates = IMAGE_GRIDS[tiling]() if isinstance(tiling, str) else tiling
        fit = "stretch" if self.vision.layout.stretches else "pad"
        cut = [cut_tiles(open_image(image), self.vision.image_size, grids=candidates, fit=fit) for image in images]
        return [tiles for tiles, _ in cut], [grid for _, grid in cut]


def split_clips(frames_FCHW: Tensor, clip_len: int) -> Tensor:
    """Split frames into clips ``(N, T, 3, H, W)``, repeating the last frame to fill the last clip."""
    missing = -len(frames_FCHW) % clip_len
    if missing:
        frames_FCHW = torch.cat([frames_FCHW, frames_FCHW[-1:].expand(missing, -1, -1, -1)])
    return frames_FCHW.unflatten(0, (-1, clip_len))


_TEXT_KWARGS = TextKwargs.__annotations__.keys() - {
    # These are of transformers' own processors; its tokenizers would take no notice, or fail.
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
    "sanitize_control_tokens",
}
_ARGUMENTS = _TEXT_KWARGS | {"images", "videos", "video_kwargs", "video_metadata", "return_tensors"}
"""What goes to `HicoProcessor.__call__` whatever a chat template mentions."""


def _refuse_unknown(given: Mapping[str, Any], *, known: Container[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(
            f"unknown arguments {', '.join(unknown)}; settings of videos go into video_kwargs, and the chat template "
            "mentions no such variable"
        )


def _refuse_owned(settings: Mapping[str, Any], vision: VisionSpec) -> None:
    facts = {"clip_len": f"a clip of this model has {vision.clip_len} frames", "size": "the model takes one size"}
    for name in settings.keys() & facts:
        hint = "; for a number of frames that divides by it set multiple_of" if name == "clip_len" else ""
        raise TypeError(f"{name} = {settings[name]} cannot be asked of a video: {facts[name]}{hint}")


def _refuse_unused(template: str, conversations: list[list[Message]], **given: Any) -> None:
    given["tool_calls"] = any("tool_calls" in message for messages in conversations for message in messages)
    unused = [name for name, value in given.items() if value and not mentions(template, name)]
    if unused:
        raise ValueError(f"the chat template has no place for {', '.join(unused)}; give a chat_template that has one")


AutoProcessor.register(HicoConfig, HicoProcessor, exist_ok=True)
