"""The compiled part of the kernels: native/*.cpp, built at first use and loaded with ctypes.

Problem: a wheel for every processor is a burden, and torch's own extension builder takes a minute. Approach: plain C
functions, no torch headers, one compiler call a file, some seconds in all, cached under $XDG_CACHE_HOME/jevons/native (~/.cache) by the
hash of sources, flags, compiler and processor. A file appears there by renaming, so processes that build at once do not
meet. AVX-512 is used where it comes with products of bf16 and of bytes, else AVX2 (native/avx2.hpp). Where compiler or
processor will not do, `load` says why and callers use torch. Not done: other processors than x86-64.
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
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from jevons.kernels import processor

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-pthread", "-w")
NEEDED = ("avx2", "fma")
WIDE = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
NARROW = "-mno-avx512f"  # also where a processor has some of WIDE
FOLDER = Path(__file__).parent / "native"
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
    "segments": "iplplpliiiiplpfpi",
    "segments_backward": "iplplplpliiiiplpfpppi",
    "swiglu": "plplillppi",
    "swiglu_backward": "pplplillppplppi",
    "rms_norm_backward": "pplillpfppi",
    "squares": "pilpi",
    "adamw": "ppipppl" + "f" * 7 + "i",
    "paged_gqa": "plppiliiiiplpifpi",
    "paged_mla": "plpiliiiplpippfpi",
    "sample": "ppllppppi",
    "memory_gather": "pillppp" + "llll" + "pi",
    "memory_dots": "pillppp" + "llll" + "pi",
    "memory_sort": "pllppp",
    "memory_scatter": "pplppp" + "i" + "lllll" + "pi",
    "memory_merge": "plplppp",
    "memory_add": "pippipllpi",
    "memory_select": "ppillllppplppi",
    "memory_layer": "ppillppi",
    "adamw_rows": "ppippppll" + "f" * 7 + "i",
}
RESULTS: dict[str, Any] = dict.fromkeys(("encode", "sample", "memory_gather", "memory_dots", "memory_layer"), c_int)
RESULTS |= dict.fromkeys(("memory_sort", "memory_merge"), c_long)


class Loaded(NamedTuple):
    """The library's functions, or None and the reason."""

    functions: Any
    reason: str


@functools.cache
def load() -> Loaded:
    """Build if need be, load, declare the functions. A failing compiler is warned about, once."""
    flags = processor.flags()
    if flags is None:
        return Loaded(None, "native kernels need Linux on x86-64")
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
        function.argtypes, function.restype = [KINDS[kind] for kind in prototype], RESULTS.get(name)
    return Loaded(library, "")


def build(compiler: str, processor: list[str]) -> Path:
    """The compiled library, from the cache or made now, a file on each core."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    files = sorted(FOLDER.glob("*.cpp"))
    texts = [path.read_text(encoding="utf-8") for path in [*files, *sorted(FOLDER.glob("*.hpp"))]]
    flags = [*FLAGS, *(() if set(WIDE) <= set(processor) else (NARROW,))]
    key = hashlib.sha256("\0".join([version, *flags, *sorted(processor), *texts]).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jevons" / "native"
    target = cache / f"{key}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:

            def call(*arguments: str) -> None:
                subprocess.run([compiler, *flags, *arguments], check=True, capture_output=True, text=True, timeout=600)

            objects = [str(Path(scratch) / f"{path.stem}.o") for path in files]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in pool.map(lambda path, to: call("-c", str(path), "-o", to), files, objects):
                    pass
            built = Path(scratch) / "kernels.so"
            call("-shared", *objects, "-o", str(built))
            os.replace(built, target)
    return target
