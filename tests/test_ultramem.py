"""UltraMem: the traps of its description, the choice of rows, gradients against a dense reference, counts, every use of a model."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jevons.cost.arithmetic import distinct, forward_flops, memory_flops, memory_parameters, memory_read, multiply_flops, parameters
from jevons.data.batch import pack
from jevons.engine.engine import Engine
from jevons.engine.packed import pack_model
from jevons.engine.sequence import SamplingParams
from jevons.kernels import native
from jevons.kernels.memory import select
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.family import from_hf, to_hf
from jevons.model.folder import load_model, save_model
from jevons.model.memory import MemoryConfig
from jevons.model.transformer import Transformer
from jevons.model.ultramem import SharedValues, UltraMem
from jevons.recipe import parse
from jevons.stages.pretrain import memory_schedule
from jevons.train.loss import next_token
from jevons.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
WITH_NATIVE = pytest.mark.skipif(not native.available(), reason=native.reason() or "native kernels")

MEMORY = {"memory_keys": 8, "memory_key_dim": 12, "memory_value_dim": 10, "memory_top_k": 5, "memory_layers": ("0:2", "1:1", "2:2")}
V2 = {"memory_version": "ultramem_v2", "memory_heads": 1, "memory_share_ratio": 0.4, "memory_pre_value_dim": 6}
BASE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2} | MEMORY
MIXED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 16}
MIXED |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_nextn_predict_layers": 1}
CONFIGS = {
    "ultramem": ModelConfig(**BASE, model_type="qwen2", num_key_value_heads=1),
    "ultramem_v2": ModelConfig(**BASE, **V2, model_type="llama", num_key_value_heads=1),
    "mixture": ModelConfig(**BASE, **MIXED, n_shared_experts=1),
}
# run_ultramem_v1.sh of the released code: 151M parameters beside the tables
OFFICIAL = ModelConfig(
    model_type="llama",
    vocab_size=50304,
    hidden_size=768,
    intermediate_size=5504,
    num_hidden_layers=20,
    num_attention_heads=12,
    tie_word_embeddings=True,
    memory_layers=("2:5", "6:9", "10:13", "14:17"),
    memory_keys=808,
    memory_key_dim=192,
    memory_value_dim=384,
    memory_top_k=80,
)


def made(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Transformer:
    """A model whose memory layers matter: their values are as large as other activations."""
    model = Transformer(replace(CONFIGS[kind], **changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("memory.values.weight"):
                parameter *= 20
    model = model.to(dtype)
    for router in model.routers.values():
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    return model


@cache
def frozen(kind: str) -> Transformer:
    return made(kind).requires_grad_(False)


def layer(kind: str, seed: int = 0) -> UltraMem:
    """A memory layer alone, with values of its own or a table to share."""
    config = CONFIGS[kind]
    shared = SharedValues(config) if config.memory_shared else None
    module, generator = UltraMem(config, 1, shared), torch.Generator().manual_seed(seed)
    for part in (module, shared):
        if part is not None:
            part.init_weights(generator)
    return module


def documents(seed: int = 0) -> list[tuple[Tensor, None]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(61, (n,), generator=generator), None) for n in (9, 20, 3)]


def train(trainer: Trainer, steps: range) -> None:
    for step in steps:
        trainer.forward_backward([pack(documents(step)), pack(documents(100 + step))], next_token)
        trainer.step(1e-2, memory=4.0)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in (dict(trainer.weights()) | trainer.optimizer.state()).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# --- which rows: u, v and the candidates ---


def leading(core_HRR: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors by eigenvectors, in fp64: another way than the module's."""
    core = core_HRR.double()
    return torch.linalg.eigh(core @ core.mT).eigenvectors[..., -1], torch.linalg.eigh(core.mT @ core).eigenvectors[..., -1]


@pytest.mark.parametrize("kind", ["ultramem", "ultramem_v2"])
def test_singular_vectors_are_there_before_the_first_forward_and_follow_every_step(kind):
    def check(model: Transformer) -> None:
        for memory in (m for m in model.modules() if isinstance(m, UltraMem)):
            for ours, theirs in zip((memory.u, memory.v), leading(memory.tucker_core.detach().sum(0))):
                torch.testing.assert_close((ours.double() * theirs).sum(-1).abs(), torch.ones(len(ours)).double(), rtol=0, atol=1e-5)

    model = made(kind)
    check(model)
    for name, buffer in model.named_buffers():
        if name.endswith((".u", ".v")):
            buffer.zero_()  # as a module that nobody initialised has them
    trainer = Trainer(model)
    check(model)
    before = {n: p.clone() for n, p in model.named_parameters() if "core" in n}
    train(trainer, range(2))
    assert before and all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    check(model)


def test_without_them_the_choice_is_arbitrary():
    row, column = (torch.randn(200, 1, 50, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def found(u: Tensor) -> float:
        chosen = select(row, column, u, u, torch.ones(1, 2, 2), 5)
        sums = [side.sum(-1).gather(2, keys) for side, keys in zip((row, column), chosen)]
        return (sums[0] * sums[1]).mean().item()

    assert 0 < found(torch.zeros(1, 2)) < 0.4 * found(torch.ones(1, 2))


def test_the_sign_is_determined_then_smooth():
    first, second = layer("ultramem"), layer("ultramem")
    assert (first.u.sum(-1) > 0).all() and torch.equal(first.u, second.u) and torch.equal(first.v, second.v)
    u, v = first.u.clone(), first.v.clone()
    for module in (first, second):
        module.tucker_core.data += 0.01 * torch.randn(module.tucker_core.shape, generator=torch.Generator().manual_seed(1))
    second.u.neg_(), second.v.neg_()  # where it came from decides, not the decomposition
    for module in (first, second):
        module.update_vectors()
    assert torch.equal(first.u, -second.u) and torch.equal(first.v, -second.v)
    assert ((first.u - u).abs() < 0.1).all() and ((first.v - v).abs() < 0.1).all()


def scored(core_HRR: Tensor, positive: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random numbers of 24 keys a side for 40 tokens, what was chosen of them with m = 6, and the whole S."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(40, 2, 24, 2, generator=generator) for _ in range(2)]
    row, column = (x.abs() for x in sides) if positive else sides
    left, _, right = torch.linalg.svd(core_HRR)
    sign = left[..., 0].sum(-1, keepdim=True).sign()
    a, b = select(row, column, left[..., 0] * sign, right[..., 0, :] * sign, core_HRR, 6)
    return row, column, a, b, torch.einsum("thar,hrs,thbs->thab", row, core_HRR, column)


def recall(core_HRR: Tensor, positive: bool = False) -> float:
    _, _, a, b, S = scored(core_HRR, positive)
    exact = S.flatten(2).topk(6, dim=-1).indices
    return ((a * 24 + b)[..., None] == exact[..., None, :]).any(-1).double().mean().item()


def test_the_choice_is_exact_where_the_core_has_rank_one_and_scores_are_positive():
    u, v = (torch.rand(2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    core = u[:, :, None] * v[:, None, :]
    assert recall(core, positive=True) == 1.0
    assert recall(core) < 1.0  # of factors with both signs two very negative ones may make the best product


def test_recall_rises_as_the_core_nears_rank_one():
    whole = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(3))
    assert 0.4 < recall(whole) < 0.65  # what to expect at the start, of scores of both signs
    left, _, right = torch.linalg.svd(whole)
    found = [recall((left * torch.tensor([1.0, second])) @ right, positive=True) for second in (1.0, 0.6, 0.3, 0.0)]
    assert found == sorted(found) and found[0] < 0.7 and found[-1] == 1.0, found


def test_what_is_chosen_is_scored_by_the_whole_core():
    module, x_TD = layer("ultramem"), torch.randn(7, 32, generator=torch.Generator().manual_seed(5))
    row, column = module.scores(x_TD)
    S_THABC = torch.einsum("thar,chrs,thbs->thabc", row, module.tucker_core, column)
    a, b = select(row, column, module.u, module.v, module.tucker_core.sum(0), module.top_k)
    found = module.look(x_TD)
    expected = S_THABC.flatten(2, 3).gather(2, (a * module.side + b)[..., None].expand(-1, -1, -1, 2))
    torch.testing.assert_close(found.scores_TXC, expected.flatten(1, 2))
    total = found.scores_TXC.sum(-1).unflatten(1, (2, -1))
    assert (total.diff(dim=-1) <= 1e-6).all()  # the best first, of each head
    assert (total[..., 0] >= S_THABC.sum(-1)[..., :1, 0].amin(-1)).all()


# --- the layer against everything written out ---


def dense(module: UltraMem, x_TD: Tensor, chosen_THNN: Tensor) -> Tensor:
    """All E * n * n virtual rows of all heads with their scores, where chosen: each row by its own bucket's matrix."""
    row, column = dense_scores(module, x_TD)
    S = torch.einsum("thar,chrs,thbs->thabc", row, module.tucker_core, column) * chosen_THNN[..., None]
    S_TIC = S.sum(1).flatten(1, 2)  # over heads, by virtual id
    ids = module.shuffle_index.long()
    rows, blocks = (ids % module.window + module.offset) % module.rows, ids // module.window
    (shared,) = module.shared
    values = module.values.weight if shared is None else shared.values.weight
    if shared is not None:
        S_TIC = S_TIC * (module.pre_values_proj(x_TD) @ shared.pre_values.weight[rows].T)[..., None]
        blocks = torch.zeros_like(blocks)
    C = S_TIC.shape[-1]
    matrices_EVD = module.values_proj.weight.T.unflatten(0, (-1, values.shape[1]))
    virtual_ICYD = values[rows].unflatten(1, (C, -1))[..., None] * matrices_EVD[blocks].unflatten(1, (C, -1))
    return torch.einsum("tic,icyd->td", S_TIC, virtual_ICYD)


def dense_scores(module: UltraMem, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Normed by hand; a query for each of the R numbers, or one that all share."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight

    query = norm((x_TD @ module.query_proj.weight.T).unflatten(1, (2, -1, module.keys.shape[-1])), module.query_norm.weight)
    keys = norm(module.keys, module.keys_norm.weight)
    query = query.expand(-1, -1, module.rank, -1)
    row, column = (torch.einsum("try,hnry->thnr", query[:, side], keys[side]) for side in (0, 1))
    return row, column


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["ultramem", "ultramem_v2"])
def test_output_and_every_gradient_equal_the_dense_reference(kind, dtype, assert_close):
    module = layer(kind).to(dtype)
    (shared,) = module.shared
    if shared is not None:
        shared.to(dtype)
    parts = dict(module.named_parameters()) | {f"shared.{n}": p for n, p in (shared.named_parameters() if shared else ())}
    with torch.no_grad():
        parts["values.weight" if shared is None else "shared.values.weight"].mul_(20)
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(9, 32, generator=generator, dtype=dtype).requires_grad_()
    push_TD = torch.randn(9, 32, generator=generator, dtype=dtype)
    with torch.no_grad():
        row, column = module.scores(x_TD)
        a, b = select(row, column, module.u, module.v, module.tucker_core.sum(0), module.top_k)
        chosen = torch.zeros(*a.shape[:2], module.side**2, dtype=dtype).scatter_(2, a * module.side + b, 1.0)
        chosen = chosen.unflatten(2, (module.side, -1))
    inputs = (x_TD, *parts.values())
    want = dense(module, x_TD, chosen)
    expected = torch.autograd.grad(want, inputs, push_TD)
    got = module(x_TD)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert_close(got, want, tolerance)
    for name, ours, theirs in zip(("x", *parts), torch.autograd.grad(got, inputs, push_TD), expected):
        assert theirs.abs().max() > 0, name
        assert_close(ours.to_dense(), theirs, tolerance, message=name)


def test_there_is_no_softmax():
    # scores go out as they are: twice the cores is twice the output, and the choice is the same
    module, x_TD = layer("ultramem"), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    before = module(x_TD)
    module.tucker_core.data *= 2
    module.update_vectors()
    torch.testing.assert_close(module(x_TD), 2 * before)


def test_layers_of_ultramem_v2_look_into_one_table_each_from_its_own_place():
    model = frozen("ultramem_v2")
    config, x_TD = model.config, torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    assert (config.memory_rows, config.memory_window, config.memory_side) == (192, 64, 16)
    tables = ["model.memory.values.weight", "model.memory.pre_values.weight"]
    assert [n for n, _ in model.named_parameters() if "values.weight" in n] == tables
    for i, block in enumerate(model.model.layers[:3]):
        rows = block.memory.look(x_TD).rows_TX
        assert set(rows.flatten().tolist()) <= {(64 * i + r) % 192 for r in range(64)} and len(rows.unique()) > 32


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_memory_is_read_where_it_begins_and_added_where_it_ends(kind):
    model = frozen(kind)
    tokens, attend = torch.arange(12), Packed(torch.tensor([0, 12]))
    rope, x_TD, later = model.rope(tokens, torch.float32), model.model.embed_tokens(tokens), {}
    for i, block in enumerate(model.model.layers[:4]):
        x_TD = x_TD + block.self_attn(block.input_layernorm(x_TD), rope, attend)
        h_TD = block.post_attention_layernorm(x_TD)
        if i in (0, 1, 2):
            later[i] = block.memory(h_TD)
        else:
            assert block.memory is None
        fed = block.mlp(h_TD)
        x_TD = x_TD + (fed[0] if isinstance(fed, tuple) else fed)
        for source in {1: (1,), 2: (0, 2)}.get(i, ()):  # 0:2, 1:1, 2:2
            x_TD = x_TD + later[source]
    torch.testing.assert_close(model(tokens, tokens, attend).hidden_TD, model.model.norm(x_TD))
    assert all(block.memory is None for block in model.model.layers[4:])  # MTP modules have none


# --- counts ---


def test_counts_of_the_official_configuration():
    with torch.device("meta"):
        model = Transformer(OFFICIAL)
    assert parameters(OFFICIAL).total == sum(p.numel() for p in model.parameters())
    memories = [m for m in model.modules() if isinstance(m, UltraMem)]
    assert sum(m.values.weight.numel() for m in memories) == 1_002_799_104
    assert [m.keys.numel() for m in memories] == [2_482_176] * 4
    assert {memory_parameters(OFFICIAL)} == {sum(p.numel() for p in m.parameters()) for m in memories}
    # what one token takes: query, keys, candidates, rows, projection
    D, Y, N, V, m = 768, 192, 1616, 384, 80
    flops = 2 * D * 2 * Y + 2 * 2 * 2 * N * Y * 2 + 2 * 2 * m**2 * 4 * 2 + m * 2 * V + 2 * 4 * V * D
    assert memory_flops(OFFICIAL) == flops
    plain = replace(OFFICIAL, **{field.name: field.default for field in fields(MemoryConfig)})
    assert multiply_flops(OFFICIAL) == multiply_flops(plain) + 4 * flops
    assert forward_flops(OFFICIAL, 1024) - forward_flops(plain, 1024) == 4 * flops
    rows = 2 * m * V  # of which one token reads this many values a layer
    assert parameters(OFFICIAL).active - parameters(plain).active == 4 * (memory_parameters(OFFICIAL) - 808**2 * V + rows)


@pytest.mark.parametrize("kind", CONFIGS)
def test_arithmetic_counts_what_the_modules_hold(kind):
    model = frozen(kind)
    extra = sum(p.numel() for n, p in model.named_parameters() if n.startswith("model.layers.4."))
    assert parameters(model.config).total == sum(p.numel() for p in model.parameters()) - extra
    assert parameters(model.config).mtp in (extra, extra + 4)  # with the router's bias, a buffer


def test_rows_that_a_batch_reads():
    assert [distinct(d, 10) for d in (0, 1)] == [0.0, pytest.approx(1.0)] and distinct(1e9, 10) == pytest.approx(10)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(100, (4000, 70), generator=generator)
    counted = torch.tensor([len(d.unique()) for d in drawn]).double().mean().item()
    assert distinct(70, 100) == pytest.approx(counted, rel=0.005)
    assert memory_read(OFFICIAL, 1) == pytest.approx(4 * 160 * 384, rel=2e-4)
    assert memory_read(OFFICIAL, 10**8) == pytest.approx(1_002_799_104)


# --- configurations ---

WRONG = [
    ({"memory_heads": 3}, "memory_heads: at most 2"),  # the released layer's view of the query
    ({"memory_layers": ("2:1",)}, "memory_layers: '2:1' must be 'SOURCE:TARGET'"),
    ({"memory_layers": ("2:4",)}, "source <= target < num_hidden_layers 4"),
    ({"memory_layers": ("2",)}, "memory_layers: '2' must be"),
    ({"memory_layers": ("0:1", "0:2")}, "block 0 feeds two"),
    ({"memory_layers": ()}, "memory_keys: nothing reads it without memory_layers"),
    ({"memory_keys": 0}, "memory_keys: must be at least 1"),
    ({"memory_expansion": 8}, "memory_expansion: must be a square"),
    ({"memory_cores": 3}, "memory_cores: 3 does not divide memory_value_dim 10"),
    ({"memory_top_k": 17}, "memory_top_k: 17 is more than the 16 keys of a side"),
    ({"memory_share_ratio": 0.5}, "memory_share_ratio: only memory_version 'ultramem_v2'"),
    ({"memory_pre_value_dim": 4}, "memory_pre_value_dim: only memory_version 'ultramem_v2'"),
    ({"memory_version": "pkm"}, "memory_version: unknown 'pkm'"),
]


@pytest.mark.parametrize(("changes", "complaint"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_is_said(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(CONFIGS["ultramem"], **changes)


def test_shares_outside_one():
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="memory_share_ratio: must be above 0"):
            replace(CONFIGS["ultramem_v2"], memory_share_ratio=share)


def test_recipes():
    model = {k: list(v) if isinstance(v, tuple) else v for k, v in (BASE | {"model_type": "llama"}).items()}
    stages = {"prepare": {"sources": ["x"]}, "pretrain": {"steps": 10, "sequence_length": 8, "batch_size": 1, "lr": 1.0}}
    recipe = parse({"name": "x", "model": model, **stages}, "x")
    assert recipe.config().memory_targets == {0: 2, 1: 1, 2: 2}
    plain = {k: v for k, v in model.items() if not k.startswith("memory_")}
    for option in ({"memory_lr": 4.0}, {"memory_lr_share": 0.5}):
        stages["pretrain"] |= option
        parse({"name": "x", "model": model, **stages}, "x")
        with pytest.raises(ValueError, match=f"pretrain.{next(iter(option))}: the model has no memory_layers"):
            parse({"name": "x", "model": plain, **stages}, "x")
        del stages["pretrain"][next(iter(option))]


def test_the_rate_of_values_falls_to_the_others():
    def options(**given):
        return SimpleNamespace(steps=200, **({"memory_lr": None, "memory_lr_share": None} | given))

    v1, v2 = CONFIGS["ultramem"], CONFIGS["ultramem_v2"]
    for given, first, share in (({}, 4, 1), ({"memory_lr": 10.0, "memory_lr_share": 0.5}, 10, 0.5)):
        schedule = memory_schedule(options(**given), v1)
        for step in (0, 1, 50, 100, 150, 199):
            assert schedule.at(step) == pytest.approx(1 + (first - 1) * max(0, 1 - step / (200 * share)))
    assert {memory_schedule(options(), v2).at(s) for s in range(200)} == {1.0}


# --- training ---


@pytest.mark.parametrize("kind", ["ultramem", "ultramem_v2"])
def test_values_have_a_rate_of_their_own(kind):
    models = [made(kind), made(kind)]
    before = {n: p.clone() for n, p in models[0].named_parameters()}
    for model, memory in zip(models, (1.0, 4.0)):
        trainer = Trainer(model, weight_decay=0.0)
        trainer.forward_backward([pack(documents())], next_token)
        trainer.step(1e-3, memory)
    for (name, slow), fast in zip(models[0].named_parameters(), models[1].parameters()):
        if "values.weight" in name:
            moved = slow != before[name]
            assert moved.any() and not moved.all()  # the rows that were looked up
            torch.testing.assert_close((fast - before[name])[moved], 4 * (slow - before[name])[moved], rtol=2e-3, atol=1e-7)
            assert torch.equal(fast[~moved], before[name][~moved])
        else:
            assert torch.equal(slow, fast), name


@pytest.mark.parametrize(("kind", "dtype"), [("ultramem", torch.bfloat16), ("ultramem_v2", torch.float32), ("mixture", torch.bfloat16)])
def test_a_continued_training_is_the_uninterrupted_one(kind, dtype, tmp_path):
    through, first = (Trainer(made(kind, dtype)) for _ in range(2))
    train(through, range(4))
    train(first, range(2))
    first.save(tmp_path, {})
    second = Trainer(made(kind, dtype, seed=9))
    train(second, range(50, 51))  # whatever it did before
    second.load(tmp_path)
    assert_same(everything(second), everything(first))
    train(second, range(2, 4))
    assert_same(everything(second), everything(through))
    assert {n.rpartition(".")[2] for n in everything(through)} >= {"u", "v", "shuffle_index"}


@pytest.mark.parametrize("kind", ["mixture", "ultramem_v2"])
def test_recomputed_activations_change_nothing(kind):
    plain, again = Trainer(made(kind)), Trainer(made(kind), recompute=True)
    for trainer in (plain, again):
        train(trainer, range(1))
    assert_same(everything(again), everything(plain))


@pytest.mark.slow  # half a minute of C++ compilers
@pytest.mark.parametrize("kind", ["ultramem", "ultramem_v2"])
def test_compiled_layers_say_the_same(kind, assert_close):
    plain, compiled = Trainer(made(kind)), Trainer(made(kind), compile=True)
    for trainer in (plain, compiled):
        trainer.forward_backward([pack(documents())], next_token)
    for name, ours, theirs in zip(plain.optimizer.names, compiled.optimizer.gradients, plain.optimizer.gradients):
        assert_close(ours.to_dense(), theirs.to_dense(), 1e-4, message=name)


@pytest.mark.parametrize("kind", ["ultramem", "ultramem_v2"])
def test_values_alone_can_learn(kind):
    model, batch = made(kind), [pack(documents())]
    model.lm_head.weight.data *= 10
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("memory.values" in name)
    trainer, losses = Trainer(model), []
    for _ in range(8):
        losses.append(trainer.forward_backward(batch, next_token).loss)
        trainer.step(5e-2, memory=4.0)
    assert losses[-1] < 0.5 * losses[0], losses


# --- folders ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_gives_back_the_model(kind, dtype, tmp_path):
    model = made(kind, dtype)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model", dtype=dtype)
    assert again.config == model.config
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["model_type"], written["base_model_type"]) == ("jevons_memory", model.config.model_type)
    tokens, attend = torch.arange(12), Packed(torch.tensor([0, 12]))
    assert torch.equal(again(tokens, tokens, attend).hidden_TD, model(tokens, tokens, attend).hidden_TD)


def test_a_shuffle_that_leads_outside_the_table_is_refused(tmp_path):
    save_model(frozen("ultramem"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.memory.shuffle_index"][3] = 256
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.memory\.shuffle_index: has entries outside 0 to 255"):
        load_model(tmp_path / "model")


def test_config_json_without_its_family():
    written = to_hf(CONFIGS["ultramem"])
    assert from_hf(written) == CONFIGS["ultramem"]
    with pytest.raises(ValueError, match="unknown base_model_type 'gpt2'"):
        from_hf(written | {"base_model_type": "gpt2"})
    with pytest.raises(ValueError, match="unknown base_model_type None"):
        from_hf({k: v for k, v in written.items() if k != "base_model_type"})
    with pytest.raises(ValueError, match="missing field 'memory_layers'"):
        from_hf({k: v for k, v in written.items() if k != "memory_layers"})


def test_other_programs_refuse_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(frozen("mixture"), tmp_path / "model")
    with pytest.raises(ValueError, match="jevons_memory"):
        transformers.AutoConfig.from_pretrained(tmp_path / "model")


# --- sampling ---


@pytest.mark.parametrize("use_native", [False, pytest.param(True, marks=WITH_NATIVE)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_sampled_is_what_the_trainer_scores(kind, use_native):
    model = frozen(kind)
    prompts = [[3, 5, 7, 9, 11], [1, 2], list(range(20, 40))]
    engine = Engine(model, use_native=use_native, block_size=4)
    samples = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0.8, seed=1))
    for prompt, sample in zip(prompts, samples):
        tokens = torch.tensor([*prompt, *sample.tokens])
        hidden = model(tokens, torch.arange(len(tokens)), Packed(torch.tensor([0, len(tokens)]))).hidden_TD
        logps = model.logits(hidden).log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.raw_logps), logps, rtol=1e-4, atol=1e-4)


@WITH_NATIVE
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_weights_keep_their_memory(kind):
    model = made(kind).requires_grad_(False)
    pack_model(model, "fp32")
    params = SamplingParams(max_tokens=12, temperature=0)
    ours, theirs = (Engine(m).generate([[3, 5, 7, 9]], params)[0] for m in (model, frozen(kind)))
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(torch.tensor(ours.raw_logps), torch.tensor(theirs.raw_logps), rtol=1e-4, atol=1e-4)
