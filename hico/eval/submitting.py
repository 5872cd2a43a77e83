"""Work on many inputs: in turn in this process, or as jobs of other processes and machines."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
CLUSTERS = ("local", "slurm", "debug")
"""Where `submitit` runs jobs: other processes of this machine, a Slurm cluster, this process."""


def in_turn(work: Callable[[T], Any], inputs: Sequence[T]) -> Iterator[tuple[T, Any]]:
    """Yield every input with what comes of it, which is the exception where one is raised."""
    for one in inputs:
        try:
            yield one, work(one)
        except Exception as error:  # whatever it is, it does not stop the rest
            yield one, error


def as_jobs(
    work: Callable[[T], Any], inputs: Sequence[T], *, cluster: str, folder: str | Path, options: dict[str, Any]
) -> Iterator[tuple[T, Any]]:
    """Do as `in_turn` does, in jobs; yields in the order of the inputs.

    Args:
        work: a picklable function.
        inputs: likewise.
        cluster: one of `CLUSTERS`.
        folder: for what jobs are sent and say; all machines must see it.
        options: of submitit's ``update_parameters``, such as ``timeout_min`` and ``slurm_partition``.

    Raises:
        ImportError: if submitit is not installed.
        ValueError: if it does not take the options.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError("jobs are sent by submitit, which is not installed; pip install 'hico[submitit]'") from error
    executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
    try:
        executor.update_parameters(**options)
    except (NameError, TypeError, ValueError) as error:  # submitit raises a NameError at an option it does not know
        raise ValueError(f"submitit does not take the options {options}: {' '.join(str(error).split())}") from error
    jobs = [executor.submit(work, one) for one in inputs]
    results = in_turn(lambda job: job.result(), jobs)
    yield from ((one, result) for one, (_, result) in zip(inputs, results, strict=True))
