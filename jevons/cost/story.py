"""The story's claims, in the order in which it is told: what the models are, what training and serving took, prices, the rest.

    claim("v3-hours")       one of them, computed alone
    story()                 all
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from jevons.cost import claim_model, claim_price, claim_serving, claim_size, claim_sparse, claim_training
from jevons.cost.claim import Claim

CHAPTERS: dict[str, tuple[Callable[[], Claim], ...]] = {
    "The model": (
        claim_model.v3_parameters,
        claim_model.v3_active,
        claim_model.r1_dynamic,
        claim_model.v3_flops,
        claim_model.v3_cache,
        claim_model.v2_cache,
    ),
    "Training": (
        claim_training.v3_hours,
        claim_training.v3_cost,
        claim_training.v3_trillion,
        claim_training.v2_training,
        claim_training.v3_chips,
        claim_training.r1_cost,
        claim_training.s1_cost,
        claim_training.tenth,
    ),
    "Serving": (
        claim_serving.prefill_rate,
        claim_serving.decode_rate,
        claim_serving.day_cost,
        claim_serving.day_margin,
        claim_serving.margin_promotional,
        claim_serving.margin_list,
    ),
    "Prices": (
        claim_price.meta_price,
        claim_price.o1_price,
        claim_price.gpt4_price,
        claim_price.price_fall,
        claim_price.fiftieth,
    ),
    "The others": (
        claim_size.qwen_sizes,
        claim_size.qwen_max,
        claim_sparse.doubao_price,
        claim_sparse.doubao_leverage,
        claim_sparse.ultramem_speed,
        claim_sparse.ultramem_cost,
        claim_sparse.ultramem_measured,
    ),
}


def names() -> tuple[str, ...]:
    """Of all claims: those of their functions, with dashes."""
    return tuple(function.__name__.replace("_", "-") for functions in CHAPTERS.values() for function in functions)


def claim(name: str) -> Claim:
    """One claim, computed alone. Raises ValueError with the nearest name for an unknown one."""
    found = dict(zip(names(), (function for functions in CHAPTERS.values() for function in functions)))
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(found)}"
        raise ValueError(f"claims: no claim {name!r}; {hint}")
    return found[name]()


def story() -> dict[str, tuple[Claim, ...]]:
    """All claims, computed, by chapter."""
    return {chapter: tuple(function() for function in functions) for chapter, functions in CHAPTERS.items()}
