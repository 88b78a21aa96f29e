"""The compiled part of the kernels: native/*.cpp, built at first use and loaded with ctypes.

Problem: a wheel for every processor is a burden, and torch's own extension builder takes a minute. Approach: plain C
functions, no torch headers, one compiler call of a few seconds, cached under $XDG_CACHE_HOME/jevons/native (~/.cache) by the
hash of sources, flags, compiler and processor. A file appears there by renaming, so processes that build at once do not
meet. Where compiler or processor will not do, `load` says why and callers use torch. Not done: processors without AVX-512.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
KINDS = {"p": c_void_p, "l": c_long, "i": c_int, "f": c_float}
PROTOTYPES = {  # what each function takes: p pointer, l long, i int, f float
    "encode": "iipiipi",
    "linear": "ppillpfpilpli",
    "mlp": "pppillpfppi",
    "moe": "pppillppippi",
    "rms_norm": "pillipfpi",
    "gqa_project": "ppillpfpiippfpppppi",
    "mla_project": "pppillpfppfppiiiiippppi",
    "causal": "plplpliiiiiipifpi",
    "paged_gqa": "plppiliiiiplpifpi",
    "paged_mla": "plpiliiiplpippfpi",
}


class Loaded(NamedTuple):
    """The library's functions, or None and the reason."""

    functions: Any
    reason: str


@functools.cache
def load() -> Loaded:
    """Build if need be, load, declare the functions. A failing compiler is warned about, once."""
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return Loaded(None, "native kernels need Linux on x86-64")
    flags = next((line.split(":", 1)[1].split() for line in cpu.splitlines() if line.startswith("flags")), [])
    if missing := [flag for flag in NEEDED if flag not in flags]:
        return Loaded(None, f"native kernels need a processor with {', '.join(missing)}")
    compiler = next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None)
    if compiler is None:
        return Loaded(None, "native kernels need a C++ compiler: c++, g++ or clang++ on the PATH, or $CXX")
    try:
        library = ctypes.CDLL(str(build(compiler, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        output = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = f"native kernels could not be compiled with {compiler}: {output.strip()[-2000:]}"
        warnings.warn(f"{reason}\nSlower torch products are used.", stacklevel=2)
        return Loaded(None, reason)
    for name, prototype in PROTOTYPES.items():
        function = getattr(library, f"jevons_{name}")
        function.argtypes, function.restype = [KINDS[kind] for kind in prototype], c_int if name == "encode" else None
    return Loaded(library, "")


def build(compiler: str, processor: list[str]) -> Path:
    """The compiled library, from the cache or made now."""
    folder = Path(__file__).parent / "native"
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    parts = [version, *FLAGS, *sorted(processor), *(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.?pp")))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jevons" / "native"
    target = cache / f"{key}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / "kernels.so"
            command = [compiler, *FLAGS, *map(str, sorted(folder.glob("*.cpp"))), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            os.replace(built, target)
    return target
