"""What a device can do on paper: peak dense bf16 FLOPS as the makers' data sheets state it. Written in November 2026.

Only the fallback. A CPU, a laptop or a clocked-down card reaches less, so a run measures its own peak where it can and uses
this table where nothing was measured, and for plans. Sparsity is never counted; devices not listed have no peak.
"""

from __future__ import annotations

import re

PEAK_FLOPS = {  # the first name whose words stand in the device's name wins, so variants come before their family
    "B200": 2250e12,  # NVIDIA DGX B200 data sheet, 4.5 PFLOPS sparse / 2
    "H100 PCIe": 756e12,  # NVIDIA H100 data sheet
    "H100 NVL": 835e12,  # NVIDIA H100 data sheet, 1,671 sparse / 2
    "H100": 989.5e12,  # NVIDIA H100 SXM5 data sheet, 1,979 sparse / 2
    "H200": 989.5e12,  # the same chip with more memory
    "H800": 989.5e12,  # the same chip with less NVLink; DeepSeek-V3's utilisation is computed against this figure
    "H20": 148e12,  # NVIDIA H20 data sheet
    "A100": 312e12,  # NVIDIA A100 data sheet
    "A800": 312e12,
    "L40S": 362e12,  # NVIDIA L40S data sheet, 733 sparse / 2
    "L4": 121e12,  # NVIDIA L4 data sheet, 242 sparse / 2
    "RTX 4090": 165.2e12,  # NVIDIA Ada white paper, fp32 accumulation
    "RTX 3090": 71e12,  # NVIDIA GA102 white paper, fp32 accumulation
}


def peak_flops(device: str) -> float | None:
    """Data-sheet peak in FLOPS of one device, found by its name as the driver reports it; None for an unknown device."""
    for name, peak in PEAK_FLOPS.items():
        if all(re.search(rf"\b{word}\b", device, re.IGNORECASE) for word in name.split()):
            return peak
    return None
