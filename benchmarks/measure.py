"""Time and memory of two ways of computing the same thing, measured in one process."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start and stop otherwise


def seconds_of(functions: dict[str, Callable], *, device: str, repeats: int) -> dict[str, float]:
    """Return the best time of each function; they take turns, so that a busy machine hurts them alike."""
    best = dict.fromkeys(functions, float("inf"))
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if repeat:  # the first turn warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_megabytes(function: Callable, *, device: str) -> float:
    """Return how much torch allocates for a call at its highest, beyond what was there before."""
    if device == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    held = peak = 0
    events = (event for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def resident_megabytes() -> float:
    """Return the memory that this process holds now, and start to watch its peak anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_resident_megabytes() -> float:
    """Return the most memory that this process held since `resident_megabytes`, or since it began."""
    return _status("VmHWM")


def _status(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024 / 1e6


def saved_megabytes(module: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Return the size of what autograd keeps of a forward pass for the backward pass, beside the parameters."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)
    del output
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return sum(size for address, size in storages.items() if address not in parameters) / 1e6


def synchronize(device: str) -> None:
    """Wait for the device to finish."""
    if device == "cuda":
        torch.cuda.synchronize()
