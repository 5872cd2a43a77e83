"""What keeps a long run honest: bad rows counted, signals obeyed, logs that a restart does not change."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from hico.train.dataset import BadRow

logger = logging.getLogger(__name__)


class BadRows:
    """Rows left out so far: logged once each, listed in a file, and too many of them stop the run.

    Args:
        output_dir: where the list ``bad_rows-<rank>.jsonl`` goes.
        rank: of this device.
        limit: share of the rows seen; it is held against 100 rows at least.
    """

    def __init__(self, output_dir: Path, rank: int, limit: float):
        self.path, self.limit = output_dir / f"bad_rows-{rank}.jsonl", limit
        self.num_seen = 0
        self._listed: list[dict[str, Any]] = []

    def resume(self, step: int) -> None:
        """Forget rows that were left out after a checkpoint's step; they come again."""
        if self.path.is_file():
            entries = [json.loads(line) for line in self.path.read_text().splitlines()]
            self._listed = [entry for entry in entries if entry["step"] < step]
            self.num_seen = self._listed[-1]["seen"] if self._listed else 0
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self._listed))

    def add(self, rows: list[BadRow], step: int) -> None:
        """Count rows left out at a step.

        Raises:
            RuntimeError: if they are too many.
        """
        for row in rows:
            if row.where not in {entry["where"] for entry in self._listed}:
                logger.warning("left out the row at %s: %s", row.where, row.reason)
            self.num_seen += 1
            self._listed.append({"step": step, "seen": self.num_seen, "where": row.where, "reason": row.reason})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(self._listed[-1]) + "\n")
        count, seen = len(self._listed), max(self.num_seen, 100)
        if rows and count > self.limit * seen:
            raise RuntimeError(
                f"{count} of {self.num_seen} rows could not be read, more than max_bad_fraction {self.limit:g}; they "
                f"are listed with their reasons in {self.path}. The last: {rows[-1].where}: {rows[-1].reason}"
            )


class StopOnSignal(TrainerCallback):
    """On SIGTERM, finish the step, save a checkpoint and stop."""

    def __init__(self):
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the signal inside the block."""
        previous = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def on_step_end(self, args, state, control, **kwargs):
        if _on_any_device(self.received, args):
            self.received = True
            logger.warning("SIGTERM received: saving a checkpoint at step %d, then stopping", state.global_step)
            control.should_save = control.should_training_stop = True

    def _note(self, number, frame):
        self.received = True


class AlignLogs(TrainerCallback):
    """Report whenever a checkpoint is saved, so that a resumed run averages losses over the same steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save


def _on_any_device(flag: bool, args: TrainingArguments) -> bool:
    if args.world_size == 1:
        return flag
    flags = torch.tensor(int(flag), device=args.device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)


def outlive_sigterm(worker: int) -> None:
    """Let a data worker finish the step that its parent finishes when both get SIGTERM; the second one ends it."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextmanager
def workers_end_with_training() -> Iterator[None]:
    """Where training fails in the block, use up the SIGTERM that its data workers outlive.

    Python sends its children one on exit and then waits for them, so the process would stay for ever.
    """
    others = set(active_children())
    try:
        yield
    except BaseException:
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
