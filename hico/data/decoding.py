"""Decoding in a child process, so that no decoder, however stuck, can hold up training."""

import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

import torch

GRACE = 10.0
"""Seconds after the child's own deadline at which it is given up, should even the kernel fail to end it."""


class SampleError(Exception):
    """A row whose media cannot be read, or that does not fit; the message says why."""


class TimedReader:
    """Call a function in a child process that the kernel kills when it takes too long.

    The child sets a timer on itself before every call, so it dies on time even where its parent is gone. A crash of
    the child is an error of that row alone; the next call starts another child.

    Args:
        read: picklable results; called in a process forked from this one.
        timeout: seconds per call; ``None`` calls ``read`` here, without a limit.

    Raises:
        ValueError: if the platform cannot fork.
    """

    def __init__(self, read: Callable[..., Any], timeout: float | None):
        if timeout is not None and not hasattr(os, "fork"):
            raise ValueError("this platform cannot fork, which decode_timeout needs; set decode_timeout: null")
        self._read = read
        self._timeout = timeout
        self._owner = self._child = self._connection = None

    def __call__(self, *request: Any) -> Any:
        """Return ``read(*request)``.

        Raises:
            SampleError: if it raised, crashed, or took too long.
        """
        if self._timeout is None:
            return _outcome(_attempt(self._read, request))
        if self._owner != os.getpid():
            self._start()
        try:
            self._connection.send_bytes(pickle.dumps(request, protocol=5))
            if not self._connection.poll(self._timeout + GRACE):
                self.close()
                raise SampleError(f"decoding did not end within {self._timeout:g} s")
            return _outcome(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, ConnectionError) as error:
            raise SampleError(self._post_mortem()) from error

    def close(self) -> None:
        """End the child; the next call starts another."""
        if self._owner == os.getpid():
            os.kill(self._child, signal.SIGKILL)
            self._connection.close()
            os.waitpid(self._child, os.WNOHANG)
        self._owner = self._child = self._connection = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None, "_child": None, "_connection": None}

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        child = os.fork()
        if child == 0:
            self._connection.close()
            try:
                self._serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._owner, self._child = os.getpid(), child

    def _serve(self, connection) -> None:
        torch.set_num_threads(1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # A signal to the whole group means the parent: it may still finish a step. The end of the pipe means us.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                request = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            signal.setitimer(signal.ITIMER_REAL, self._timeout)
            answer = pickle.dumps(_attempt(self._read, request), protocol=5)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(answer)

    def _post_mortem(self) -> str:
        _, status = os.waitpid(self._child, 0)
        self._connection.close()
        self._owner = self._child = self._connection = None
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGALRM:
            return f"decoding took longer than {self._timeout:g} s and was killed"
        return f"the decoder crashed ({signal.Signals(number).name if number else f'exit {os.WEXITSTATUS(status)}'})"


def _attempt(read: Callable[..., Any], request: tuple) -> tuple[bool, Any]:
    try:
        return True, read(*request)
    except Exception as error:  # a decoder may raise anything; the caller counts it and says so
        return False, f"{type(error).__name__}: {error}"


def _outcome(answer: tuple[bool, Any]) -> Any:
    ok, result = answer
    if not ok:
        raise SampleError(result)
    return result
