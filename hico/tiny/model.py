"""The model that learns the tiny world: stock Qwen2, UMT encoder and token merging, with 250,000 weights."""

import re
from pathlib import Path

import torch

from hico.configuration_hico import HicoConfig
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor
from hico.prompt import DEFAULT_SYSTEM_MESSAGE, IMAGE_TOKEN, VIDEO_TOKEN, time_message
from hico.tiny.corpus import LONG_SCENES
from hico.tiny.scenes import SCENE_SECONDS
from hico.tiny.stories import all_words
from hico.tokenizer import word_tokenizer

WIDTH = 64


def write_untrained(folder: str | Path, *, seed: int = 0) -> Path:
    """Write an untrained model with its processor, for the first stage to start from.

    Args:
        folder: to be made.
        seed: of the weights.

    Returns:
        The folder.
    """
    times = [time_message(style, duration=1, seconds=[1]) for style in ("short", "long")]
    around = " ".join([DEFAULT_SYSTEM_MESSAGE, *times, "system user assistant"])
    tokenizer = word_tokenizer({*all_words(), *re.findall("[a-z]+", around.lower()), *"0123456789.,:;?!\n"})
    config = HicoConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # The default of 0.02 suits widths of thousands: here signals would vanish and learning start late.
            "initializer_range": 0.07,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        encoder={
            "name": "umt",
            "image_size": 48,
            "patch_size": 12,
            "trained_side": 4,
            "hidden_size": WIDTH,
            "depth": 3,
            "num_heads": 2,
        },
        compressor={"name": "token_merge", "tokens_per_frame": 4, "tokens_per_image": 16},
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HicoForConditionalGeneration(config)
    processor = HicoProcessor.from_config(
        config,
        tokenizer,
        image_tiling="single",
        video={
            "mode": "dynamic_fps1",
            "min_frames": SCENE_SECONDS,
            "max_frames": LONG_SCENES * SCENE_SECONDS,
        },
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
