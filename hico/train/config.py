"""A recipe: what a stage trains, on what, and how."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from hico.data.fields import check_keys, check_types
from hico.data.settings import RowSettings
from hico.parallel import data_parts
from hico.registry import import_plugins
from hico.train.keys import check_memory, check_text

Part = Literal["encoder", "compressor", "projector", "llm"]
"""What can be trained, frozen, or given a learning rate of its own."""
PARTS = get_args(Part)
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """How ``objective: preference`` compares two answers."""

    beta: float = 0.1
    """How dearly the distance from the starting model is paid for, above 0."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be the wrong way round, in [0, 0.5)."""
    loss_type: Literal["sigmoid"] = "sigmoid"
    """Loss of a margin: ``sigmoid``, that of DPO."""

    @classmethod
    def of(cls, settings: dict[str, Any] | None) -> "PreferenceSettings":
        """Return what a recipe says, or what holds without a word.

        Raises:
            ValueError: if a setting is unknown, of another type, or out of its range.
        """
        settings = settings or {}
        check_keys(settings, [known.name for known in fields(cls)], what="preference")
        check_types(settings, cls)
        made = cls(**settings)
        if made.beta <= 0 or not 0 <= made.label_smoothing < 0.5:
            raise ValueError(
                f"preference has beta {made.beta} and label_smoothing {made.label_smoothing}; use a beta above 0, and "
                "a share below 0.5, from which on the rejected answers would win"
            )
        return made


@dataclass(kw_only=True)
class Recipe(RowSettings):
    """One stage of training.

    Every other key of a recipe file is a field of `transformers.TrainingArguments` and is kept in ``arguments``.
    """

    name: str
    """How the stage is called in logs and folders."""
    model: str
    """Folder of the checkpoint to start from; in a chain only the first stage needs one."""
    output_dir: str
    """Where checkpoints and logs go; the result is its subfolder ``final``."""
    data: str | list
    """Mixture file, or the list of its datasets."""
    eval_data: str | list | None = None
    """Mixture held out for evaluation."""
    eval_fraction: float = 0.0
    """Share of the training rows to hold out instead, in [0, 1)."""
    sampling_strategy: str = "all"
    """Rows to take of every dataset, after the dataset's own strategy."""
    objective: Literal["answers", "preference", "text", "tracks"] = "answers"
    """What is learned: ``answers``; ``preference``, which of two answers is the better one; ``text``, the next token
    of packed documents, by the LLM alone; or ``tracks``, the encoder alone on what moves, see `hico.tiny.tracks`."""
    preference: dict | None = None
    """How answers are compared: keywords of `PreferenceSettings`."""
    trainable: list[Part] = field(default_factory=lambda: list(PARTS))
    """Parts that learn; the others are frozen."""
    part_learning_rates: dict[Part, float] = field(default_factory=dict)
    """Part -> learning rate, where it differs from ``learning_rate``."""
    image_size: int | None = None
    """Pixels per side that the encoder sees; the checkpoint's if omitted."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """Further changes to the checkpoint's configuration, nested as there."""
    attn_implementation: str | None = None
    """Attention of the LLM, as transformers names it (``sdpa``, ``flash_attention_2``); its default if omitted."""
    sequence_parallel: int = 1
    """Processes that share every row: each has a part of it, and encodes a part of its frames."""
    ulysses_size: int | None = None
    """Processes of these that divide the heads; as many as the key-value heads allow if omitted. The ring takes the
    rest."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all devices; sets the gradient accumulation."""
    group_by_length: bool = False
    """Put rows of one modality and similar length into a batch."""
    max_tokens_per_batch: int | None = None
    """Token budget of a batch on one device, instead of ``per_device_train_batch_size`` rows."""
    packing: bool = False
    """Concatenate the rows of a batch into one sequence, without attention across them."""
    max_bad_fraction: float = 0.01
    """Share of skipped rows that stops the run."""
    check_files: bool = True
    """Look for every file of the mixture before the first step."""
    drop_schedule: str | list | dict | None = None
    """Progressive visual dropout in the LLM (``uniform@4:0.75,attention@18:0.25``); the checkpoint's if omitted."""
    rope_parameters: dict[str, Any] | None = None
    """Of ``text``: rotary positions of the LLM, as in transformers' configurations (``{rope_theta: 1.0e9}``)."""
    long_documents: int = 4096
    """Of ``text``: tokens from which on a document is a long one."""
    long_share: float | None = None
    """Of ``text``: share of every domain's tokens that its long documents give; what they are if omitted."""
    across_documents: bool = True
    """Of ``text``: whether a token sees the documents that were packed before its own."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at once in training; 2,048 if omitted."""
    mlp_chunk: int | None = None
    """Tokens that an MLP of the LLM works on at once; all if omitted."""
    offload_activations: bool = False
    """Keep what gradient checkpointing saves in host memory until the backward pass."""
    lora: dict | None = None
    """Adapters on the LLM: keywords of `peft.LoraConfig`."""
    quantization: dict | None = None
    """How the LLM under adapters is loaded: keywords of `transformers.BitsAndBytesConfig`."""
    frozen_dtype: Dtype | None = None
    """Dtype of the parts that do not learn, such as ``bfloat16``; float32 if omitted."""
    dtype: Dtype | None = None
    """Dtype of the result; the starting checkpoint's if omitted. What learns is float32 until then."""
    plugins: list[str] = field(default_factory=list)
    """Modules of your own to import first, which register encoders, compressors or drop policies."""
    peak_tflops: float | None = None
    """Dense bf16 peak of one device, for the model FLOPs utilisation; known GPUs need none."""
    arguments: dict = field(default_factory=dict)
    """Keywords of `transformers.TrainingArguments`."""

    def __post_init__(self):
        import_plugins(self.plugins)
        PreferenceSettings.of(self.preference)
        frozen = sorted(set(self.part_learning_rates) - set(self.trainable))
        low, high, budget = self.min_frames, self.max_frames, self.max_tokens_per_batch
        is_pairs = self.objective == "preference"
        is_tracks, has_adapters = self.objective == "tracks", self.lora is not None
        for is_wrong, message in (
            (is_tracks and self.trainable != ["encoder"], "objective tracks trains the encoder alone; set trainable"),
            (is_tracks and self.evaluates, "objective tracks evaluates nothing; leave out eval_data, eval_fraction"),
            *check_text(self),
            *check_memory(self),
            (
                is_tracks and self.sequence_parallel > 1,
                "objective tracks has no sequence; leave out sequence_parallel",
            ),
            (self.preference is not None and not is_pairs, "preference is for objective: preference; set that too"),
            (is_pairs and self.packing, "packing cannot be combined with objective preference, which compares rows"),
            (
                is_pairs and self.label_scheme != "assistant",
                f"objective preference compares answers alone; label_scheme {self.label_scheme} learns more of a row",
            ),
            (frozen, f"part_learning_rates names {frozen}, which `trainable` freezes"),
            (has_adapters and "llm" in self.trainable, "lora trains adapters; take 'llm' out of `trainable`"),
            (self.quantization and not has_adapters, "quantization is for an LLM that only adapters change; set lora"),
            (not 1 <= low <= high, f"min_frames {low} and max_frames {high} contradict each other"),
            (self.eval_fraction and self.eval_data, "eval_fraction and eval_data exclude each other; give one"),
            (self.packing and not budget, "packing fills sequences up to a token budget; set max_tokens_per_batch"),
            (
                budget and budget < self.max_length * (1 + is_pairs),
                f"max_tokens_per_batch {budget} is below max_length" + " of two answers" * is_pairs,
            ),
            (
                budget and self.global_batch_size,
                "global_batch_size counts rows, max_tokens_per_batch varies them; set global_batch_size: null",
            ),
        ):
            if is_wrong:
                raise ValueError(message)

    def num_groups(self, world_size: int) -> int:
        """Return into how many parts ``world_size`` devices divide the rows: those that share rows are one.

        Raises:
            ValueError: if ``sequence_parallel`` does not divide them.
        """
        return data_parts(self.sequence_parallel, world_size)

    def gradient_accumulation(self, world_size: int) -> int:
        """Return the micro-batches per optimizer step on ``world_size`` devices.

        Raises:
            ValueError: if the global batch does not divide, or ``sequence_parallel`` not the devices.
        """
        groups = self.num_groups(world_size)
        asked = self.arguments.get("gradient_accumulation_steps")
        if self.global_batch_size is None:
            return asked or 1
        per_step = self.rows_per_device * groups
        steps, rest = divmod(self.global_batch_size, per_step)
        if rest or not steps or (asked is not None and asked != steps):
            what = "devices" if groups == world_size else f"groups of {self.sequence_parallel} devices"
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not per_device_train_batch_size "
                f"{self.rows_per_device} x {groups} {what} x gradient_accumulation_steps {asked or 'n'}; "
                "change one of them (global_batch_size: null leaves the product to the others)"
            )
        return steps

    def trainer_settings(self) -> dict[str, Any]:
        """Return the keywords of `transformers.TrainingArguments`, with our defaults where they differ.

        They show something in a run of any length: a hundred logs, and an evaluation after every epoch, or ten where
        there is but one. What is to be loaded as the best at the end is saved whenever it is evaluated.
        """
        settings = {"logging_steps": 0.01, **self.arguments}
        if self.evaluates:
            best = settings.get("load_best_model_at_end", False)
            saved = settings.get("save_strategy") if best else None
            several = settings.get("num_train_epochs", 3) > 1 and settings.get("max_steps", -1) < 1
            strategy = "epoch" if several and "eval_steps" not in settings else "steps"
            settings.setdefault("eval_strategy", saved if saved in ("steps", "epoch") else strategy)
            settings.setdefault("eval_steps", settings.get("save_steps", 0.1) if best else 0.1)
            if best:
                settings.setdefault("save_strategy", settings["eval_strategy"])
                settings.setdefault("save_steps", settings["eval_steps"])
        return settings

    @property
    def evaluates(self) -> bool:
        """Whether rows are held out."""
        return self.eval_data is not None or self.eval_fraction > 0

    @property
    def seed(self) -> int:
        """Of the order of rows, and of all chance."""
        return self.arguments.get("seed", 42)

    @property
    def rows_per_device(self) -> int:
        """Rows of a micro-batch on one device."""
        return self.arguments.get("per_device_train_batch_size", 8)
