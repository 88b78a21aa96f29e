"""Claims about what DeepSeek's models are: parameters, FLOPs a token, cache a token. All of it follows from config.json."""

from __future__ import annotations

from jevons.cost.arithmetic import cache_bytes_per_token, parameters, train_flops
from jevons.cost.claim import Claim, Table, cite, percent, show
from jevons.cost.published import published


def v3_parameters() -> Claim:
    counts = parameters(published("deepseek-v3"))
    checkpoint = counts.total + counts.buffers + counts.mtp + 2 * counts.embedding
    return Claim(
        name="v3-parameters",
        statement="V3 has 671B parameters",
        source=(cite("v3", "abstract"),),
        method="every matrix, bias and norm of config.json, summed (cost/arithmetic.py)",
        published=671e9,
        ours=counts.total,
        tolerance=1e-3,
        verdict="confirmed",
        note=f"Exactly {counts.total:,}. The files hold {show(checkpoint, '')}: they also have the multi-token-prediction module "
        f"({show(counts.mtp, '')}), which repeats embedding and head.",
    )


def v3_active() -> Claim:
    counts = parameters(published("deepseek-v3"))
    rows = {
        "with embedding and head": counts.active,
        "without the input embedding": counts.active_without_embedding,
        "without both": counts.active_without_embedding - counts.head,
    }
    return Claim(
        name="v3-active",
        statement="37B of them work on a token",
        source=(cite("v3", "abstract"), cite("wallstreetcn")),
        method="attention, dense layers, shared expert, 8 of 256 routed experts, head: what one token multiplies with",
        published=37e9,
        ours=counts.active_without_embedding,
        tolerance=0.015,
        verdict="confirmed",
        note=f"Three countings are in use, {show(rows['without both'], '')} to {show(counts.active, '')}. DeepSeek's README gives 36.7B "
        "as including embedding and head; that figure leaves the input embedding out.",
        tables=(Table("Parameters for one token", ("counted", "parameters"), tuple((k, f"{v:,}") for k, v in rows.items())),),
    )


def r1_dynamic() -> Claim:
    config = published("deepseek-v3")
    counts = parameters(config)
    experts = config.num_experts_per_tok + config.n_shared_experts
    return Claim(
        name="r1-dynamic",
        statement="R1 activates only 37B, dynamically",
        source=(cite("wallstreetcn"),),
        method="R1 has V3's config.json; its active parameters, as for v3-active",
        published=37e9,
        ours=counts.active_without_embedding,
        tolerance=0.015,
        verdict="with a caveat",
        note=f"The amount is fixed: {config.num_experts_per_tok} of {config.n_routed_experts} routed experts and "
        f"{config.n_shared_experts} shared one for every token, easy or hard, {percent(counts.active / counts.total)} of the model. What "
        f"changes from token to token is which experts. Thinking costs more because it takes more tokens, each through the same {experts} "
        "experts a layer.",
    )


def v3_flops() -> Claim:
    context = 4096
    shown = {"deepseek-v2": 155e9, "deepseek-v3": 250e9, "qwen2.5-72b": 394e9, "llama-3.1-405b": 2448e9}
    computed = {name: train_flops(published(name), context, mtp=False) for name in shown}
    apart = {name: computed[name] / value - 1 for name, value in shown.items()}
    config = published("deepseek-v3")
    with_mtp, whole = train_flops(config, context), train_flops(config, 2 * context, mtp=False)
    return Claim(
        name="v3-flops",
        statement="Training V3 takes 250 GFLOP a token",
        source=(cite("isca", "table 2"),),
        method="6 for every active parameter but the input embedding, 3 x scores and weighted sum at half of 4,096 tokens (causal)",
        published=shown["deepseek-v3"],
        ours=computed["deepseek-v3"],
        unit="FLOP",
        verdict="confirmed",
        note=f"Without the multi-token-prediction module, which is trained too and makes it {show(with_mtp, 'FLOP')}; counting masked "
        f"scores as if they were computed, {show(whole, 'FLOP')}. The same formula gives V2 to {percent(apart['deepseek-v2'])} and Llama "
        f"to {percent(apart['llama-3.1-405b'])}; the table's 394 for Qwen's 72B does not come out of its config.json.",
        tables=(
            Table(
                "FLOPs of one trained token, 4,096-token sequences",
                ("model", "published", "ours", "apart"),
                tuple((k, show(value, "FLOP"), show(computed[k], "FLOP"), percent(apart[k])) for k, value in shown.items()),
            ),
        ),
    )


def v3_cache() -> Claim:
    shown = {"deepseek-v3": 70.272e3, "qwen2.5-72b": 327.680e3, "llama-3.1-405b": 516.096e3}
    computed = {name: cache_bytes_per_token(published(name)) for name in shown}
    ours = computed["deepseek-v3"]
    rows = tuple((name, show(value, "B"), show(computed[name], "B"), f"{computed[name] / ours:.2f}x") for name, value in shown.items())
    return Claim(
        name="v3-cache",
        statement="V3 caches 70 KB a token",
        source=(cite("isca", "table 1"),),
        method="61 layers x (512 latent + 64 rotary) scalars x 2 bytes",
        published=shown["deepseek-v3"],
        ours=ours,
        unit="B",
        tolerance=1e-4,
        verdict="confirmed",
        note=f"In bf16. A dense 405B with grouped queries keeps {computed['llama-3.1-405b'] / ours:.1f} times as much.",
        tables=(Table("Cache of one token, bf16", ("model", "published", "ours", "of V3's"), rows),),
    )


def v2_cache() -> Claim:
    bits = 6  # a scalar of V2's cache in service, on average
    dense, latent = (cache_bytes_per_token(published(name)) for name in ("deepseek-67b", "deepseek-v2"))
    served = latent * bits / 16
    v3 = cache_bytes_per_token(published("deepseek-v3"))
    rows = [
        ("DeepSeek 67B, bf16: 95 layers, 8 key/value heads of 128", dense),
        ("V2, bf16: 60 layers, latent of 512 and 64 rotary", latent),
        (f"V2 as served, {bits} bits a scalar", served),
        ("V3, bf16: 61 layers", v3),
    ]
    return Claim(
        name="v2-cache",
        statement="Latent attention saves 93.3 % of the cache",
        source=(cite("v2", "abstract; 6 bits: section 3.2.3"),),
        method="1 - V2's bytes a token / DeepSeek 67B's, V2 in the 6 bits a scalar that its service keeps",
        published=93.3,
        ours=100 * (1 - served / dense),
        unit="%",
        tolerance=1e-3,
        verdict="with a caveat",
        note=f"Two savings in one number. Latent attention alone, both caches in bf16, saves {percent(1 - latent / dense)} (V3: "
        f"{percent(1 - v3 / dense)}); the rest is {bits}-bit quantization, which a dense model could have as well.",
        tables=(
            Table(
                "Cache of one token",
                ("model", "bytes", "saved"),
                tuple((name, f"{value:,.0f}", percent(1 - value / dense)) for name, value in rows),
            ),
        ),
    )
