"""Checkpoints of VideoChat-Flash and LongVA into ours and back, tensor by tensor; and what a checkpoint is.

Loading a published checkpoint needs no conversion: ``from_pretrained`` reads it as it is, see `hico.published`.
"""

from hico.convert.checkpoint import convert
from hico.convert.inspection import Inspection, inspect_checkpoint
from hico.convert.report import Report

__all__ = ["Inspection", "Report", "convert", "inspect_checkpoint"]
