"""Training: accumulation equals the large batch, masters equal fp32, a saved step is the same step, goldens of balancing and schedules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from jevons.data.batch import Batch, mtp_targets, pack
from jevons.data.shard import write_shards
from jevons.data.text import Document
from jevons.data.tokenizer import train_bpe
from jevons.kernels.cross_entropy import cross_entropy_ref
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.folder import load_model, save_model
from jevons.model.moe import Router, Routing
from jevons.model.transformer import Transformer
from jevons.train import checkpoint, device
from jevons.train.balance import max_violation, sequence_loss, update_bias
from jevons.train.corpus import Corpus, validation_loss
from jevons.train.loss import Loss, next_token
from jevons.train.optimizer import Optimizer
from jevons.train.schedule import Phase, Schedule, build
from jevons.train.trainer import Trainer

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    num_nextn_predict_layers=2,
    max_position_embeddings=128,
)


def make(dtype=torch.float32, seed=0, **changes) -> Transformer:
    model = Transformer(replace(CONFIG, **changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    model = model.to(dtype)
    for gate in model.routers.values():
        gate.e_score_correction_bias = torch.zeros(CONFIG.n_routed_experts)
    return model


def documents(lengths, seed=0, weights=True):
    generator = torch.Generator().manual_seed(seed)
    draw = [(torch.randint(61, (n,), generator=generator), torch.rand(n, generator=generator) if weights else None) for n in lengths]
    return draw


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that the next step depends on."""
    return {k: v.clone() for k, v in (dict(trainer.weights()) | trainer.optimizer.state()).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def train(trainer: Trainer, steps: range, lr=1e-2) -> None:
    for step in steps:
        trainer.forward_backward([pack(documents([9, 20, 3], seed=step)), pack(documents([30], seed=100 + step))], next_token)
        trainer.step(lr)


# --- gradients ---


def test_micro_batches_equal_one_large_batch(assert_close):
    # segments of every length, weights of every size, all three terms of the objective, made large enough to be seen
    docs = documents([5, 1, 17, 30, 2, 8, 40])
    whole, parts = (Trainer(make(initializer_range=0.2), mtp_weight=0.7, balance_weight=0.1) for _ in range(2))
    large = whole.forward_backward([pack(docs)], next_token)
    small = parts.forward_backward([pack(docs[:1]), pack(docs[1:5]), pack(docs[5:])], next_token)
    for name, a, b in zip(whole.optimizer.names, parts.optimizer.gradients, whole.optimizer.gradients):
        assert_close(a, b, message=name)
    for key in ("loss", "mtp_loss", "balance_loss", "tokens"):
        assert getattr(small, key) == pytest.approx(getattr(large, key), rel=1e-5)
    assert {k: v.tolist() for k, v in small.loads.items()} == {k: v.tolist() for k, v in large.loads.items()}
    assert list(large.loads) == [1, 2, 3]  # the sparse layer and both MTP modules
    assert large.mtp_loss and large.balance_loss


def test_objective_written_out(assert_close):
    # main mean + lambda / D * sum of MTP means + alpha * balance a token, each divided by its own weights of the whole step
    batches = [pack(documents([12, 7], seed=1)), pack(documents([30], seed=2))]
    trainer, model = Trainer(make(), mtp_weight=0.3, balance_weight=0.01), make()
    metrics = trainer.forward_backward(batches, next_token)
    main = mtp = balance = torch.zeros(())
    for batch in batches:
        attend = Packed(batch.cu_seqlens)
        output = model(batch.tokens_T, batch.positions_T, attend)
        hidden, following, routing = output.hidden_TD, batch.targets_T, list(output.routing)
        main = main + cross_entropy_ref(hidden, model.lm_head.weight, batch.targets_T, batch.weights_T)[0]
        for d in range(2):
            targets, weights = mtp_targets(batch, d + 1)
            module = model.mtp(hidden, following, batch.positions_T, attend, d)
            hidden, following, routing = module.hidden_TD, targets, [*routing, *module.routing]
            mtp = mtp + cross_entropy_ref(hidden, model.lm_head.weight, targets, weights)[0]
        balance = balance + sum(sequence_loss(r, batch.cu_seqlens) for r in routing)
    weights = sum(b.weights_T.sum() for b in batches)
    mtp_weights = sum(mtp_targets(b, d)[1].sum() for b in batches for d in (1, 2)) / 2
    loss = main / weights + 0.3 / 2 * mtp / mtp_weights + 0.01 * balance / 49
    loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), trainer.optimizer.gradients):
        assert_close(torch.zeros_like(gradient) if parameter.grad is None else parameter.grad, gradient, message=name)
    assert metrics.loss == pytest.approx((main / weights).item(), rel=1e-6)
    assert metrics.mtp_loss == pytest.approx((mtp / mtp_weights).item() / 2, rel=1e-6)


def test_weights_count_tokens_not_micro_batches():
    # a mean of means would be (1 + 5) / 2; weighted by tokens it is (1 * 1 + 3 * 5) / 4
    def constant(hidden_TD, head_WD, batch):
        nll_T = torch.full_like(batch.weights_T, 1.0 if batch.num_tokens == 2 else 5.0)
        return Loss((nll_T * batch.weights_T).sum() + 0 * hidden_TD.sum() + 0 * head_WD.sum(), nll_T)

    trainer = Trainer(make(), mtp_weight=0.0, balance_weight=0.0)
    one, three = torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert trainer.forward_backward([pack([(one, None)]), pack([(three, None)])], constant).loss == 4.0


def test_recomputed_gradients_are_the_same():
    gradients = []
    for recompute in (False, True):
        trainer = Trainer(make(), recompute=recompute)
        loads = trainer.forward_backward([pack(documents([20, 11]))], next_token).loads
        gradients.append(dict(zip(trainer.optimizer.names, trainer.optimizer.gradients)) | {str(k): v for k, v in loads.items()})
    assert_same(*gradients)


@pytest.mark.slow
def test_compiled_gradients_are_the_same(assert_close):
    dense = {"n_routed_experts": 0, "num_nextn_predict_layers": 0}  # torch 2.13 compiles grouped products in bf16 only
    plain, compiled = Trainer(make(**dense)), Trainer(make(**dense), compile=True)
    for trainer in (plain, compiled):
        trainer.forward_backward([pack(documents([20, 11])), pack(documents([9], seed=1))], next_token)
    for name, a, b in zip(plain.optimizer.names, compiled.optimizer.gradients, plain.optimizer.gradients):
        assert_close(a, b, message=name)


# --- the optimizer ---


def linear(dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(7, 5).to(torch.bfloat16).to(dtype)  # the same start in both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_on_masters_is_adamw_in_fp32(dtype, assert_close):
    ours, theirs = linear(dtype), linear(torch.float32)
    optimizer = Optimizer(ours, betas=(0.8, 0.9), weight_decay=0.5, clip=1.0)
    groups = [{"params": [theirs.weight], "weight_decay": 0.5}, {"params": [theirs.bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-8)
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        lr = 1e-5 * (step + 1)  # far below a bf16 rounding of the weights: without masters nothing would move
        for micro in range(2):
            for a, b in zip(ours.parameters(), theirs.parameters()):
                gradient = torch.randn(a.shape, generator=generator).to(dtype)
                a.grad = gradient
                b.grad = gradient.float() if micro == 0 else b.grad + gradient.float()
            optimizer.accumulate()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert float(optimizer.gradient_norm()) == pytest.approx(float(norm), rel=1e-6)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        optimizer.step(lr, optimizer.gradient_norm())
    for parameter, master, expected in zip(ours.parameters(), optimizer.masters, theirs.parameters()):
        assert_close(master.detach(), expected.detach(), 1e-7)
        assert torch.equal(parameter, master.to(dtype)) and not parameter.grad
    assert not torch.equal(optimizer.masters[0], linear(torch.float32).weight)


def test_clipping_only_shortens():
    def moved(clip: float, scale: float) -> torch.Tensor:
        model = linear(torch.float32)
        optimizer = Optimizer(model, clip=clip)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        optimizer.accumulate()
        norm = optimizer.gradient_norm()
        optimizer.step(0.0, norm)
        assert float(norm) == pytest.approx(scale * math.sqrt(40))  # before clipping
        return optimizer.state()["exp_avg.weight"] / (1 - 0.9)  # the clipped gradient

    expected = torch.full((5, 7), 2.0 / math.sqrt(40))
    torch.testing.assert_close(moved(2.0, 3.0), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(moved(2.0, 0.1), torch.full((5, 7), 0.1), rtol=1e-5, atol=0)
    torch.testing.assert_close(moved(0.0, 3.0), torch.full((5, 7), 3.0), rtol=1e-5, atol=0)


# --- balancing ---


def router(experts=4, chosen=2, **changes) -> Router:
    made = Router(replace(CONFIG, n_routed_experts=experts, num_experts_per_tok=chosen, **changes), layer=0)
    torch.nn.init.zeros_(made.weight)
    return made


def test_bias_golden():
    gate = router()
    update_bias(gate, torch.tensor([10, 0, 5, 5]), 0.001)
    assert gate.e_score_correction_bias is not None
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.0])
    plain = router(scoring_func="softmax", topk_method="greedy")
    update_bias(plain, torch.tensor([10, 0, 5, 5]), 0.001)
    assert plain.e_score_correction_bias is None


def test_sequence_loss_golden(assert_close):
    scores_TE = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.8, 0.7, 0.1, 0.1], [0.6, 0.5, 0.4, 0.3]])
    routing = Routing(0, scores_TE.topk(2).indices, scores_TE.topk(2).values, scores_TE)
    frequency, probability = torch.tensor([2, 4 / 3, 0, 2 / 3]), (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(probability, torch.tensor([0.4680, 0.2521, 0.1381, 0.1418]), rtol=0, atol=5e-5)
    loss = sequence_loss(routing, torch.tensor([0, 3])) / 3
    assert float(loss) == pytest.approx(1.3666, abs=5e-5) and float(frequency @ probability) == pytest.approx(1.3666, abs=5e-5)
    # two sequences: each counts by its tokens
    twice = Routing(0, *(torch.cat([x, x]) for x in routing[1:]))
    assert_close(sequence_loss(twice, torch.tensor([0, 3, 6])), 6 * loss)


def test_bias_balances_a_skewed_router():
    generator = torch.Generator().manual_seed(0)
    gate = router(experts=8)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) * 0.05)
        gate.weight[:, 0] = torch.linspace(-1, 1, 8)  # and a feature that is always on: the last experts win

    def loads() -> torch.Tensor:
        x_TD = torch.randn(512, 32, generator=generator)
        x_TD[:, 0] = 1.0
        return gate(x_TD).loads_E()

    assert float(max_violation(loads())) > 1.5
    for _ in range(200):
        update_bias(gate, loads(), 0.005)
    assert float(max_violation(sum(loads() for _ in range(8)))) < 0.5


@pytest.mark.parametrize("speed", [0.0, 0.25])
def test_bias_moves_by_its_speed_after_a_step(speed):
    trainer = Trainer(make(), bias_speed=speed)
    metrics = trainer.forward_backward([pack(documents([40])), pack(documents([25], seed=1))], next_token)
    assert all(not r.e_score_correction_bias.any() for r in trainer.model.routers.values())  # not before the step
    trainer.step(1e-3)
    for layer, gate in trainer.model.routers.items():
        loads = metrics.loads[layer].float()
        assert loads.sum() == 2 * 65
        assert torch.equal(gate.e_score_correction_bias, speed * (loads.mean() - loads).sign())


# --- schedules ---


def test_deepseek_v3_schedule():
    trillion = 1e12
    phases = (
        Phase(0.01 * trillion, 0.0, 2.2e-4),
        Phase(9.99 * trillion, 2.2e-4, 2.2e-4),
        Phase(4.3 * trillion, 2.2e-4, 2.2e-5, "cosine"),
        Phase(0.333 * trillion, 2.2e-5, 2.2e-5),
        Phase(0.167 * trillion, 7.3e-6, 7.3e-6),
    )
    points = {0: 0.0, 0.005: 1.1e-4, 5: 2.2e-4, 12.15: 1.21e-4, 14.4: 2.2e-5, 14.7: 7.3e-6, 20: 7.3e-6}
    for position, expected in points.items():
        assert Schedule(phases).at(position * trillion) == pytest.approx(expected), position


def test_built_schedules():
    cosine = build("cosine", peak=1.0, steps=110, warmup=10, minimum=0.1, decay=0)
    assert [cosine.at(i) for i in (0, 4, 10, 60, 110, 500)] == pytest.approx([1 / 11, 5 / 11, 1.0, 0.55, 0.1, 0.1])
    wsd = build("wsd", peak=1.0, steps=100, warmup=0, minimum=0.0, decay=20)
    assert [wsd.at(i) for i in (0, 79, 80, 90, 99, 100)] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.05, 0.0])
    constant = build("constant", peak=2.0, steps=5, warmup=3, minimum=0.0, decay=0)
    assert [constant.at(i) for i in range(6)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    only_decay = build("wsd", peak=1.0, steps=10, warmup=2, minimum=0.0, decay=8)
    assert [only_decay.at(i) for i in (2, 6, 10)] == pytest.approx([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="warmup_steps: 10 must be less than steps 10"):
        build("cosine", peak=1.0, steps=10, warmup=10, minimum=0.0, decay=0)
    with pytest.raises(ValueError, match="decay_steps: must be between 1 and steps - warmup_steps = 8"):
        build("wsd", peak=1.0, steps=10, warmup=2, minimum=0.0, decay=9)


# --- what is learned ---


@pytest.mark.slow
def test_multi_token_prediction_learns():
    # a Markov chain over 61 tokens whose next token is certain: the token after the next is certain too
    order = torch.randperm(61, generator=torch.Generator().manual_seed(0))

    def batch(step: int) -> Batch:
        tokens = torch.randint(61, (4, 1), generator=torch.Generator().manual_seed(step))
        for _ in range(31):
            tokens = torch.cat([tokens, order[tokens[:, -1:]]], 1)
        return pack([(row, None) for row in tokens])

    trainer = Trainer(make(num_nextn_predict_layers=1))
    history = []
    for step in range(60):
        history.append(trainer.forward_backward([batch(step)], next_token))
        trainer.step(1e-2)
    first, last = history[0], history[-1]
    assert first.mtp_loss == pytest.approx(math.log(61), rel=0.05) and last.mtp_loss < 0.3 * first.mtp_loss
    assert last.loss < 0.2 * first.loss
    # without its weight the modules are not trained, nor measured
    idle = Trainer(make(num_nextn_predict_layers=1), mtp_weight=0.0)
    assert idle.forward_backward([batch(0)], next_token).mtp_loss is None
    assert not any(g.any() for name, g in zip(idle.optimizer.names, idle.optimizer.gradients) if ".layers.2." in name)


def test_validation_by_hand(tmp_path):
    texts = [f"{a} and {b} make {a + b}." for a in range(12) for b in range(12)]
    tokenizer = train_bpe(texts, 300)
    tokenizer.save(tmp_path / "tokenizer")
    for split in ("train", "validation"):
        source = (Document(text, None, split, i) for i, text in enumerate(texts if split == "train" else texts[7::9]))
        write_shards(source, tmp_path / "tokenizer", tmp_path / split, source={})
    corpus = Corpus.open(tmp_path, tokenizer, sequence_length=32, split_documents=True, seed=0)
    model = make(vocab_size=320, initializer_range=0.3)
    loss, bits = validation_loss(model, corpus, 10_000)

    stream = [i for text in texts[7::9] for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    windows = [stream[i : i + 33] for i in range(0, len(stream) - 32, 32)]
    nats, targets = 0.0, []
    for window in windows:
        start = 0
        while start < 32:  # a document at a time, as if nothing stood before it
            stop = next((i for i in range(start, 32) if window[i] == tokenizer.eos_id), 32)
            part = torch.tensor(window[start : stop + 1])
            start = stop + 1
            if len(part) < 2:
                continue
            hidden_TD = model(part[:-1], torch.arange(len(part) - 1), Packed(torch.tensor([0, len(part) - 1]))).hidden_TD
            nats += F.cross_entropy(model.logits(hidden_TD), part[1:], reduction="sum").item()
            targets += part[1:].tolist()
    letters = len(tokenizer.decode(targets, skip_special=True))  # ASCII: a letter is a byte
    assert loss == pytest.approx(nats / len(targets), rel=1e-5)
    assert bits == pytest.approx(nats / math.log(2) / letters, rel=1e-5)
    assert len(windows) == corpus.validation.num_windows
    # the same every time, and fewer windows are a beginning of more
    assert validation_loss(model, corpus, 10_000) == (loss, bits) != validation_loss(model, corpus, 1)


def test_short_validation_shrinks_its_window(tmp_path):
    tokenizer = train_bpe(["abc"], 300)
    tokenizer.save(tmp_path / "tokenizer")
    for split, text in (("train", "abc " * 100), ("validation", "abc abc")):
        write_shards([Document(text, None, split, 1)], tmp_path / "tokenizer", tmp_path / split, source={})
    corpus = Corpus.open(tmp_path, tokenizer, sequence_length=64, split_documents=True, seed=0)
    assert corpus.validation.sequence_length == corpus.validation.shards.num_tokens - 1 < 64 and corpus.validation.num_windows == 1
    with pytest.raises(ValueError, match="fewer than one window"):
        Corpus.open(tmp_path, tokenizer, sequence_length=10_000, split_documents=True, seed=0)


# --- what must not happen ---


def broken(hidden_TD, head_WD, batch):
    loss = next_token(hidden_TD, head_WD, batch)
    return Loss(loss.total * math.nan, loss.nll_T) if batch.num_tokens == 7 else loss


def steep(hidden_TD, head_WD, batch):
    return Loss((hidden_TD - hidden_TD.detach()).sum().sqrt() + 1.0, batch.weights_T)  # finite, of infinite slope


def test_a_loss_that_is_not_finite_changes_nothing():
    trainer, clean = (Trainer(make()) for _ in range(2))
    train(trainer, range(2))
    train(clean, range(2))
    before = everything(trainer)
    good, bad = pack(documents([20])), pack(documents([7]))
    with pytest.raises(FloatingPointError, match="micro-batch 1 is nan"):
        trainer.forward_backward([good, bad, good], broken)
    assert_same(everything(trainer), before)
    assert trainer.forward_backward([good], steep).loss > 0
    with pytest.raises(FloatingPointError, match=r"gradient norm is (nan|inf)"):
        trainer.step(1e-2)
    assert_same(everything(trainer), before)
    # and nothing of it is left for the next step
    train(trainer, range(2, 4))
    train(clean, range(2, 4))
    assert_same(everything(trainer), everything(clean))


# --- saving ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_continued_training_is_the_uninterrupted_one(dtype, tmp_path):
    through, first = (Trainer(make(dtype), bias_speed=0.01) for _ in range(2))
    train(through, range(6))
    train(first, range(3))
    first.save(tmp_path / "trainer", {"step": 3, "tokens": 186})
    second = Trainer(make(dtype, seed=9), bias_speed=0.01)
    train(second, range(50, 52))  # whatever it did before
    assert second.load(tmp_path / "trainer") == {"step": 3, "tokens": 186}
    assert_same(everything(second), everything(first))
    train(second, range(3, 6))
    assert_same(everything(second), everything(through))
    assert any(r.e_score_correction_bias.any() for r in second.model.routers.values())


def test_random_state_continues(tmp_path):
    trainer = Trainer(make())
    trainer.save(tmp_path, {})
    expected = torch.rand(3)
    torch.rand(7)
    trainer.load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_checkpoints(tmp_path):
    trainer = Trainer(make(torch.bfloat16))
    assert checkpoint.newest(tmp_path) is None
    for step in (2, 4, 10):
        train(trainer, range(step, step + 1))
        checkpoint.save(tmp_path, step, trainer, {"tokens": 7 * step}, companions=[], keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]
    (tmp_path / "step-00000012").mkdir()  # half deleted, or not ours: without progress it does not count
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.name == "step-00000010"
    other = Trainer(make(torch.bfloat16, seed=1))
    assert checkpoint.load(found, other) == {"step": 10, "tokens": 70}
    assert_same(everything(other), everything(trainer))
    # it is a Hugging Face folder as well
    assert_same(dict(load_model(found).state_dict()), dict(trainer.weights()))


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    Trainer(make(num_nextn_predict_layers=0)).save(tmp_path, {})
    with pytest.raises(ValueError, match=r"lacks optimizer state for: model\.layers\.2\..*, model\.layers\.3\."):
        Trainer(make()).load(tmp_path)


def test_router_biases_stay_fp32_in_a_bf16_model(tmp_path):
    # steps of 0.001 vanish beside 1 in bf16, so balancing would stop
    trainer = Trainer(make(torch.bfloat16), bias_speed=1e-3)
    with torch.no_grad():
        for gate in trainer.model.routers.values():
            gate.e_score_correction_bias += 1.0
    train(trainer, range(1))
    trainer.save(tmp_path / "trainer", {})
    save_model(trainer.model, tmp_path / "model")
    again = Trainer(make(torch.bfloat16, seed=2))
    again.load(tmp_path / "trainer")
    for model in (trainer.model, again.model, load_model(tmp_path / "model", dtype=torch.bfloat16)):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        for layer, gate in model.routers.items():
            assert gate.e_score_correction_bias.dtype == torch.float32
            assert torch.equal(gate.e_score_correction_bias, trainer.model.routers[layer].e_score_correction_bias)
            moved = (gate.e_score_correction_bias - 1).abs()
            assert moved.max() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("multiplies", "native_kernels"), [(True, False), (False, True), (False, False)])
def test_what_only_samples_is_bf16_where_kernels_read_it(monkeypatch, multiplies, native_kernels):
    cpu, want = torch.device("cpu"), "bfloat16" if multiplies or native_kernels else "float32"
    monkeypatch.setattr(device.processor, "multiplies_bf16", lambda: multiplies)
    monkeypatch.setattr(device.native, "available", lambda: native_kernels)
    assert device.sampling_dtype(cpu) == want and device.best_dtype(cpu) == ("bfloat16" if multiplies else "float32")
