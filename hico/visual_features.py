"""From the pixels and ids of a prompt to its embeddings: what `HicoModel` does before its LLM."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from hico.grids import IMAGE_LAYOUTS
from hico.parallel import all_gather
from hico.placeholders import promised_sizes
from hico.preprocessing import normalize_pixels
from hico.video_compressors.base import CompressedVideo, FrameTokens, refuse_by_content
from hico.visual_prompt import VisualItems, VisualPrompt, fill_prompt

CLIPS_PER_CHUNK = 16
"""Clips that go through the encoder at once; bounds its memory whatever the length of a video."""


class VisualFeaturesMixin:
    """What `HicoModel` does with its ``encoder``, ``compressor``, ``projector`` and ``video_compressor``."""

    def encode(
        self,
        clips: Tensor | Iterable[Tensor],
        *,
        clips_per_chunk: int = CLIPS_PER_CHUNK,
        compress: bool = True,
        attend: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn clips into visual tokens, a chunk of clips at a time.

        Args:
            clips: ``(N, T, 3, H, W)`` pixels, uint8 or already normalised; or an iterable of such tensors, which is
                read as it is needed, so that a video of any length takes the memory of one chunk.
            clips_per_chunk: clips encoded at once.
            compress: if False, leave the compressor out.
            attend: return ``(N, K, 1 + C)`` too: the attention that each token received in the encoder, and its key.

        Returns:
            ``(N, K, E)``, which no video compressor has seen.
        """
        if self._sequence is None or not isinstance(clips, Tensor) or not len(clips):
            parts = self._encode(clips, clips_per_chunk, compress=compress, attend=attend)
        else:
            mesh, share = self._sequence.mesh, -(-len(clips) // self._sequence.mesh.size)
            own = clips[mesh.rank * share : (mesh.rank + 1) * share]
            blank = own.new_zeros(share - len(own), *clips.shape[1:])  # so that every process runs the same parts
            parts = self._encode(torch.cat([own, blank]), clips_per_chunk, compress=compress, attend=attend)
            parts = tuple(all_gather(part, mesh.group).flatten(0, 1)[: len(clips)] for part in parts)
        return parts if attend else parts[0]

    def _encode(
        self, clips: Tensor | Iterable[Tensor], clips_per_chunk: int, *, compress: bool, attend: bool
    ) -> tuple[Tensor, ...]:
        chunks = _chunks(clips, clips_per_chunk)
        encoded = [self._encode_chunk(chunk, compress=compress, attend=attend) for chunk in chunks]
        if not encoded:
            raise ValueError(_NO_CLIPS)
        tokens, facts = zip(*encoded, strict=True)
        return (torch.cat(tokens), torch.cat(facts)) if attend else (torch.cat(tokens),)

    def encode_video(self, clips: Tensor | Iterable[Tensor], *, num_clips: int) -> CompressedVideo:
        """Encode one video and compress it as a whole, holding no more of it than its compressor needs.

        Args:
            clips: as `encode` takes them.
            num_clips: how many there are.
        """
        chunks = _chunks(clips, CLIPS_PER_CHUNK)
        first = next(chunks, None)
        if first is None:
            raise ValueError(_NO_CLIPS)
        encoded = (self._encode_chunk(chunk, attend=self._attends) for chunk in chain([first], chunks))
        return self._compress_video(encoded, num_clips=num_clips, clip_shape=first.shape[1:])

    @property
    def _attends(self) -> bool:
        return self.video_compressor is not None and self.video_compressor.needs_attention

    def _compress_video(
        self, encoded: Iterable[tuple[Tensor, Tensor | None]], *, num_clips: int, clip_shape: Sequence[int]
    ) -> CompressedVideo:
        """Compress a video of clips ``(T, 3, H, W)``, given chunk by chunk as `encode` makes them."""
        grid = self.encoder.grid(clip_shape[0], *clip_shape[-2:])
        num_steps = self.compressor.num_steps(grid)
        per_frame = self.compressor.num_output_tokens(grid) // num_steps
        num_frames, num_sampled, num_seen = num_clips * num_steps, clip_shape[0] // num_steps, 0

        def frames() -> Iterator[FrameTokens]:
            nonlocal num_seen
            for tokens_NKE, facts_NKC in encoded:
                num_seen += len(tokens_NKE)
                tokens_FPE = tokens_NKE.reshape(-1, per_frame, tokens_NKE.shape[-1])
                if facts_NKC is None:
                    yield FrameTokens(tokens_FPE)
                else:
                    facts_FPC = facts_NKC.reshape(-1, per_frame, facts_NKC.shape[-1])
                    yield FrameTokens(tokens_FPE, facts_FPC[..., 0], facts_FPC[..., 1:])

        if self.video_compressor is None:
            tokens_FPE = torch.cat([part.tokens_FPD for part in frames()])
            return CompressedVideo.whole(tokens_FPE, sampled_per_frame=num_sampled)
        indices_K, tokens_KE = self.video_compressor.select_stream(frames(), num_frames=num_frames)
        if num_seen != num_clips:
            raise ValueError(f"num_clips is {num_clips}, but the video has {num_seen} clips")
        return CompressedVideo(tokens_KE, indices_K, num_frames, per_frame, num_sampled)

    def _encode_chunk(
        self, clips_NTCHW: Tensor, *, compress: bool = True, attend: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens ``(N, K, E)`` and, if asked for, the attention that each received, followed by its key."""
        weight = self.projector.mlp[0].weight
        if not weight.is_meta:  # else it is offloaded, and accelerate moves what goes into the modules
            clips_NTCHW = clips_NTCHW.to(weight.device, non_blocking=True)
        if clips_NTCHW.dtype == torch.uint8:
            clips_NTCHW = normalize_pixels(clips_NTCHW, mean=self.encoder.image_mean, std=self.encoder.image_std)
        elif not clips_NTCHW.is_floating_point():
            raise ValueError(f"pixels are {clips_NTCHW.dtype}; give uint8, or floats that are normalised already")
        # A part that does not learn may be of fewer bits than one that does, and a weight be stored as integers.
        dtypes = [
            next((p.dtype for p in part.parameters() if p.is_floating_point()), self.dtype)
            for part in (self.encoder, self.projector)
        ]
        facts_NLC, clips_NTCHW = None, clips_NTCHW.to(dtypes[0])
        if attend:
            tokens_NLD, attention_NL, keys_NLC = self.encoder.attend(clips_NTCHW)
            facts_NLC = torch.cat([attention_NL[..., None], keys_NLC], dim=-1)
        else:
            tokens_NLD = self.encoder(clips_NTCHW)
        tokens_NLD = tokens_NLD.to(dtypes[1])
        if not compress:
            return self.projector(tokens_NLD), facts_NLC
        if self.config.projector_first:
            tokens_NLD = self.projector(tokens_NLD)
        grid = self.encoder.grid(clips_NTCHW.shape[1], *clips_NTCHW.shape[-2:])
        facts_NKC = None if facts_NLC is None else self.compressor.carry(facts_NLC, tokens_NLD, grid)
        tokens_NKD = self.compressor(tokens_NLD, grid)
        return tokens_NKD if self.config.projector_first else self.projector(tokens_NKD), facts_NKC

    def get_videos(self, pixel_values_videos: Tensor, video_num_clips: Tensor | None = None) -> list[CompressedVideo]:
        """Encode videos, and say where and when the tokens were that are left of each.

        Args:
            pixel_values_videos: ``(N, T, 3, H, W)``, the clips of all videos, one video after the other.
            video_num_clips: ``(V,)`` clips of each video; one video if omitted.
        """
        num_clips = len(pixel_values_videos)
        counts = [num_clips] if video_num_clips is None else video_num_clips.tolist()
        if sum(counts) != num_clips:
            raise ValueError(f"video_num_clips {counts} adds up to {sum(counts)}, but there are {num_clips} clips")
        encoded = self.encode(pixel_values_videos, **({"attend": True} if self._attends else {}))
        tokens, facts = encoded if self._attends else (encoded, None)
        facts = [None] * len(counts) if facts is None else facts.split(counts)
        shape = pixel_values_videos.shape[1:]
        return [
            self._compress_video([part], num_clips=count, clip_shape=shape)
            for count, *part in zip(counts, tokens.split(counts), facts, strict=True)
        ]

    def get_video_features(self, pixel_values_videos: Tensor, video_num_clips: Tensor | None = None) -> list[Tensor]:
        """Encode videos, see `get_videos`: V tensors ``(tokens, E)``."""
        return [video.tokens_KD for video in self.get_videos(pixel_values_videos, video_num_clips)]

    def get_image_features(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> list[Tensor]:
        """Encode images.

        Args:
            pixel_values: ``(M, 3, H, W)``, the tiles of all images, one image after the other; a tiled image starts
                with its thumbnail.
            image_grids: ``(I, 2)`` rows and columns of each image; ``(0, 0)``, or omitted, is an image of one tile.

        Returns:
            I tensors ``(tokens, E)``.
        """
        layout = IMAGE_LAYOUTS[self.config.image_layout]
        tokens_MKE = self.encode(pixel_values[:, None], compress=layout.compresses)
        grids = [(0, 0)] * len(tokens_MKE) if image_grids is None else [tuple(grid) for grid in image_grids.tolist()]
        counts = [1 + rows * columns for rows, columns in grids]
        if sum(counts) != len(tokens_MKE):
            raise ValueError(f"images of {grids} (rows, columns) have {sum(counts)} tiles, not {len(tokens_MKE)}")
        return [layout.arrange(tokens, grid) for tokens, grid in zip(tokens_MKE.split(counts), grids, strict=True)]

    def embed(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_num_clips: Tensor | None = None,
        visual_embeds: Sequence[Tensor] | None = None,
        visual_copies: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Embed a prompt, with visual tokens in the place of their placeholders.

        Args:
            input_ids: ``(B, S)``.
            visual_embeds: tokens encoded before, instead of pixels: one ``(tokens, E)`` per video or image in the
                order of their placeholders, row by row.
            visual_copies: how often what is seen stands in the batch: that of all rows, and then that of all again,
                as where two answers to each prompt are compared. It is given and encoded once.

        Returns:
            ``inputs_embeds`` ``(B, S, E)``, and ``visual_mask`` ``(B, S)``: 0 for text, k for the k-th video or image
            of its row.

        Raises:
            ValueError: if the videos and images do not fill the placeholders of their rows, item by item.
        """
        prompt = self.prepare(
            input_ids,
            pixel_values=pixel_values,
            image_grids=image_grids,
            pixel_values_videos=pixel_values_videos,
            video_num_clips=video_num_clips,
            visual_embeds=visual_embeds,
            visual_copies=visual_copies,
        )
        if prompt.trim is not None:
            refuse_by_content(
                self.video_compressor, "embed, which returns as many embeddings as the prompt has tokens,"
            )
        return prompt.inputs_embeds, prompt.visual_mask

    def prepare(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_num_clips: Tensor | None = None,
        visual_embeds: Sequence[Tensor] | None = None,
        visual_copies: int = 1,
    ) -> VisualPrompt:
        """Embed a prompt as `embed` does, and shorten it where a video compressor kept less than the placeholders say.

        That happens with those only that are ``by_content``. Of ``visual_embeds`` that do not fill all placeholders,
        every video needs an unbroken run of its own.
        """
        kind_BS = torch.zeros_like(input_ids)
        kind_BS[input_ids == self.config.image_token_id] = 1
        kind_BS[input_ids == self.config.video_token_id] = 2
        videos = None
        if visual_embeds is not None:
            if pixel_values is not None or pixel_values_videos is not None:
                raise ValueError("got both pixels and visual_embeds; give one of them")
            width, visual_embeds = self.config.text_config.hidden_size, list(visual_embeds) * visual_copies
            for tokens in visual_embeds:
                if tokens.ndim != 2 or tokens.shape[1] != width:
                    raise ValueError(
                        f"visual_embeds of shape {tuple(tokens.shape)} do not fit this LLM; "
                        f"give (tokens, {width}) for every video or image, as get_video_features does"
                    )
            sizes = [len(tokens) for tokens in visual_embeds]
            if self._by_content:
                sizes = promised_sizes(kind_BS, sizes)
            groups = [VisualItems("video or image", kind_BS != 0, visual_embeds, sizes)]
        else:
            images = [] if pixel_values is None else self.get_image_features(pixel_values, image_grids)
            images = images * visual_copies
            groups = [VisualItems("image", kind_BS == 1, images, [len(tokens) for tokens in images])]
            if pixel_values_videos is not None:
                videos = self.get_videos(pixel_values_videos, video_num_clips)
                tokens, sizes = [video.tokens_KD for video in videos], [len(video.tokens_KD) for video in videos]
                if self._by_content:
                    shapes = [(video.num_frames, video.tokens_per_frame) for video in videos]
                    sizes = [self.video_compressor.num_kept(*shape) for shape in shapes]
                groups.append(VisualItems("video", kind_BS == 2, tokens * visual_copies, sizes * visual_copies))
            else:
                groups.append(VisualItems("video", kind_BS == 2, [], []))
        prompt = fill_prompt(
            input_ids,
            kind_BS,
            groups,
            embedding=self.get_input_embeddings(),
            pad_id=getattr(self.config.text_config, "pad_token_id", None) or 0,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        prompt.videos = videos
        return prompt

    @property
    def _by_content(self) -> bool:
        return self.video_compressor is not None and self.video_compressor.by_content


_NO_CLIPS = "there are no clips to encode; a video has at least one frame"


def _chunks(clips: Tensor | Iterable[Tensor], size: int) -> Iterator[Tensor]:
    return (chunk for some in ([clips] if isinstance(clips, Tensor) else clips) for chunk in some.split(size))
