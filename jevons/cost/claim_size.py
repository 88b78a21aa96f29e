"""Claims about sizes: Qwen2.5 from phone to cloud as memory and speed by weight format, and a model whose size nobody knows."""

from __future__ import annotations

from dataclasses import replace

from jevons.cost.arithmetic import cache_bytes_per_token, parameters
from jevons.cost.claim import Claim, Table, cite
from jevons.cost.deployment import FORMATS, USABLE, Deployment
from jevons.cost.hardware import Device, Hardware
from jevons.cost.published import names, published

CONTEXT = 4096  # tokens cached where speeds are told
# two cores of an AMD EPYC (Zen 4), Qwen2.5-Coder 0.5B, one sequence: tokens/s by python benchmarks/serve.py, run of 2026-11-25, README.md
MEASURED = {"bf16": 27.0, "int8": 45.2, "int4": 59.2}


def _machines() -> dict[str, Device]:
    """From phone to cloud: the first two are typical, the others from hardware.toml; eight devices count as one of their sum."""
    hardware = Hardware.load()
    small, large, cpu = (hardware.device(name) for name in ("RTX 4090", "H100", "CPU"))
    return {
        "phone, 8 GB": replace(cpu, memory=8e9, bandwidth=50e9),
        "laptop, 16 GB": replace(cpu, memory=16e9, bandwidth=100e9),
        "24 GB GPU": small,
        "80 GB GPU": large,
        "8 of them": replace(large, memory=8 * large.memory, bandwidth=8 * large.bandwidth),
    }


def _speed(deployment: Deployment, device: Device) -> float | None:
    """Tokens/s of one sequence at most, None where weights and cache do not fit."""
    cache = CONTEXT * deployment.cache_per_token
    return device.bandwidth / (deployment.read_bytes(1) + cache) if deployment.weights + cache <= USABLE * device.memory else None


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:,.{int(value < 100)}f}"


def qwen_sizes() -> Claim:
    machines = _machines()
    phone, large = machines["phone, 8 GB"], machines["80 GB GPU"]
    configs = {name.removeprefix("qwen2.5-").upper(): published(name) for name in names() if name.startswith("qwen2.5-")}
    kept = {name: {f: Deployment(config, phone, format=FORMATS[f]) for f in FORMATS} for name, config in configs.items()}
    memory, speed = [], []
    for name, config in configs.items():
        weights = (f"{deployment.weights / 1e9:.2f}" for deployment in kept[name].values())
        cache = (f"{cache_bytes_per_token(config) * context / 1e9:.2f}" for context in (4096, 32768))
        memory.append((name, f"{parameters(config).total:,}", *weights, *cache))
        for f in ("int4", "bf16"):
            speed.append((f"{name} {f}", *(_digits(_speed(kept[name][f], device)) for device in machines.values())))
    first, *_, last = configs
    gain = {name: kept[name]["bf16"].read_bytes(1) / kept[name]["int4"].read_bytes(1) for name in (first, last)}
    fits = [name for name in configs if _speed(kept[name]["int4"], phone) is not None]
    measured = ((f, f"{rate:g}", _digits(phone.bandwidth / kept[first][f].read_bytes(1))) for f, rate in MEASURED.items())
    assert _speed(kept[last]["int8"], large) is None and _speed(kept[last]["int4"], large) is not None
    return Claim(
        name="qwen-sizes",
        statement="Qwen2.5: 0.5B to 72B, from phone to cloud",
        source=(cite("tmtpost"), cite("qwen", "table 1")),
        method="parameters and cache from config.json; weights by format with their scales; speed = bandwidth / bytes that a token reads",
        published=(0.5e9, 72e9),
        ours=(parameters(configs[first]).total, parameters(configs[last]).total),
        tolerance=0.02,
        verdict="confirmed",
        note=f"In 4 bits 8 GB hold the {fits[-1]} with {CONTEXT:,} tokens, {_digits(_speed(kept[fits[-1]]['int4'], phone))} tokens/s at "
        f"most; the {last} takes {kept[last]['bf16'].weights / 1e9:.0f} GB in bf16 and goes on one 80 GB device in 4 bits only. One "
        f"conversation is as fast as memory reads: int4, 5 bits with its scales, gains {gain[last]:.1f} times at {last} and "
        f"{gain[first]:.1f} at {first}, where the embedding, kept in bf16, and the head, kept in 8 bits, weigh more.",
        tables=(
            Table("GB of weights, and of cache at 4K and 32K tokens", ("Qwen2.5", "parameters", *FORMATS, "4K", "32K"), tuple(memory)),
            Table(
                f"Tokens/s at most, one sequence, {CONTEXT:,} tokens cached; - where it does not fit into {100 * USABLE:g} %",
                ("Qwen2.5", *machines),
                tuple(speed),
            ),
            Table(
                f"Measured, {first} on 2 CPU cores, tokens/s of one sequence (README, benchmarks/serve.py, run of 2026-11-25)",
                ("format", "run", f"at most at {phone.bandwidth / 1e9:.0f} GB/s"),
                tuple(measured),
            ),
        ),
    )


def qwen_max() -> Claim:
    return Claim(
        name="qwen-max",
        statement="Qwen2.5-Max rivals V3",
        source=(cite("tmtpost"),),
        method="nothing to compute from: size, experts, routing and weights are not public",
        published=None,
        ours=None,
        verdict="not verifiable",
        note="A mixture of experts on more than 20T tokens, says its maker, sold as an API only. Whatever stands in for it is a "
        "surrogate and no reproduction.",
    )
