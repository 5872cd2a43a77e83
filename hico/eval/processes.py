"""Several processes that measure one model together, each with a part of every row."""

import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel


class Processes:
    """The processes that torchrun started, all of which share every row.

    Args:
        size: how many there should be.

    Raises:
        ValueError: if there are others.
    """

    def __init__(self, size: int = 1):
        there = int(os.environ.get("WORLD_SIZE", "1"))
        if size != there:
            raise ValueError(
                f"--sequence-parallel is {size}, but there are {there} process(es); start as many as are to share "
                "a row, and say so: torchrun --nproc_per_node 2 -m hico.cli niah text --sequence-parallel 2 ..."
            )
        self.size = size
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    @property
    def is_first(self) -> bool:
        """Whether this one writes what is found."""
        return self.size == 1 or dist.get_rank() == 0

    @property
    def device(self) -> str | None:
        """The device of this process, where each has its own."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and torch.cuda.is_available() else None

    def agree(self, value: Any) -> Any:
        """Return what the first process holds."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def sharing_rows(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Let every process work on a part of every row, for the time of a ``with`` block."""
        return self._spread(model) if self.size > 1 else nullcontext()

    @contextmanager
    def _spread(self, model: PreTrainedModel):
        from hico.parallel import make_mesh, patch

        llm = model.config.get_text_config()
        heads = getattr(llm, "num_key_value_heads", llm.num_attention_heads)
        handle = patch(model, make_mesh(self.size, num_key_value_heads=heads, device_type=model.device.type))
        try:
            yield
        finally:
            handle.remove()
