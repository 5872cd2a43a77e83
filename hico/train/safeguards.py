"""What keeps a long run honest: bad rows counted, and signals obeyed."""

import json
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from hico.data.dataset import BadRow
from hico.data.decoding import SampleError

logger = logging.getLogger(__name__)


class BadRows:
    """Rows left out so far: logged once each, listed in a file, and too many of them stop the run.

    Args:
        output_dir: where the list ``bad_rows-<rank>.jsonl`` goes.
        rank: of this device.
        limit: share of the rows asked for; it is held against 100 rows at least.
    """

    def __init__(self, output_dir: Path, rank: int, limit: float):
        self.path, self.limit = output_dir / f"bad_rows-{rank}.jsonl", limit
        self.num_rows = 0
        self._listed: list[dict[str, str]] = []

    def count(self, num_rows: int, left_out: Sequence[BadRow]) -> None:
        """Count rows that were asked for, and those of them that were left out.

        Raises:
            SampleError: if these are too many.
        """
        self.num_rows += num_rows
        if not left_out:
            return
        known = {entry["where"] for entry in self._listed}
        for row in left_out:
            if row.where not in known:
                logger.warning("left out the row at %s: %s", row.where, row.reason)
        entries = [{"where": row.where, "reason": row.reason} for row in left_out]
        self._listed += entries
        self._write(entries, "a")
        count, last = len(self._listed), left_out[-1]
        if count > self.limit * max(self.num_rows, 100):
            raise SampleError(
                f"{count} of {self.num_rows} rows could not be read, more than max_bad_fraction {self.limit:g}; they "
                f"are listed with their reasons in {self.path}. The last: {last.where}: {last.reason}"
            )

    def save(self, folder: Path) -> None:
        """Write the counts beside a checkpoint."""
        (folder / f"{self.path.stem}.json").write_text(json.dumps({"num_rows": self.num_rows, "rows": self._listed}))

    def load(self, folder: Path | None) -> None:
        """Go back to the counts of a checkpoint, or to none: what was left out since comes again."""
        path = folder and folder / f"{self.path.stem}.json"
        state = json.loads(path.read_text()) if path and path.is_file() else {"num_rows": 0, "rows": []}
        self.num_rows, self._listed = state["num_rows"], state["rows"]
        if self._listed or self.path.is_file():
            self._write(self._listed, "w")

    def _write(self, entries: list[dict[str, str]], mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(mode) as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, finish the step, save a checkpoint and stop.

    What is logged and evaluated at the end of an epoch belongs to the epoch's last checkpoint, which is written after
    it, and is left out where an epoch is only interrupted: the run that goes on does it.
    """

    def __init__(self):
        self.received = self.is_stopping = False
        self._ends_epoch = self._save_is_due = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the signal inside the block."""
        previous = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._ends_epoch = self._save_is_due = False

    def on_step_end(self, args, state, control, **kwargs):
        self.is_stopping = self.agree(args)
        if self.is_stopping:
            logger.warning("SIGTERM received: saving a checkpoint at step %d, then stopping", state.global_step)
            control.should_save = control.should_training_stop = True
        self._ends_epoch = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        self._save_is_due = self._ends_epoch and control.should_save
        control.should_save &= not self._save_is_due

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self._save_is_due
        if not self._ends_epoch:
            control.should_log = control.should_evaluate = control.should_save = False

    def agree(self, args: TrainingArguments) -> bool:
        """Say whether any device received the signal; all of them ask together, and know it from then on."""
        self.received = _on_any_device(self.received, args)
        return self.received

    def _note(self, number, frame):
        self.received = True


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
