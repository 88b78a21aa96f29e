"""The comparison of dense, mixture and memory models (benchmarks/sparse.py): matched, counted by what is read, and run in small."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from jevons.cost.arithmetic import forward_flops, parameters
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.attend import Packed
from jevons.model.transformer import Transformer
from jevons.recipe import load

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of benchmarks/, which are scripts beside one another, no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def find(name: str) -> ModuleType:
        return importlib.import_module(name)

    return find


@pytest.mark.parametrize("name", ["LARGE", "SMALL", "TINY"])
def test_models_are_matched(module, name):
    match = module("match")
    shape = getattr(match, name)
    configs = match.trio(shape)
    totals = {kind: parameters(config).total for kind, config in configs.items()}
    flops = {kind: forward_flops(config, shape.context) for kind, config in configs.items()}
    assert totals["memory"] == pytest.approx(totals["moe"], rel=0.01)
    assert flops["memory"] == pytest.approx(flops["moe"], rel=0.01) and flops["dense"] == pytest.approx(flops["moe"], rel=0.01)
    shared = [{k: v for k, v in vars(c).items() if k in shape.common and k != "model_type"} for c in configs.values()]
    assert shared[0] == shared[1] == shared[2]


def test_sparse_parameters_are_experts_and_tables(module):
    match = module("match")
    for kind, config in match.trio(match.TINY).items():
        sizes = [p.numel() for n, p in Transformer(config).named_parameters() if ".experts." in n or ".values.weight" in n]
        assert match.sparse_parameters(config) == sum(sizes) and bool(sizes) == (kind != "dense")


def test_the_recipe_is_one_of_the_three(module):
    match = module("match")
    assert load("memory").config() == match.trio(match.SMALL)["memory"]


def test_at_least_a_gigabyte_in_bf16_is_sparse(module):
    match = module("match")
    assert all(2 * match.sparse_parameters(config) >= 10**9 for name, config in match.trio(match.LARGE).items() if name != "dense")


def test_a_shape_without_a_match_is_refused(module):
    match = module("match")
    shape = match.dataclasses.replace(match.TINY, sparse=2_000)  # a token's rows alone are more
    with pytest.raises(ValueError, match="beside the mixture; change"):
        match.trio(shape)


@pytest.mark.parametrize("kind", ["moe", "memory"])
def test_what_is_counted_is_what_gradients_reach(module, kind):
    """A step's unique experts and rows against those of its weights that a backward pass through the same tokens touches."""
    match, latency = module("match"), module("latency")
    config = match.trio(match.TINY)[kind]
    model = latency.make(config, torch.float32, seed=1)
    chosen = latency.watch(model)
    engine = Engine(model, max_batch_tokens=64, share_prefixes=False, stop_ids=())
    prompts = torch.randint(0, config.vocab_size, (5, 1)).tolist()  # prompts of one token: the step that reads them is a forward of 5 rows
    for prompt in prompts:
        engine.submit(prompt, SamplingParams(max_tokens=2))
    engine.step()
    counted = latency.unique(chosen.experts), latency.unique(chosen.rows)
    hidden_TD = model(torch.tensor(prompts).flatten(), torch.zeros(5, dtype=torch.int64), Packed(torch.arange(6))).hidden_TD
    hidden_TD.pow(2).sum().backward()
    touched = ([], [])
    for name, parameter in model.named_parameters():
        which = 0 if name.endswith("experts.down_proj") else 1 if name.endswith("values.weight") else None
        if which is not None:
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            touched[which].append(int(gradient.flatten(1).any(1).sum()))
    assert counted == touched and sum(map(sum, touched)) > 0


def test_quick(tmp_path):
    """Counted bytes equal those of an independent count, and what is chosen is about what uniform choices would be."""
    command = [sys.executable, str(BENCHMARKS / "sparse.py"), "--quick", "--part", "latency", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == json.loads((tmp_path / "sparse.json").read_text())
    assert results["benchmark"] == "sparse" and results["device"] and results["date"] and "--quick" in results["command"]
    found = results["ours"]["latency"]
    assert results["ratio"]["moe"]["latency"] == found["ratio"] and found["machine"]["bandwidth"] > 0
    size = {"float32": 4, "bfloat16": 2}[found["dtype"]]
    for kind, model in found["models"].items():
        for batch, row in model["batches"].items():
            read = row["bytes"]
            outside = model["parameters"] - model["sparse_parameters"] - 512 * 64 + int(batch) * 64  # its embedding: a row a token
            expert = 3 * 64 * model.get("expert_width", 0) * size
            assert read["dense"] == pytest.approx(outside * size, rel=0.01)
            assert read["experts"] == pytest.approx(row["unique"] * 3 * expert if kind == "moe" else 0, rel=0.01)
            assert read["rows"] == pytest.approx(row["unique"] * 32 * size if kind.startswith("memory") else 0, rel=0.01)
            assert read["total"] == pytest.approx(sum(read[part] for part in ("dense", "cache", "experts", "rows")))
            assert row["unique"] == pytest.approx(row["expected_unique"], rel=0.15)
            assert 0 < row["median"] <= row["p90"] and row["cold"] > 0
    page = (tmp_path / "sparse.html").read_text()
    assert page.count("<svg") == 2 and "http://" not in page and "https://" not in page


def test_losses_are_read_at_equal_tokens_and_equal_time(module):
    points = [(0.0, 6.0), (10.0, 4.0), (20.0, 3.0)]
    at = module("loss").at
    assert [at(points, x) for x in (0, 5, 10, 15, 20)] == [6.0, 5.0, 4.0, 3.5, 3.0]


@pytest.mark.slow
def test_quick_with_training(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "sparse.py"), "--quick", "--part", "loss", "--part", "step", "--runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, check=True)
    ours = json.loads(done.stdout.splitlines()[-1])["ours"]
    for name, model in ours["loss"]["models"].items():
        points = ours["loss"]["curves"][name]
        assert points["tokens"][-1] == [4 * 4 * 32, model["loss_at_equal_tokens"]]
        assert points["seconds"][-1][0] >= ours["loss"]["seconds"] > 0
        assert model["loss_at_equal_tokens"] < points["tokens"][0][1]
        assert all(0 < row["unique"] <= row["expected_unique"] * 1.2 for row in model["chosen"].values())
        receipt = json.loads((tmp_path / name / "receipt.json").read_text())
        assert receipt["stages"][-1]["tokens"] == 4 * 4 * 32
    assert ours["step"]["models"].keys() == {"dense", "moe", "memory"}
    again = subprocess.run(command, capture_output=True, text=True, check=True)  # finished runs are read, not made again
    assert json.loads(again.stdout.splitlines()[-1])["ours"]["loss"]["curves"] == ours["loss"]["curves"]
