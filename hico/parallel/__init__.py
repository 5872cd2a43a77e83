"""Sequence parallelism: several processes share the rows of a batch, each with a part of every row.

`make_mesh` groups processes, `patch` spreads a decoder's rows over a group, and a `Layout` says what lies where. To
everything outside, a group is as many devices that were given the same rows: the mean of their gradients is right.
"""

from hico.parallel.exchange import all_gather
from hico.parallel.layout import Layout
from hico.parallel.mesh import SequenceMesh, data_parts, make_mesh, split_size
from hico.parallel.patch import SequenceHandle, check_config, patch

__all__ = [
    "Layout",
    "SequenceHandle",
    "SequenceMesh",
    "all_gather",
    "check_config",
    "data_parts",
    "make_mesh",
    "patch",
    "split_size",
]
