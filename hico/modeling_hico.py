"""`HicoModel` and `HicoForConditionalGeneration`: a stock Hugging Face LLM that sees videos and images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hico.compat import CACHE_NAME, cache_argument
from hico.configuration_hico import HicoConfig, build_compressor, build_video_compressor, named_part
from hico.generation import VisualGenerationMixin, refuse_without_prompt
from hico.llm_dropout import DropSchedule, find_handle, patch
from hico.ops.chunks import sum_over_chunks
from hico.parallel import SequenceHandle, SequenceMesh
from hico.parallel import patch as spread
from hico.pretrained import HicoPreTrainedModel
from hico.projector import MLPProjector
from hico.prompt import IGNORE_INDEX
from hico.registry import ENCODERS, VIDEO_COMPRESSORS
from hico.rotary import keep_rotary_in_float32
from hico.visual_features import VisualFeaturesMixin


class HicoModel(HicoPreTrainedModel, VisualFeaturesMixin):
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
        self.video_compressor = build_video_compressor(config.video_compressor, self.encoder, self.compressor)
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

    def set_video_compressor(self, spec: str | dict | None) -> None:
        """Compress whole videos otherwise from now on; stored in the config, whose ``vision`` the processor needs.

        Args:
            spec: as ``video_compressor`` of `HicoConfig`; None leaves the tokens of a video as they are.

        Raises:
            ValueError: if there is no such video compressor, or it does not fit; the old one stays.
        """
        spec = None if spec is None else named_part(spec, VIDEO_COMPRESSORS)
        built = build_video_compressor(spec, self.encoder, self.compressor)
        self.video_compressor = built if built is None else built.to(self.projector.mlp[0].weight.device)
        self.config.video_compressor = spec

    @property
    def drops_tokens(self) -> bool:
        """Whether a drop schedule is in force, by `set_drop_schedule` or by `hico.llm_dropout.patch`."""
        return find_handle(self.language_model) is not None

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

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
            The LLM's output. Its ``videos`` say where the tokens of videos were and when, if they were given as
            pixels. If the content of videos decided how many tokens they take, its ``trim`` says which of the prompt
            are left; if the LLM dropped visual tokens, its ``drop_plan`` says which of those are.
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
        prompt = None
        if inputs_embeds is None:
            masks = {"attention_mask": attention_mask, "position_ids": position_ids}
            prompt = self.prepare(input_ids, **masks, **visuals, visual_copies=visual_copies)
            inputs_embeds, visual_mask = prompt.inputs_embeds, prompt.visual_mask
            attention_mask, position_ids = prompt.attention_mask, prompt.position_ids
            if prompt.trim is not None and labels is not None:
                labels = prompt.trim.gather(labels, fill=IGNORE_INDEX)
        else:
            refuse_without_prompt(visuals)
        if self.drops_tokens:
            kwargs |= {"visual_mask": visual_mask, "labels": labels}
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **cache_argument(cache, past_key_values),
            **kwargs,
        )
        output.trim, output.videos = (None, None) if prompt is None else (prompt.trim, prompt.videos)
        return output


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

    def set_video_compressor(self, spec: str | dict | None) -> None:
        """See `HicoModel.set_video_compressor`."""
        self.model.set_video_compressor(spec)

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

        Where visual tokens are dropped, logits and loss are those of the tokens that are left; ``trim`` and then
        ``drop_plan`` of the output align them with the prompt, and are None where nothing was dropped.

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
        if labels is not None and outputs.trim is not None:
            labels = outputs.trim.gather(labels, fill=IGNORE_INDEX)
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
        # No fields of it: a trainer concatenates those over batches.
        output.drop_plan, output.sequence_layout = plan, layout
        output.trim, output.videos = outputs.trim, outputs.videos
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


AutoModel.register(HicoConfig, HicoModel, exist_ok=True)
AutoModelForImageTextToText.register(HicoConfig, HicoForConditionalGeneration, exist_ok=True)
