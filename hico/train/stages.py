"""The stages of short-to-long training. A recipe extends one of them; adding a stage is one entry here.

Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, training strategy and its table of hyperparameters.
"""

from typing import Any

_COMMON: dict[str, Any] = {
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1 it is a share of all steps
    "weight_decay": 0.0,
    "bf16": True,
    "gradient_checkpointing": True,
}
_EVERYTHING = ["encoder", "compressor", "projector", "llm"]

STAGES: dict[str, dict[str, Any]] = {
    "align": {
        **_COMMON,
        "trainable": ["compressor", "projector"],
        "learning_rate": 1e-3,
        "frame_sampling": "middle",
        "min_frames": 4,
        "max_frames": 4,
        "image_size": 224,
        "global_batch_size": 512,
        "per_device_train_batch_size": 8,
        "max_length": 8192,
    },
    "pretrain": {
        **_COMMON,
        "trainable": _EVERYTHING,
        "learning_rate": 1e-5,
        "part_learning_rates": {"encoder": 2e-6},
        "frame_sampling": "dynamic_fps1",
        "min_frames": 4,
        "max_frames": 8,
        "image_size": 224,
        "global_batch_size": 256,
        "per_device_train_batch_size": 4,
        "max_length": 32768,
    },
    "instruct": {
        **_COMMON,
        "trainable": _EVERYTHING,
        "learning_rate": 1e-5,
        "part_learning_rates": {"encoder": 2e-6},
        "frame_sampling": "dynamic_fps1",
        "min_frames": 64,
        "max_frames": 512,
        "image_size": 224,
        "global_batch_size": 256,
        "per_device_train_batch_size": 1,
        "max_length": 32768,
    },
    "highres": {
        **_COMMON,
        "trainable": ["encoder", "compressor", "projector"],
        "learning_rate": 1e-5,
        "part_learning_rates": {"encoder": 2e-6},
        "frame_sampling": "dynamic_fps1",
        "min_frames": 64,
        "max_frames": 512,
        "image_size": 448,
        "sampling_strategy": "random:25%",
        "global_batch_size": 256,
        "per_device_train_batch_size": 1,
        "max_length": 32768,
    },
}
"""Stage name -> recipe keys: align the connector, short-video pre-training, joint short and long instruction tuning,
high-resolution post-finetuning."""
