"""Cost: published counts exactly, published FLOPs closely, receipts that add up, a ledger that never counts twice."""

import io
import multiprocessing
import sqlite3
from datetime import UTC, datetime

import pytest
from rich.console import Console

from jevons.cost import arithmetic
from jevons.cost.arithmetic import parameters
from jevons.cost.hardware import peak_flops
from jevons.cost.ledger import Ledger
from jevons.cost.price import Prices
from jevons.cost.published import names, published, source
from jevons.cost.receipt import Plan, Receipt, format_amount, format_flops, format_seconds, render, total
from jevons.model.config import ModelConfig

V3, V2, V2_LITE = published("deepseek-v3"), published("deepseek-v2"), published("deepseek-v2-lite")
LLAMA_405B = published("llama-3.1-405b")
QWEN2_5 = {  # total, without embeddings, bytes of cache a token
    "qwen2.5-0.5b": (494_032_768, 357_898_112, 12_288),
    "qwen2.5-1.5b": (1_543_714_304, 1_310_340_608, 28_672),
    "qwen2.5-3b": (3_085_938_688, 2_774_773_760, 36_864),
    "qwen2.5-7b": (7_615_616_512, 6_525_621_760, 57_344),
    "qwen2.5-14b": (14_770_033_664, 13_212_898_304, 196_608),
    "qwen2.5-32b": (32_763_876_352, 31_206_740_992, 262_144),
    "qwen2.5-72b": (72_706_203_648, 70_214_787_072, 327_680),
}


def test_published_configurations():
    assert published("DeepSeek-V3") == V3 and set(QWEN2_5) < set(names())
    assert all(source(name) for name in names())
    with pytest.raises(ValueError, match=r"no published model 'deepseek-v3-lite'; did you mean deepseek-v2-lite\?"):
        published("deepseek-v3-lite")


def test_deepseek_v3_counts():
    counts = parameters(V3)
    assert counts.total == 671_026_404_352
    assert counts.buffers == 14_848
    assert counts.active == 37_552_297_472
    assert counts.active_without_embedding == 36_625_618_432
    assert counts.active_without_embedding - counts.head == 35_698_939_392
    assert counts.mtp == 11_610_068_224
    assert counts.total + counts.buffers + counts.mtp + 2 * counts.embedding == 684_489_845_504  # a checkpoint copies embedding and head
    assert arithmetic.attention_parameters(V3) == 187_107_328
    assert arithmetic.layer_parameters(V3, 3) == 11_507_286_272
    assert arithmetic.layer_parameters(V3, 3, active=True) == 585_318_656
    assert arithmetic.layer_parameters(V3, 2) == 583_483_392


def test_other_sparse_counts():
    assert (parameters(V2).total, parameters(V2).active, parameters(V2).buffers) == (235_741_434_880, 21_375_800_320, 0)
    lite = parameters(V2_LITE)
    assert (lite.total, lite.active, lite.active_without_embedding) == (15_706_484_224, 2_661_150_208, 2_451_435_008)
    assert parameters(published("qwen3-30b-a3b")).total == 30_532_122_624


@pytest.mark.parametrize("name", QWEN2_5)
def test_qwen2_5_counts(name):
    config, (whole, non_embedding, cache) = published(name), QWEN2_5[name]
    counts = parameters(config)
    assert (counts.total, counts.non_embedding, counts.active) == (whole, non_embedding, whole)
    assert counts.active_without_embedding == non_embedding + counts.embedding  # tied or not, the head is multiplied once
    assert arithmetic.cache_bytes_per_token(config) == cache


def test_cache_and_weight_bytes():
    assert [arithmetic.cache_bytes_per_token(c) for c in (V3, V2, V2_LITE, LLAMA_405B)] == [70_272, 69_120, 31_104, 516_096]
    assert parameters(LLAMA_405B).total == 405_853_388_800
    assert arithmetic.weight_bytes(published("qwen2.5-0.5b"), 0.5) == 494_032_768 / 2
    assert arithmetic.weight_bytes(V3, 1, mtp=True) - arithmetic.weight_bytes(V3, 1) == parameters(V3).mtp
    # one GPU of the 144 that decode V3 in FP8: all attention, its own dense layers, shared and two routed experts, head in bf16
    expert = arithmetic.swiglu_parameters(V3, 2048)
    resident = 61 * arithmetic.attention_parameters(V3) + 3 * arithmetic.swiglu_parameters(V3, 18432) + 58 * 3 * expert
    assert resident + 2 * parameters(V3).head == pytest.approx(22.1e9, rel=2e-3)


def test_published_train_flops():
    assert arithmetic.train_flops(V3, 4096, mtp=False) == pytest.approx(250.46e9, rel=1e-4)
    assert arithmetic.train_flops(V3, 8192, mtp=False) == pytest.approx(281.2e9, rel=1e-3)  # 4096 counted without the causal half
    assert arithmetic.train_flops(V3, 4096) - arithmetic.train_flops(V3, 4096, mtp=False) == pytest.approx(10.2e9, rel=2e-3)
    assert arithmetic.train_flops(V2, 4096) == pytest.approx(155e9, rel=5e-3)
    assert arithmetic.train_flops(V2, 4096) == 3 * arithmetic.forward_flops(V2, 2048)


def test_serving_flops():
    attention = 61 * 2 * 128 * (576 + 512) * 4989
    assert attention == pytest.approx(84.8e9, rel=1e-3)
    assert arithmetic.decode_flops(V3, 4989) == 2 * 36_625_618_432 + attention
    # published prefill throughput against this arithmetic: 4.03K computed tokens a second and GPU
    assert 4030 * arithmetic.forward_flops(V3, 2500) == pytest.approx(345e12, rel=5e-3)
    assert 4030 * arithmetic.forward_flops(V3, 5000) == pytest.approx(396e12, rel=5e-3)
    # expanding every latent at every step is what absorption saves
    assert arithmetic.decode_flops(V3, 4989, absorbed=False) > 20 * arithmetic.decode_flops(V3, 4989)
    dense = published("qwen2.5-7b")
    both = [arithmetic.decode_flops(dense, 100, absorbed=absorbed) for absorbed in (True, False)]
    assert both == [arithmetic.forward_flops(dense, 100)] * 2


def test_prefill_flops_add_up_over_the_cache():
    head = 2 * V2_LITE.vocab_size * V2_LITE.hidden_size
    whole = arithmetic.prefill_flops(V2_LITE, 1000)
    assert whole == pytest.approx(arithmetic.prefill_flops(V2_LITE, 400) + arithmetic.prefill_flops(V2_LITE, 1000, cached=400) - head)
    with pytest.raises(ValueError, match="cached"):
        arithmetic.prefill_flops(V2_LITE, 10, cached=10)


def test_biases_and_norms_are_counted():
    small = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}

    def attention(**fields):
        return arithmetic.attention_parameters(ModelConfig(**small, **fields))

    assert attention(model_type="llama") == 8 * (8 + 4 + 4 + 8)
    assert attention(model_type="llama", attention_bias=True) - attention(model_type="llama") == 8 + 4 + 4 + 8
    assert attention(model_type="qwen2") - attention(model_type="llama") == 8 + 4 + 4
    assert attention(model_type="qwen3") - attention(model_type="llama") == 2 * 2
    mla = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
    assert attention(**mla, attention_bias=True) - attention(**mla) == (6 + 2) + 8
    assert attention(**mla, q_lora_rank=5, attention_bias=True) - attention(**mla, q_lora_rank=5) == 5 + (6 + 2) + 8
    llama = ModelConfig(**small, model_type="llama", mlp_bias=True)
    assert arithmetic.swiglu_parameters(llama, 12) == 3 * 8 * 12 + 12 + 12 + 8


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989.5e12
    assert peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_flops("AMD EPYC 9654") is None


def receipt(**fields):
    return Receipt(**{"run_id": "a1", "run": "tiny", "stage": "pretrain", "device": "cpu", **fields})


def test_receipt_reproduces_the_published_cost_of_v3():
    flops = 14.8e12 * arithmetic.train_flops(V3, 4096, mtp=False)
    seconds = 2.664e6 * 3600 / 2048
    pretrain = receipt(
        device="H800", device_count=2048, tokens=14_800_000_000_000, flops=flops, seconds=seconds, peak_flops=989.5e12, price_per_hour=2.0
    )
    assert pretrain.tflops == pytest.approx(386.5, rel=1e-3)
    assert pretrain.share_of_peak == pytest.approx(0.391, abs=5e-4)
    hours = {"context": 119e3, "post": 5e3}
    rest = [receipt(stage=s, device_count=2048, seconds=h * 3600 / 2048, price_per_hour=2.0) for s, h in hours.items()]
    totals = total([pretrain, *rest])
    assert (totals.device_hours, totals.money) == (pytest.approx(2.788e6), pytest.approx(5.576e6))
    assert receipt(device_count=16, seconds=26 * 60).device_hours == pytest.approx(6.93, abs=5e-3)  # s1


def test_receipt_round_trip_and_empty():
    plan = Plan(9, 1e9, 3.0, 0.1)
    full = receipt(tokens=5, flops=2.5e9, seconds=2.0, peak_flops=1e12, price_per_hour=0.5, started=1.0, finished=4.0, planned=plan)
    assert Receipt.from_dict(full.to_dict()) == full
    empty = receipt()
    assert Receipt.from_dict(empty.to_dict()) == empty
    assert (empty.tokens_per_second, empty.tflops, empty.share_of_peak, empty.money) == (0, 0, None, 0)
    with pytest.raises(ValueError, match="colour"):
        Receipt.from_dict({**empty.to_dict(), "colour": "red"})


def test_render():
    plan = Plan(1_000_000, 2e12, 90.0, 0.009)
    rows = [
        receipt(tokens=1_234_567, flops=3e12, seconds=100.0, peak_flops=1e11, price_per_hour=1.08, planned=plan),
        receipt(stage="rl", tokens=1000, seconds=20.0),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(rows))
    text = console.export_text()
    parts = "tiny on cpu|1.23M|pretrain|12,346|0.0300|30.0%|1m 40s|3.00 T|planned|1.00M|0.0090|1.24M|2m 00s"
    assert [part for part in parts.split("|") if part not in text] == []
    console.print(render([]))
    assert [format_amount(v) for v in (0, 0.00004321, 0.01234, 5576000.0)] == ["0.00", "0.000043", "0.0123", "5,576,000.00"]
    assert [format_seconds(v) for v in (4.24, 59.99, 185, 7620, 4_683_600)] == ["4.2s", "1m 00s", "3m 05s", "2h 07m", "54d 05h"]
    assert [format_flops(v) for v in (0, 5e5, 250.46e9, 3.71e24)] == ["0 FLOP", "500,000 FLOP", "250.46 GFLOP", "3.71 YFLOP"]


def test_ledger_never_counts_twice(ledger_url):
    ledger = Ledger(ledger_url)
    first = receipt(tokens=10, seconds=1.0, price_per_hour=3600.0, started=2.0)
    for _ in range(3):
        ledger.record(first)
    last = receipt(tokens=30, seconds=3.0, price_per_hour=3600.0, started=2.0, finished=9.0, planned=Plan(30, 1.0, 3.0, 3.0))
    ledger.record(last)
    other = receipt(run_id="b2", tokens=5, started=1.0)
    ledger.record(other)
    assert ledger.rows() == [other, last]
    assert ledger.rows("tiny") == [other, last] and ledger.rows("b2") == [other] and ledger.rows("none") == []
    mine = total(ledger.rows("a1"))
    assert (total(ledger.rows()).tokens, mine.money, mine.stages) == (35, 3.0, 1)
    ledger.close()
    again = Ledger(ledger_url)
    again.record(first)
    assert again.rows("a1") == [first]  # a plan that is gone is gone
    again.close()


def _record_many(url, worker):
    ledger = Ledger(url)
    for tokens in range(20):
        ledger.record(receipt(run_id="shared", tokens=tokens))
        ledger.record(receipt(run_id=f"own{worker}", tokens=tokens, seconds=1.0))
    ledger.close()


def test_ledger_takes_concurrent_writers(ledger_url):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_record_many, args=(ledger_url, worker)) for worker in range(3)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [0, 0, 0]
    ledger = Ledger(ledger_url)
    assert {row.run_id: row.tokens for row in ledger.rows()} == {"shared": 19, "own0": 19, "own1": 19, "own2": 19}
    ledger.close()


def test_ledger_file_is_made_and_synced_at_every_commit(tmp_path):
    ledger = Ledger(tmp_path / "new" / "ledger.db")
    with ledger.engine.connect() as connection:
        assert [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")] == ["wal", 2]
    ledger.close()


def test_ledger_refuses_other_files(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be taken for one " * 10)
    with pytest.raises(ValueError, match=r"notes\.txt: not a ledger"):
        Ledger(text)
    with pytest.raises(ValueError, match=r"not a ledger \(unable to open"):
        Ledger(tmp_path)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE receipts (shop TEXT)")
    with pytest.raises(ValueError, match=r"other\.db: not a ledger .* lacks .*run_id"):
        Ledger(other)
    with pytest.raises(ValueError, match=r"host.*cannot open the ledger") as caught:
        Ledger("postgresql://user:secret@/x?host=/nowhere")
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="no driver for nonsense"):
        Ledger("nonsense://here")
    with pytest.raises(ValueError, match="not a database's URL") as caught:
        Ledger("postgresql://user:secret@host:port/x")
    assert "secret" not in str(caught.value)


def moment(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def cost(prices, model, when, prompt=3_000_000, cached=1_000_000, completion=1_000_000):
    return pytest.approx(prices.cost(model, prompt=prompt, cached=cached, completion=completion, when=moment(when)))


def test_prices_of_day_and_week():
    prices = Prices.load()
    low, high = 0.003 + 2 * 0.15 + 0.60, 0.006 + 2 * 0.30 + 1.20
    # 2026-11-25 is a Wednesday
    times = {"00:59": low, "01:00": high, "03:59": high, "04:00": low, "05:59": low, "06:00": high, "09:59": high, "10:00": low}
    assert [t for t, price in times.items() if cost(prices, "deepseek-flash", f"2026-11-25 {t}") != price] == []
    assert cost(prices, "deepseek-flash", "2026-11-25 02:00") == high and cost(prices, "deepseek-flash", "2026-11-27 02:00") == high
    assert cost(prices, "deepseek-flash", "2026-11-28 02:00") == low and cost(prices, "deepseek-flash", "2026-11-29 08:00") == low
    # a window that passes midnight
    day, night = 0.14 + 2 * 0.55 + 2.19, 0.035 + 2 * 0.135 + 0.55
    times = {"16:29": day, "16:30": night, "23:59": night, "00:00": night, "00:29": night, "00:30": day}
    assert [t for t, price in times.items() if cost(prices, "deepseek-reasoner", f"2025-03-05 {t}") != price] == []


def test_dated_prices():
    prices = Prices.load()
    assert cost(prices, "deepseek-chat", "2025-02-08 15:59") == 0.014 + 2 * 0.14 + 0.28
    assert cost(prices, "deepseek-chat", "2025-02-08 16:00") == 0.07 + 2 * 0.27 + 1.10
    assert cost(prices, "deepseek-chat", "2025-09-28 23:59") == 0.07 + 2 * 0.56 + 1.68
    assert cost(prices, "deepseek-chat", "2026-11-01 00:00") == 0.028 + 2 * 0.28 + 0.42
    with pytest.raises(ValueError, match="deepseek-flash has no price for 2026-09-09 23:59; its first is from 2026-09-10"):
        cost(prices, "deepseek-flash", "2026-09-09 23:59")
    with pytest.raises(ValueError, match="no model 'deepseek-flush'; did you mean deepseek-flash"):
        cost(prices, "deepseek-flush", "2026-11-01 00:00")
    # a day of DeepSeek's service, February 2025, at three of its own prices: published as 562,027 dollars at R1's
    traffic = {"prompt": 608_000_000_000, "cached": 342_000_000_000, "completion": 168_000_000_000}
    assert prices.cost("deepseek-reasoner", **traffic, when=moment("2025-02-20 00:00")) == pytest.approx(562_100)
    assert prices.cost("deepseek-chat", **traffic, when=moment("2025-02-01 00:00")) == pytest.approx(89_068)
    assert prices.cost("deepseek-chat", **traffic, when=moment("2025-02-20 00:00")) == pytest.approx(280_560)
    assert prices.cost("o1", prompt=0, cached=0, completion=10**6, when=moment("2025-02-01 00:00")) == 60


def test_own_prices(tmp_path):
    file = tmp_path / "prices.toml"
    entry = '[[model]]\nname = "mine"\nvalid_from = 2026-01-01\nhit = 1\nmiss = 2\noutput = 4\nsource = "us"\n'
    file.write_text("[local]\nprice_per_hour = 7.2\n" + entry)
    used = {"prompt": 1000, "cached": 500, "completion": 250, "device_seconds": 10.0, "when": moment("2026-11-25 00:00")}
    own = Prices.load(file)
    assert own.money("mine", **used) == pytest.approx((500 * 1 + 500 * 2 + 250 * 4) / 1e6)
    assert own.money("deepseek-chat", **used) == pytest.approx(10 / 3600 * 7.2)  # in the table, but not in the user's
    assert Prices.load(file, price_per_hour=36.0).money("other", **used) == pytest.approx(0.1)
    assert Prices.load().money("mine", **used) == pytest.approx(10 / 3600 * 0.10)
    # a user's entry joins those of the table
    file.write_text(entry.replace('"mine"', '"deepseek-flash"').replace("2026-01-01", "2026-11-20"))
    both = Prices.load(file)
    assert cost(both, "deepseek-flash", "2026-11-19 23:59") == 0.003 + 2 * 0.15 + 0.60
    assert cost(both, "deepseek-flash", "2026-11-20 00:00") == 1 + 2 * 2 + 4
    window = 'windows = [{ days = "Sat-Mon", times = ["22:00-00:00", "00:00-01:30"], hit = 0, miss = 0, output = 0 }]\n'
    file.write_text(entry + window)
    weekend = Prices.load(file)
    free = ["2026-11-28 22:00", "2026-11-30 23:59", "2026-11-30 01:29"]  # Saturday, Monday, Monday
    assert [cost(weekend, "mine", t) == 0 for t in [*free, "2026-11-28 21:59", "2026-12-01 00:00", "2026-11-27 23:00"]] == [True] * 3 + [
        False
    ] * 3
    for wrong, message in [
        (entry + "tax = 1\n", r"prices\.toml:\n  model\.0\.tax"),
        (entry.replace("miss = 2\n", ""), r"model\.0\.miss: Field required"),
        (entry.replace("hit = 1", "hit = -1"), r"model\.0\.hit"),
        (entry + window.replace("Sat-Mon", "Sat-Moon"), "'Sat-Moon' is not a day"),
        (entry + window.replace("01:30", "25:30"), r"windows\.0\.times.*is not a list of hours"),
        ("[[model", r"prices\.toml: "),
    ]:
        file.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            Prices.load(file)
    with pytest.raises(ValueError, match="price-per-hour: must not be negative"):
        Prices.load(price_per_hour=-1.0)
