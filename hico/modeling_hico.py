"""`HicoModel` and `HicoForConditionalGeneration`: a stock Hugging Face LLM that sees videos and images."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hico.compat import CACHE_NAME, cache_argument
from hico.configuration_hico import HicoConfig, build_compressor
from hico.generation import VisualGenerationMixin, refuse_without_prompt
from hico.grids import mosaic_order
from hico.llm_dropout import DropSchedule, find_handle, patch
from hico.ops.chunks import sum_over_chunks
from hico.parallel import SequenceHandle, SequenceMesh, all_gather
from hico.parallel import patch as spread
from hico.placeholders import number_items
from hico.preprocessing import normalize_pixels
from hico.pretrained import HicoPreTrainedModel
from hico.projector import MLPProjector
from hico.prompt import IGNORE_INDEX
from hico.registry import ENCODERS
from hico.rotary import keep_rotary_in_float32

CLIPS_PER_CHUNK = 16
"""Clips that go through the encoder at once; bounds its memory whatever the length of a video."""


class HicoModel(HicoPreTrainedModel):
    """Encoder, compressor, projector and LLM, without the LM head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: HicoConfig):
        super().__init__(config)
        self.encoder = ENCODERS.build(config.encoder)
        width, llm_width = self.encoder.hidden_size, config.text_config.hidden_size
        self.compressor = build_compressor(
            config.compressor, self.encoder, hidden_size=llm_width if config.projector_first else width
        )
        self.projector = MLPProjector(width, llm_width)
        self.language_model = AutoModel.from_config(config.text_config)
        keep_rotary_in_float32(self.language_model)
        self._sequence: SequenceHandle | None = None
        self.set_drop_schedule(config.drop_schedule, **(config.drop_options or {}))
        self.post_init()

    def set_drop_schedule(self, schedule: str | list | None, **options) -> None:
        """Drop visual tokens between the layers of the LLM from now on; stored in the config.

        It takes the place of any schedule in force, whether set here or by `hico.llm_dropout.patch`.

        Args:
            schedule: such as ``"uniform@4:0.75,attention@18:0.25"``, see `hico.llm_dropout.DropSchedule`; None drops
                nothing.
            options: ``positions``, ``queries``, ``scope`` and ``seed`` of `hico.llm_dropout.patch`.

        Raises:
            ValueError: if the schedule or an option is not understood or does not fit the LLM; the old one stays.
            TypeError: if there is no such option; the old one stays, too.
        """
        parsed = DropSchedule.parse(schedule)
        before = find_handle(self.language_model)
        if before is not None:
            before.remove()
        try:
            if parsed:
                patch(self.language_model, parsed, **options)
        except (TypeError, ValueError):
            if before is not None:
                patch(self.language_model, before.schedule, **before.options)
            raise
        self.config.drop_schedule = str(parsed) if parsed else None
        self.config.drop_options = options or None

    def set_sequence_parallel(self, mesh: SequenceMesh | None) -> None:
        """Let the processes of a group share the rows of every call from now on, which must be the same for them.

        Frames are shared out before they are encoded, and the LLM works on a part of every row. There is no cache, so
        no generation.

        Args:
            mesh: from `hico.parallel.make_mesh`; None works alone again.

        Raises:
            UnsupportedDecoder: if the LLM has layers that this does not serve.
        """
        if self._sequence is not None:
            self._sequence.remove()
            self._sequence = None
        if mesh is not None and mesh.size > 1:
            self._sequence = spread(self.language_model, mesh)

    @property
    def drops_tokens(self) -> bool:
        """Whether a drop schedule is in force, by `set_drop_schedule` or by `hico.llm_dropout.patch`."""
        return find_handle(self.language_model) is not None

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def encode(
        self, clips: Tensor | Iterable[Tensor], *, clips_per_chunk: int = CLIPS_PER_CHUNK, compress: bool = True
    ) -> Tensor:
        """Turn clips into visual tokens, a chunk of clips at a time.

        Args:
            clips: ``(N, T, 3, H, W)`` pixels, uint8 or already normalised; or an iterable of such tensors, which is
                read as it is needed, so that a video of any length takes the memory of one chunk.
            clips_per_chunk: clips encoded at once.
            compress: if False, leave the compressor out.

        Returns:
            ``(N, K, E)``.
        """
        if self._sequence is None or not isinstance(clips, Tensor) or not len(clips):
            return self._encode(clips, clips_per_chunk, compress)
        mesh, share = self._sequence.mesh, -(-len(clips) // self._sequence.mesh.size)
        own = clips[mesh.rank * share : (mesh.rank + 1) * share]
        blank = own.new_zeros(share - len(own), *clips.shape[1:])  # so that every process runs the same parts
        tokens = self._encode(torch.cat([own, blank]), clips_per_chunk, compress)
        return all_gather(tokens, mesh.group).flatten(0, 1)[: len(clips)]

    def _encode(self, clips: Tensor | Iterable[Tensor], clips_per_chunk: int, compress: bool) -> Tensor:
        chunks = (part for some in _as_iterable(clips) for part in some.split(clips_per_chunk))
        tokens = [self._encode_chunk(chunk, compress=compress) for chunk in chunks]
        if not tokens:
            raise ValueError("there are no clips to encode; a video has at least one frame")
        return torch.cat(tokens)

    def _encode_chunk(self, clips_NTCHW: Tensor, *, compress: bool) -> Tensor:
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
        tokens_NLD = self.encoder(clips_NTCHW.to(dtypes[0])).to(dtypes[1])
        if not compress:
            return self.projector(tokens_NLD)
        grid = self.encoder.grid(clips_NTCHW.shape[1], *clips_NTCHW.shape[-2:])
        if self.config.projector_first:
            return self.compressor(self.projector(tokens_NLD), grid)
        return self.projector(self.compressor(tokens_NLD, grid))

    def get_video_features(self, pixel_values_videos: Tensor, video_num_clips: Tensor | None = None) -> list[Tensor]:
        """Encode videos.

        Args:
            pixel_values_videos: ``(N, T, 3, H, W)``, the clips of all videos, one video after the other.
            video_num_clips: ``(V,)`` clips of each video; one video if omitted.

        Returns:
            V tensors ``(tokens, E)``.
        """
        tokens_NKE = self.encode(pixel_values_videos)
        counts = [len(tokens_NKE)] if video_num_clips is None else video_num_clips.tolist()
        if sum(counts) != len(tokens_NKE):
            raise ValueError(
                f"video_num_clips {counts} adds up to {sum(counts)}, but there are {len(tokens_NKE)} clips"
            )
        return [tokens.flatten(0, 1) for tokens in tokens_NKE.split(counts)]

    def get_image_features(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> list[Tensor]:
        """Encode images.

        Args:
            pixel_values: ``(M, 3, H, W)``, the tiles of all images, one image after the other; a tiled image starts
                with its thumbnail.
            image_grids: ``(I, 2)`` rows and columns of each image; ``(0, 0)``, or omitted, is an image of one tile.

        Returns:
            I tensors ``(tokens, E)``.
        """
        tokens_MKE = self.encode(pixel_values[:, None], compress=self.config.image_layout != "flat")
        grids = [(0, 0)] * len(tokens_MKE) if image_grids is None else [tuple(grid) for grid in image_grids.tolist()]
        counts = [1 + rows * columns for rows, columns in grids]
        if sum(counts) != len(tokens_MKE):
            raise ValueError(f"images of {grids} (rows, columns) have {sum(counts)} tiles, not {len(tokens_MKE)}")
        return [self._arrange(tokens, grid) for tokens, grid in zip(tokens_MKE.split(counts), grids, strict=True)]

    def _arrange(self, tokens_MKE: Tensor, grid: tuple[int, int]) -> Tensor:
        thumbnail, tiles_MKE = tokens_MKE[0], tokens_MKE[1:]
        if not len(tiles_MKE):
            return thumbnail
        if self.config.image_layout == "flat":
            return tokens_MKE.flatten(0, 1)
        if self.config.image_layout == "tiles":
            return tiles_MKE.flatten(0, 1)
        return torch.cat([thumbnail, mosaic_order(tiles_MKE, rows=grid[0], columns=grid[1])])

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
        kind_BS = torch.zeros_like(input_ids)
        kind_BS[input_ids == self.config.image_token_id] = 1
        kind_BS[input_ids == self.config.video_token_id] = 2
        # A placeholder may lie beyond the vocabulary.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(kind_BS != 0, 0))
        if visual_embeds is not None:
            if pixel_values is not None or pixel_values_videos is not None:
                raise ValueError("got both pixels and visual_embeds; give one of them")
            for tokens in visual_embeds:
                if tokens.shape[1:] != embeds.shape[2:]:
                    raise ValueError(
                        f"visual_embeds of shape {tuple(tokens.shape)} do not fit this LLM; "
                        f"give (tokens, {embeds.shape[2]}) for every video or image, as get_video_features does"
                    )
            filled = [("video or image", kind_BS != 0, visual_embeds)]
        else:
            images = [] if pixel_values is None else self.get_image_features(pixel_values, image_grids)
            videos = (
                [] if pixel_values_videos is None else self.get_video_features(pixel_values_videos, video_num_clips)
            )
            filled = [("image", kind_BS == 1, images), ("video", kind_BS == 2, videos)]
        filled = [(name, mask, list(items) * visual_copies) for name, mask, items in filled]
        visual_mask = number_items(
            kind_BS, [(name, mask, [len(tokens) for tokens in items]) for name, mask, items in filled]
        )
        for _, mask, items in filled:
            if items:
                embeds = embeds.masked_scatter(mask[..., None], torch.cat(items).to(embeds))
        return embeds, visual_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_num_clips: Tensor | None = None,
        visual_embeds: Sequence[Tensor] | None = None,
        visual_copies: int = 1,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the LLM on a prompt with videos and images; see `embed` for their arguments.

        Args:
            input_ids: ``(B, S)``; or give ``inputs_embeds`` and ``visual_mask``, as `embed` returns them.
            attention_mask: ``(B, S)``, 0 where padded, on either side.
            past_key_values: keys and values of the tokens before; ``cache`` is its name in transformers from 5.24 on,
                and both are taken.
            labels: ``(B, S)``, read only to find the tokens whose attention decides what is dropped.

        Returns:
            The LLM's output. If visual tokens were dropped, its ``drop_plan`` says which are left.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if "mm_encoder_outputs" in kwargs:  # transformers 5.24 hands it on unasked, and it would stand for nothing
            raise ValueError("mm_encoder_outputs are not read here; give tokens encoded before as visual_embeds")
        visuals = {
            "pixel_values": pixel_values,
            "image_grids": image_grids,
            "pixel_values_videos": pixel_values_videos,
            "video_num_clips": video_num_clips,
            "visual_embeds": visual_embeds,
        }
        if inputs_embeds is None:
            inputs_embeds, visual_mask = self.embed(input_ids, **visuals, visual_copies=visual_copies)
        else:
            refuse_without_prompt(visuals)
        if self.drops_tokens:
            kwargs |= {"visual_mask": visual_mask, "labels": labels}
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **cache_argument(cache, past_key_values),
            **kwargs,
        )


class HicoForConditionalGeneration(HicoPreTrainedModel, VisualGenerationMixin):
    """The model that answers: `HicoModel` with an LM head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    tokens_per_loss_chunk = 2048
    """Learned tokens whose logits exist at once in training: 152,064 numbers each in the case of Qwen2."""

    def __init__(self, config: HicoConfig):
        super().__init__(config)
        self.model = HicoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def set_drop_schedule(self, schedule: str | list | None, **options) -> None:
        """See `HicoModel.set_drop_schedule`."""
        self.model.set_drop_schedule(schedule, **options)

    def set_sequence_parallel(self, mesh: SequenceMesh | None) -> None:
        """See `HicoModel.set_sequence_parallel`; loss and logits are those of one process, on every process."""
        self.model.set_sequence_parallel(mesh)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_num_clips: Tensor | None = None,
        visual_embeds: Sequence[Tensor] | None = None,
        visual_copies: int = 1,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        loss_per_row: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens, and the loss if there are labels; see `HicoModel.forward`.

        Where visual tokens are dropped, logits and loss are those of the tokens that are left; ``drop_plan`` of the
        output aligns them with the prompt, and is None where nothing was dropped.

        Args:
            labels: ``(B, S)`` token ids, -100 where nothing is to be learned.
            logits_to_keep: how many of the last positions get logits, or which; 0 is all. If omitted, all, except in
                training with labels: there the LM head runs on the labelled positions only, and none are returned.
            loss_per_row: return as loss ``(B,)`` the summed losses of every row's tokens: minus the logarithm of the
                probability of all its answers.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grids=image_grids,
            pixel_values_videos=pixel_values_videos,
            video_num_clips=video_num_clips,
            visual_embeds=visual_embeds,
            visual_copies=visual_copies,
            visual_mask=visual_mask,
            labels=labels,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_BSE = outputs.last_hidden_state
        plan, layout = getattr(outputs, "drop_plan", None), getattr(outputs, "sequence_layout", None)
        logits = loss = None
        if labels is None or logits_to_keep is not None or not self.training:
            keep = 0 if logits_to_keep is None else logits_to_keep
            if layout is None:
                kept_BSE = hidden_BSE[:, slice(-keep, None) if isinstance(keep, int) else keep]
            else:
                kept_BSE = layout.keep(hidden_BSE, keep)
            logits = self.lm_head(kept_BSE)
        if labels is not None:
            shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            targets_BS = shifted if plan is None else plan.shift_labels(labels)
            sum_losses = self._row_losses if loss_per_row else self._loss
            if layout is None:
                loss = sum_losses(hidden_BSE, targets_BS, **kwargs)
            else:
                if kwargs.get("num_items_in_batch") is None:
                    kwargs["num_items_in_batch"] = max(1, int((targets_BS != IGNORE_INDEX).sum()))
                targets_BS = targets_BS.to(hidden_BSE.device)
                own_BS, learned_BS = layout.shard(targets_BS, fill=IGNORE_INDEX), targets_BS != IGNORE_INDEX
                numbers_BS = layout.shard(learned_BS.flatten().cumsum(0).view_as(learned_BS) - 1)
                kwargs["token_numbers"] = numbers_BS[own_BS != IGNORE_INDEX]
                loss = layout.total(sum_losses(hidden_BSE, own_BS, **kwargs))
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        output.drop_plan, output.sequence_layout = plan, layout  # no fields: a trainer concatenates those over batches
        return output

    def _loss(self, hidden_BSE: Tensor, targets_BS: Tensor, *, num_items_in_batch=None, **kwargs) -> Tensor:
        """Sum the losses of the learned tokens, chunk by chunk, and divide by their number or the one given."""
        learned = targets_BS != IGNORE_INDEX
        hidden_nE, targets = hidden_BSE[learned], targets_BS[learned]
        if num_items_in_batch is None:
            num_items_in_batch = max(1, len(targets))

        def chunk_loss(hidden_nE: Tensor, targets: Tensor) -> Tensor:
            return self.loss_function(
                logits=self.lm_head(hidden_nE),
                labels=None,
                shift_labels=targets,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )

        return sum_over_chunks(chunk_loss, hidden_nE, targets, size=self.tokens_per_loss_chunk)

    def _row_losses(self, hidden_BSE: Tensor, targets_BS: Tensor, **kwargs) -> Tensor:
        """Sum the losses of the learned tokens of every row ``(B,)``, chunk by chunk."""
        learned = targets_BS != IGNORE_INDEX
        numbers_B1 = torch.arange(len(targets_BS), device=targets_BS.device)[:, None]

        def chunk_losses(hidden_nE: Tensor, targets: Tensor, row_of_token: Tensor) -> Tensor:
            logits = self.lm_head(hidden_nE)
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = nn.functional.cross_entropy(precise, targets, reduction="none")
            return torch.where(row_of_token == numbers_B1, losses, 0).sum(dim=1)

        tokens = hidden_BSE[learned], targets_BS[learned], learned.nonzero()[:, 0]
        return sum_over_chunks(chunk_losses, *tokens, size=self.tokens_per_loss_chunk)


def _as_iterable(clips: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    return iter([clips] if isinstance(clips, Tensor) else clips)


AutoModel.register(HicoConfig, HicoModel, exist_ok=True)
AutoModelForImageTextToText.register(HicoConfig, HicoForConditionalGeneration, exist_ok=True)
