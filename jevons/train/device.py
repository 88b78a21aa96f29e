"""The device that a run computes on: which, what it is called, what it reaches, and what it held.

Peak memory is the system's own count: of a GPU what torch allocated at most, else what this process had resident at most. Linux starts
that count anew when told to (`forget_peak`); where it does not, a peak is the highest since the process began.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from jevons.kernels import native, processor

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def choose(wanted: str) -> torch.device:
    """"auto" takes a GPU where there is one. ValueError where a GPU was asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' was asked for, but torch sees no GPU; use device='cpu' or 'auto'")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def best_dtype(device: torch.device) -> str:
    """bfloat16, or float32 on a processor that has no products in bf16."""
    return "bfloat16" if device.type == "cuda" or processor.multiplies_bf16() else "float32"


def sampling_dtype(device: torch.device) -> str:
    """For a model that is not trained: bfloat16 also where the native kernels widen it, since half the bytes are read."""
    return "bfloat16" if best_dtype(device) == "bfloat16" or (device.type == "cpu" and native.available()) else "float32"


def describe(device: torch.device) -> str:
    """The name that people know the device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {processor.name()}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPS of a large matrix product on random data: the ceiling that utilisation is quoted against. Takes about a second.

    Where one would take long, as in bf16 on a processor without such products, a smaller one has to do.
    """
    size = 8192 if device.type == "cuda" else 2048
    while size > 256 and 64 * min(_product_seconds(size // 4, device, dtype)) > 1:
        size //= 2
    return 2 * size**3 / statistics.median(_product_seconds(size, device, dtype))


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Of five products of the same two square matrices, after one that warms up."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s of reading a quarter of a gigabyte, more than caches hold: the ceiling of what streams weights. Well under a second."""
    x = torch.ones(2**26, device=device)
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        x.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(seconds[1:])


def peak_memory(device: torch.device) -> int:
    """Bytes held at most since `forget_peak`: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> bool:
    """Count `peak_memory` anew, from what is held now; whether the system does that. What is no longer used goes back to it first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if RESET.exists() and os.access(RESET, os.W_OK):
        gc.collect()  # a model in a cycle is held until Python looks for it
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
        RESET.write_text("5", encoding="utf-8")  # Linux, Documentation/filesystems/proc.rst: resets the peak of resident memory
        return True
    return False


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
