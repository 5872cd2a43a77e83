"""Which processes share a sequence, and how: heads among neighbours, keys around a ring."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class SequenceMesh:
    """The place of this process in a mesh (data, ring, ulysses), neighbours in the last dimension.

    Args:
        rank: of this process among those that share its rows, ``0 <= rank < size``.
        ring_size: parts that the sequence has in attention; their keys and values go around a ring.
        ulysses_size: parts that the heads have in attention; sequences are exchanged for heads around it.
        data_rank, data_size: which rows this process works on, and into how many parts all rows are divided.
        group: the processes that share rows; None where there is but one.
        ring_group, ulysses_group: the parts of it that this process belongs to.
    """

    rank: int = 0
    ring_size: int = 1
    ulysses_size: int = 1
    data_rank: int = 0
    data_size: int = 1
    group: ProcessGroup | None = None
    ring_group: ProcessGroup | None = None
    ulysses_group: ProcessGroup | None = None

    def __deepcopy__(self, memo: dict) -> SequenceMesh:
        return self  # a copy of a model works in the same processes

    @property
    def size(self) -> int:
        """How many processes share a sequence."""
        return self.ring_size * self.ulysses_size

    @property
    def ring_rank(self) -> int:
        """The place of this process in its ring."""
        return self.rank // self.ulysses_size


def split_size(size: int, num_key_value_heads: int, ulysses: int | None = None) -> tuple[int, int]:
    """Divide the processes of a sequence among ring and Ulysses.

    Args:
        size: processes that share a sequence.
        num_key_value_heads: of the decoder; Ulysses divides them.
        ulysses: how many processes share the heads; as many as can if omitted.

    Returns:
        Ring and Ulysses size.

    Raises:
        ValueError: if Ulysses cannot be of that size, naming those that it can.
    """
    most = math.gcd(size, num_key_value_heads)
    ulysses = most if ulysses is None else ulysses
    if ulysses < 1 or most % ulysses:
        sizes = ", ".join(str(number) for number in range(1, most + 1) if most % number == 0)
        raise ValueError(
            f"Ulysses over {ulysses} of {size} processes cannot divide {num_key_value_heads} key-value heads; "
            f"sizes that work are {sizes}, and the ring takes the rest"
        )
    return size // ulysses, ulysses


def data_parts(size: int, num_processes: int) -> int:
    """Say into how many parts rows are divided where ``size`` processes share a sequence.

    Raises:
        ValueError: if the processes cannot be grouped so.
    """
    if size < 1 or num_processes % size:
        raise ValueError(
            f"sequence_parallel {size} does not divide the {num_processes} process(es) there are; use a divisor of "
            f"{num_processes}, or start a multiple of {size}"
        )
    return num_processes // size


def make_mesh(
    size: int, *, num_key_value_heads: int, ulysses: int | None = None, device_type: str = "cpu"
) -> SequenceMesh:
    """Group all processes; every one of them must call this.

    Args:
        size: processes that share a sequence, neighbours in rank.
        num_key_value_heads: of the decoder.
        ulysses: see `split_size`.
        device_type: of the tensors that will be exchanged.

    Raises:
        ValueError: if ``size`` does not divide the number of processes, or ``ulysses`` not the heads.
    """
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    parts = data_parts(size, num_processes)
    ring_size, ulysses_size = split_size(size, num_key_value_heads, ulysses)
    if size == 1:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return SequenceMesh(data_rank=rank, data_size=parts)
    whole = init_device_mesh(device_type, (parts, size), mesh_dim_names=("data", "sequence"))
    split = init_device_mesh(device_type, (parts, ring_size, ulysses_size), mesh_dim_names=("data", "ring", "ulysses"))
    return SequenceMesh(
        rank=whole.get_local_rank("sequence"),
        ring_size=ring_size,
        ulysses_size=ulysses_size,
        data_rank=whole.get_local_rank("data"),
        data_size=parts,
        group=whole.get_group("sequence"),
        ring_group=split.get_group("ring"),
        ulysses_group=split.get_group("ulysses"),
    )
