"""What several rooms' tests share: tiny models of every family with all weights random, and one way to compare tensors.

Torch is imported inside the fixtures, so that the rooms without it stay quick to test alone. `make test` runs one process of tests a core
(pytest-xdist), each with its share of the cores for torch's threads; `pytest tests/test_x.py` runs here and now, with all of them.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import hypothesis
import pytest

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as jevons.cli does: threads that spin cost tests minutes on a busy machine
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # torch reads it when it is loaded, here and in what tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // processes)))

# a slow machine's mood is no failure: neither an example's time nor that of making one
hypothesis.settings.register_profile("jevons", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("jevons")

COMMON = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
COMMON |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
DEEPSEEK: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
DEEPSEEK |= {"n_group": 4, "topk_group": 2, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
DEEPSEEK |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
FAMILY: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK | {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
    "deepseek_v2": DEEPSEEK | {"n_shared_experts": 2, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 1e6},
    "qwen3": {"num_key_value_heads": 2, "rope_theta": 1e6, "head_dim": 24},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "llama": {"num_key_value_heads": 2},
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` is: as many as there are cores for this one, virtual ones too."""
    return CORES


@pytest.fixture(scope="session")
def tiny_fields():
    """`tiny_fields(model_type, **changes)`: config.json of a tiny model, in Hugging Face's older spelling (rope_theta, rope_scaling)."""
    return lambda model_type, **changes: {"model_type": model_type, **COMMON, **FAMILY[model_type], **changes}


@pytest.fixture(scope="session")
def randomize():
    """`randomize(module, seed=0)` makes every parameter and router bias matter: no zero bias, no norm of one."""
    import torch

    @torch.no_grad()
    def fill(module, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + 1 if "norm" in name else noise)
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of both signs: a mask of 0 instead of -inf would show
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.5 - 0.5)
        return module

    return fill


@pytest.fixture(scope="session")
def tiny_model(tiny_fields, randomize):
    """`tiny_model(model_type, seed=0, **changes)`: an fp32 Transformer on the CPU."""
    from jevons.model.family import from_hf
    from jevons.model.transformer import Transformer

    return lambda model_type="deepseek_v3", seed=0, **changes: randomize(Transformer(from_hf(tiny_fields(model_type, **changes))), seed)


@pytest.fixture(scope="session")
def assert_close():
    """`assert_close(ours, theirs, tolerance=1e-5)`: within a fraction of the largest entry of `theirs`, or of `floor` if that is more.

    Why 1e-5 in fp32: one rounding is 6e-8, and sums of some hundred terms taken in another order drift to about 1e-6 of the
    largest entry; a wrong formula shows at 1e-3 and above. Relative to the entry itself would fail where terms cancel.
    """
    import torch

    def check(ours, theirs, tolerance=1e-5, *, floor=0.0, message=""):
        assert ours.shape == theirs.shape, (message, ours.shape, theirs.shape)
        scale = max(theirs.detach().abs().max().item(), floor)
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * scale, msg=lambda m: f"{message}: {m}")

    return check


@pytest.fixture(scope="module")
def one_thread():
    """Sums are made in the same order in every process; for `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request, tmp_path):
    """The ledger's URL on each kind of database, empty: a new SQLite file, and a new schema of the server at JEVONS_TEST_POSTGRES."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.db'}"
        return
    if not (server := os.environ.get("JEVONS_TEST_POSTGRES")):
        pytest.skip("JEVONS_TEST_POSTGRES names no PostgreSQL server; .ci/run starts one")
    import sqlalchemy as sql

    engine, schema = sql.create_engine(server), f"test_{uuid.uuid4().hex}"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    url = sql.make_url(server).update_query_dict({"options": f"-csearch_path={schema}"})
    yield url.render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()
