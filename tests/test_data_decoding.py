import ctypes
import os
import pickle
import signal
import time

import numpy as np
import pytest

from hico.data.decoding import SampleError, TimedReader


def read(what):
    if what == "stuck":
        # Blocks outside the interpreter, as a decoder does: no Python signal handler could run.
        ctypes.CDLL(None).sleep(60)
    if what == "crash":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "broken":
        raise OSError("no header")
    if what == "pid":
        return os.getpid()
    return np.full(what, 7, dtype=np.uint8)


@pytest.fixture
def reader():
    made = TimedReader(read, 0.5)
    yield made
    made.close()


def test_results_come_back_whole(reader):
    assert (reader(5_000_000) == read(5_000_000)).all()


def test_the_child_is_another_process_and_stays(reader):
    assert os.getpid() != reader("pid") == reader("pid")


def test_a_stuck_decoder_is_killed_on_time_and_replaced(reader):
    child, start = reader("pid"), time.monotonic()
    with pytest.raises(SampleError, match=r"longer than 0\.5 s and was killed"):
        reader("stuck")
    assert time.monotonic() - start < 5
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert reader(3).tolist() == [7, 7, 7]


def test_a_signal_to_the_group_does_not_end_the_child(reader):
    child = reader("pid")
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGINT)
    assert reader("pid") == child


def test_a_crash_is_an_error_of_that_row_alone(reader):
    with pytest.raises(SampleError, match=r"the decoder crashed \(SIGSEGV\)"):
        reader("crash")
    assert reader(2).tolist() == [7, 7]


@pytest.mark.parametrize("timeout", [0.5, None])
def test_errors_carry_their_reason(timeout):
    reader = TimedReader(read, timeout)
    with pytest.raises(SampleError, match="OSError: no header"):
        reader("broken")
    assert reader(1).tolist() == [7]


def test_a_copy_has_a_child_of_its_own(reader):
    child = reader("pid")
    copy = pickle.loads(pickle.dumps(reader))
    assert copy("pid") not in (child, os.getpid())
    copy.close()


def test_a_fast_row_after_a_slow_one_has_its_own_time(reader):
    for _ in range(4):
        time.sleep(0.2)
        assert reader(1).tolist() == [7]
