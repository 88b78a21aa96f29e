"""Loading a checkpoint: seconds, and the most memory held by then and once every weight was read, as shares of the checkpoint's size.

    python benchmarks/load.py --model DIR

Every weight is read once, so pages that a memory map brings in late are counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from jevons.model.folder import load_model


def peak_bytes() -> int:
    """The most memory this process ever held (Linux: VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(folder: Path) -> dict[str, float]:
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    before, start = peak_bytes(), time.perf_counter()
    model = load_model(folder)
    loaded, held = time.perf_counter() - start, peak_bytes() - before
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            flat[:: 4096 // flat.element_size()].sum()  # one element of every page
    touched, held_touched = time.perf_counter() - start, peak_bytes() - before
    return {"bytes": size, "seconds": loaded, "seconds_touched": touched, "memory_loaded": held / size, "memory": held_touched / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    ours = measure(parser.parse_args().model.expanduser())
    print(f"{ours['bytes'] / 1e9:.2f} GB: loaded in {ours['seconds']:.2f} s, all read after {ours['seconds_touched']:.2f} s, "
          f"{ours['memory_loaded']:.2f} and {ours['memory']:.2f} times its size in memory")  # fmt: skip
    print(json.dumps({"benchmark": "load", "ours": ours}))


if __name__ == "__main__":
    main()
