"""``objective: text``: an LLM learns the next token of packed documents, at a length of its own."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hico.compat import save_under_own_names
from hico.convert.sources import HICO, LLM, Source, llm_config
from hico.data.batching import BatchRule, BatchSampler, EpochLoader
from hico.data.packing import PackedText, PackRule, collate_text
from hico.data.texts import TextCorpus
from hico.data.tokens import TokenStore, tokenize, tokenizer_identity
from hico.parallel import make_mesh
from hico.parallel import patch as spread
from hico.processing_hico import HicoProcessor
from hico.rotary import keep_rotary_in_float32
from hico.tokenizer import load_llm_tokenizer
from hico.train.config import Recipe
from hico.train.lm_head import check_halves, decoder_of, sees, with_text_loss
from hico.train.lora import load_model
from hico.train.memory import OffloadActivations, save_memory
from hico.train.parts import freeze, modules_of, rest
from hico.train.rope import extend_positions
from hico.train.safeguards import outlive_sigterm
from hico.train.stage_trainer import StageTrainer
from hico.train.throughput import peak_memory

VISION = ("encoder", "compressor", "projector")


@dataclass
class PreparedText:
    """What a stage of text needs beside weights, checked; see `hico.train.plan.Prepared`."""

    recipe: Recipe
    config: PreTrainedConfig
    """Of the LLM, or of the whole model that holds it."""
    processor: Any
    """Tokenizer of the LLM, or processor of the whole model."""
    mixture: TextCorpus
    store: TokenStore
    sequences: PackedText

    def sampler(self, *, rank: int = 0, world_size: int = 1) -> BatchSampler:
        """Return the training batches of a device."""
        rows = np.arange(len(self.sequences))
        return BatchSampler(
            BatchRule(self.recipe.rows_per_device),
            rows,
            lengths=np.full_like(rows, self.recipe.max_length),
            modality=np.zeros_like(rows),
            seed=self.recipe.seed,
            rank=rank,
            world_size=world_size,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: what the recipe asks for, or else the dtype of the starting checkpoint."""
        dtype = self.recipe.dtype or self.config.dtype or torch.float32
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def steps(self, world_size: int) -> tuple[int, int]:
        """Return the optimizer steps of an epoch, and of the stage; see `hico.train.plan.Prepared.steps`."""
        accumulation = self.recipe.gradient_accumulation(world_size)
        per_epoch = max(1, -(-len(self.sampler(world_size=self.recipe.num_groups(world_size))) // accumulation))
        arguments = self.recipe.arguments
        if arguments.get("max_steps", -1) > 0:
            return per_epoch, arguments["max_steps"]
        return per_epoch, int(np.ceil(per_epoch * arguments.get("num_train_epochs", 3)))


def prepare_text(recipe: Recipe, *, start: PreTrainedConfig | None = None) -> PreparedText:
    """Read and check everything but the values of the weights; tokenizes documents that no run tokenized before.

    Args:
        recipe: of the stage.
        start: configuration that stages before this one will have made, if they have not run yet.

    Raises:
        ValueError, FileNotFoundError: for what is wrong with recipe, data or checkpoint.
    """
    config, processor = load_text_config(recipe, start)
    llm = config.get_text_config()
    tokenizer = getattr(processor, "tokenizer", processor)
    corpus = TextCorpus(recipe.data, seed=recipe.seed, sampling_strategy=recipe.sampling_strategy)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    store = tokenize(corpus, tokenizer, num_workers=workers, on_bad_sample=recipe.on_bad_sample)
    if store.max_id >= llm.vocab_size:
        raise ValueError(
            f"the tokenizer makes the id {store.max_id} of the text, and the LLM has {llm.vocab_size} embeddings; "
            "give the tokenizer that belongs to it"
        )
    rule = PackRule(recipe.max_length, recipe.long_documents, recipe.long_share, recipe.across_documents)
    corpus.packing = {**asdict(rule), "tokenizer": tokenizer_identity(tokenizer)}
    sequences = PackedText(store, rule, separator=tokenizer.eos_token_id, seed=recipe.seed)
    return PreparedText(recipe, config, processor, corpus, store, sequences)


def load_text_config(
    recipe: Recipe, start: PreTrainedConfig | None = None
) -> tuple[PreTrainedConfig, HicoProcessor | PreTrainedTokenizerBase]:
    """Read the configuration of an LLM and its tokenizer, or of a whole model and its processor; see `prepare_text`.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be read, or its positions do not allow what the recipe asks for.
    """
    folder = Path(recipe.model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"stage {recipe.name!r} starts from {folder}, which does not exist or holds no config.json; finish the "
            "stage before, or name another checkpoint with --model"
        )
    source = Source.at(folder)
    if source.kind == HICO or source.is_published:
        from hico.configuration_hico import HicoConfig

        config = HicoConfig.from_dict((start or HicoConfig.from_pretrained(folder)).to_dict())
        config.text_config = extend_positions(config.text_config, recipe.rope_parameters, length=recipe.max_length)
        return config, HicoProcessor.from_pretrained(folder)
    if source.kind != LLM or source.config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"stage {recipe.name!r} starts from {folder}, which holds {source.config.get('model_type')!r}; give the "
            "folder of a causal LM that transformers knows, or of a model of hico"
        )
    tokenizer = load_llm_tokenizer(str(folder))
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer; save the LLM's there with tokenizer.save_pretrained")
    config = extend_positions(llm_config(source.config), recipe.rope_parameters, length=recipe.max_length)
    config.architectures = source.config.get("architectures")
    return config, tokenizer


def load_lm(folder: str | Path, **options: Any) -> nn.Module:
    """Load a causal LM of transformers in float32, all of it.

    Raises:
        ValueError: if weights are missing, left over or of other sizes.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
    )
    faults = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in faults.items() if keys)
        raise ValueError(f"{folder}: these are not the weights of this {type(model).__name__} ({found})")
    save_under_own_names(model)
    keep_rotary_in_float32(model)
    check_halves(model)
    return model


class TextTrainer(StageTrainer):
    """Train an LLM on packed documents.

    Args:
        model: a causal LM of transformers, or `HicoForConditionalGeneration`, of which the LLM alone learns.
        args: training arguments.
        sequences, sampler: packed documents, and this device's batches of them.
        processor: saved beside the model.
        share: processes that share every row.
        options: of `StageTrainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        sequences: PackedText,
        sampler: BatchSampler,
        processor: Any,
        share: int = 1,
        **options: Any,
    ):
        self.sampler, self._share = sampler, share
        self._whole = sees(model)
        if self._whole:
            freeze(model, ["llm"])
        self._tokens, self._since, self._cast = 0.0, time.perf_counter(), None
        self._use_cache = getattr(model.config.get_text_config(), "use_cache", True)
        collate = partial(collate_text, length=sequences.rule.length, separator=sequences.separator)
        super().__init__(
            model, args, data_collator=collate, train_dataset=sequences, processing_class=processor, **options
        )

    def get_train_dataloader(self) -> EpochLoader:
        """Return the loader of this device; accelerate neither shards nor shuffles it again."""
        args = self.args
        return EpochLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=outlive_sigterm,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss, and count the tokens."""
        if self._whole:
            rest(modules_of(self.model, VISION))
        self._tokens += inputs["input_ids"].numel() / self._share
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def floating_point_ops(self, inputs) -> float:
        """Say nothing: transformers would count embeddings and no attention."""
        return 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report tokens per second and memory beside the loss."""
        if "loss" in logs:
            now = time.perf_counter()
            tokens = self.sum_over_devices(torch.tensor(self._tokens, dtype=torch.float64)).item()
            logs["tokens_per_second"] = tokens / (now - self._since)
            logs["peak_memory_gib"] = peak_memory()
            self._tokens, self._since = 0, now
        super().log(logs, start_time)

    def save_result(self, folder: Path) -> None:
        """Write the trained model in the dtype that is asked for, with its tokenizer or processor."""
        self._cast = self.dtype
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.model.to(self.dtype)
        self.save_model(str(folder))
        if self.args.should_save:
            for part in _configs(self.model):
                part.dtype, part.use_cache = self.dtype, self._use_cache  # transformers switches that off to train
            self.model.config.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if state_dict and self._cast:
            state_dict = {name: tensor.to(self._cast) for name, tensor in state_dict.items()}
        super()._save(output_dir, state_dict)


def _configs(model: nn.Module) -> tuple[PreTrainedConfig, ...]:
    return model.config, model.config.get_text_config()


def make_text_trainer(recipe: Recipe, args: Any, prepared: PreparedText, **common: Any) -> TextTrainer:
    """Load the model and put the trainer together."""
    options = {"config": prepared.config, "attn_implementation": recipe.attn_implementation}
    load = load_lm if isinstance(prepared.processor, PreTrainedTokenizerBase) else load_model
    model = load(recipe.model, **options)
    save_memory(with_text_loss(model), recipe)
    llm = prepared.config.get_text_config()
    mesh = make_mesh(
        recipe.sequence_parallel,
        num_key_value_heads=getattr(llm, "num_key_value_heads", llm.num_attention_heads),
        ulysses=recipe.ulysses_size,
        device_type=args.device.type,
    )
    if mesh.size > 1:
        spread(decoder_of(model), mesh)
    place = {"rank": mesh.data_rank, "world_size": mesh.data_size}
    trainer = TextTrainer(
        model,
        args,
        sequences=prepared.sequences,
        sampler=prepared.sampler(**place),
        share=mesh.size,
        processor=prepared.processor,
        **common,
    )
    if recipe.offload_activations:
        trainer.add_callback(OffloadActivations())
    return trainer
