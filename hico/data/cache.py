"""What was found out about files, kept by their content, so that every process after the first need not ask again."""

import hashlib
import logging
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

WORTH_KEEPING = 1.0
"""Seconds; what took less to find out is found out again."""


def cached(kind: str, content: Sequence[str], make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return what ``make`` returns, from the cache if it was made before by the same code and took its time.

    The cache lies in ``HICO_CACHE``, or else in ``~/.cache/hico``; without a place to write it, all is made anew.

    Args:
        kind: what is made.
        content: digests of what it is made from.
        make: makes it; in one process at a time, and without asking this cache.
    """
    key = hashlib.sha256("\n".join([kind, _version(), *content]).encode()).hexdigest()
    path = cache_folder() / f"{kind}-{key}.npz"
    with taking_turns(path.parent / f"{path.stem[-2:]}.lock"):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            began = time.perf_counter()
            arrays = make()
        if time.perf_counter() - began < WORTH_KEEPING:
            return arrays
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_name(f"{path.name}.{os.getpid()}")
            with open(whole, "wb") as file:
                np.savez(file, **arrays)
            os.replace(whole, path)
        except OSError as error:
            logger.warning("what was found out about the rows cannot be kept in %s: %s", path.parent, error)
    return arrays


def cache_folder() -> Path:
    """Return the folder of the cache: ``HICO_CACHE``, or else ``~/.cache/hico``."""
    return Path(os.environ.get("HICO_CACHE", "~/.cache/hico")).expanduser()


@contextmanager
def taking_turns(lock: Path) -> Iterator[None]:
    """Let the processes of a run, which all want the same, wait for the first one to make it."""
    with ExitStack() as stack:
        with suppress(OSError, ImportError):  # no place to write, no locks there, or no Unix
            from fcntl import LOCK_EX, flock

            lock.parent.mkdir(parents=True, exist_ok=True)
            flock(stack.enter_context(open(lock, "w")), LOCK_EX)
        yield


def pack_texts(texts: Sequence[str]) -> np.ndarray:
    """Return texts as an array of bytes."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogatepass"), dtype=np.uint8)


def unpack_texts(packed: np.ndarray, count: int) -> list[str]:
    """Return what `pack_texts` was given; ``count`` tells none from one that is empty."""
    return packed.tobytes().decode("utf-8", "surrogatepass").split("\0") if count else []


@cache
def _version() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
