"""Serving economics: DeepSeek's published day, its decode node and ISCA's communication floor come out of the arithmetic."""

from datetime import date

import pytest

from jevons.cost.arithmetic import cache_bytes_per_token, forward_flops, parameters
from jevons.cost.claim_serving import CACHED, COST, INPUT, OUTPUT
from jevons.cost.comparison import DAYTIME, Traffic, bills, compare, margin, own
from jevons.cost.deployment import FORMATS, Deployment, Layout, attention_intensity, exchange
from jevons.cost.hardware import Hardware, parse_cluster
from jevons.cost.price import Prices
from jevons.cost.profile import Entry, Profile, signature
from jevons.cost.published import names, published
from jevons.cost.serving import Request, fit, node_hours, price_per_million, quote
from jevons.model.config import ModelConfig

V3 = published("deepseek-v3")
HARDWARE = Hardware.load()
H800 = HARDWARE.device("H800")
DECODE = Deployment(V3, H800, Layout(data=144, expert=144), FORMATS["fp8"])  # open-infra-index, day 6: 18 nodes
PREFILL = Deployment(V3, H800, Layout(data=32, expert=32), FORMATS["fp8"])  # 4 nodes
CONTEXT = 4989
DAY = Traffic(INPUT, CACHED, OUTPUT)


def test_published_day():
    hours = node_hours(INPUT, OUTPUT, 73.7e3, 14.8e3)
    assert hours == pytest.approx(5444.7, abs=0.1) and hours == pytest.approx(226.75 * 24, rel=1e-3)
    assert price_per_million(8 * 2, 73.7e3) == pytest.approx(0.0603, abs=5e-5)
    assert price_per_million(8 * 2, 14.8e3) == pytest.approx(0.3003, abs=5e-5)


def test_decode_node():
    step = DECODE.decode(88 * 144, CONTEXT)
    assert step.weight_bytes == pytest.approx(22.1e9, rel=0.02)
    assert DECODE.weights - step.weight_bytes == pytest.approx(2 * 129280 * 7168)  # the input embedding is held, not read
    assert DECODE.cache_per_token == 70_272 and step.cache_bytes / 88 == pytest.approx(350.6e6, rel=1e-3)
    assert DECODE.crossover(CONTEXT) / 144 == pytest.approx(63, rel=0.02)
    assert DECODE.read_bytes(DECODE.crossover(CONTEXT)) == pytest.approx(DECODE.crossover(CONTEXT) / 144 * CONTEXT * 70_272)
    for batch, memory, compute in ((84, 15.4e-3, 13.4e-3), (92, 16.2e-3, 14.7e-3)):
        step = DECODE.decode(batch * 144, CONTEXT)
        assert (step.memory, step.compute) == (pytest.approx(memory, rel=0.01), pytest.approx(compute, rel=0.01))
        assert 0.045 <= step.seconds <= 0.050 and step.rate / 18 == pytest.approx(14.8e3, rel=0.01)  # a node, at the stated share
    # 80 GB less the weights, full to the brim: MLA's cache beside Llama-3.1-405B's
    room = 80e9 - step.weight_bytes
    assert room / (CONTEXT * 70_272) == pytest.approx(165, rel=0.01)
    assert int(room / (CONTEXT * cache_bytes_per_token(published("llama-3.1-405b")))) == 22


def test_attention_intensity():
    assert attention_intensity(V3) == pytest.approx(242, abs=0.5) and attention_intensity(V3, queries=2) == pytest.approx(484, abs=0.5)
    ridge = H800.peak["bf16"] / H800.bandwidth
    assert ridge == pytest.approx(295, abs=0.5) and attention_intensity(V3) < ridge < attention_intensity(V3, queries=2)
    assert attention_intensity(published("qwen2.5-72b")) == pytest.approx(8)  # heads that share a key and value: 64 / 8


def test_communication_floor():
    assert exchange(32, 9, 7000, 50e9) == pytest.approx(120.96e-6)
    floor = 2 * 61 * exchange(32, 9, 7000, 50e9)
    assert floor == pytest.approx(14.76e-3, rel=1e-3) and 1 / floor == pytest.approx(67, abs=1)
    assert exchange(32, 9, 7000, 900e9) == pytest.approx(6.72e-6)
    assert 2 * 61 * exchange(32, 9, 7000, 900e9) == pytest.approx(0.82e-3, rel=1e-2)
    # the same of a real step: 64 tokens a device, 8 of 256 experts, 58 sparse layers, 7,168 wide, 136 of 144 devices in other nodes
    assert DECODE.decode(64 * 144, CONTEXT).communication == pytest.approx(floor * 8 / 9 * 58 / 61 * 7168 / 7000 * 136 / 144)


def test_prefill_node():
    hit = 342 / 608
    computed = (1 - hit) * 73.7e3 / 8
    assert computed == pytest.approx(4.03e3, rel=0.01)
    for context, tflops in ((2500, 345), (5000, 396)):  # of mean context
        prompt = round(2 * context / (1 + hit))
        step = PREFILL.prefill(prompt, round(hit * prompt))
        assert computed * forward_flops(V3, context) / 1e12 == pytest.approx(tflops, rel=0.01)
        assert computed * step.flops / PREFILL.chunk / 1e12 == pytest.approx(tflops, rel=0.03)  # the head on the last token alone
        assert step.rate / 32 == pytest.approx(computed, rel=0.1)  # at the stated share


def test_quote_adds_up():
    request = Request(prompt=4600, cached=2600, output=800)
    day = quote(DECODE, request)
    assert day.price_output == pytest.approx(0.3003, rel=0.01) and day.time_per_token <= 0.05
    assert day.price_output == pytest.approx(price_per_million(144 * 2, day.tokens_per_second))
    parts = 2600 * day.price_cached + 2000 * day.price_input + 800 * day.price_output
    assert day.price_request * 1e6 == pytest.approx(parts)
    assert day.price_request * day.requests_per_second == pytest.approx(144 * 2 / 3600)
    mix = quote(PREFILL, request)
    mean = (342 * mix.price_cached + 266 * mix.price_input) / 608
    assert mean == pytest.approx(0.0603, rel=0.1)
    # every hour bought at another price, or at none
    assert quote(DECODE, request, price_per_hour=4).price_output == pytest.approx(2 * day.price_output)
    slower = quote(DECODE, request, slowest=0.035)
    assert slower.batch < day.batch and slower.price_output > day.price_output


def test_expected_experts():
    one = Deployment(published("deepseek-v2-lite"), H800)
    config = one.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 2 * 26  # of all layers, in bf16
    assert one.read_bytes(1) - one.read_bytes(0) == pytest.approx(6 * expert)
    assert one.read_bytes(2) - one.read_bytes(0) == pytest.approx((6 + 6 * 58 / 64) * expert)
    assert one.read_bytes(10**6) == pytest.approx(one.weights - 2 * config.vocab_size * config.hidden_size)
    sliced = Deployment(config, H800, Layout(tensor=8))
    dealt = Deployment(config, H800, Layout(tensor=8, expert=8))
    assert sliced.read_bytes(4) == pytest.approx(dealt.read_bytes(4)) and sliced.cache_per_token == one.cache_per_token
    assert Deployment(published("qwen2.5-7b"), H800, Layout(tensor=4)).cache_per_token == 57_344 / 4


def test_v3_needs_more_than_eight_times_80_gigabytes():
    request = Request(prompt=4000, cached=2000, output=1000)
    refused = fit(V3, parse_cluster("8xH100", HARDWARE), request, format="fp8", devices=HARDWARE.devices.values())
    assert refused.quote is None
    assert {("H200", 8, "fp8"), ("H100", 16, "fp8"), ("H800", 16, "fp8"), ("H100", 8, "int4")} <= {
        (q.device, q.devices, q.format) for q in refused.alternatives
    }
    assert str(refused).startswith("does not fit on 8 x H100, fp8, ") and "8 x H200 in fp8" in str(refused)
    prices = [q.price_request for q in refused.alternatives]
    assert prices == sorted(prices)
    # what it names does fit, and nothing smaller of the kind does
    assert (fits := fit(V3, parse_cluster("8xH200", HARDWARE), request, format="fp8")).quote in refused.alternatives
    assert fits.problem == "" and fits.alternatives == () and "sequences at once" in str(fits)
    assert fit(V3, parse_cluster("4xH200", HARDWARE), request, format="fp8").quote is None
    # a small model takes no slices: as many copies as devices
    small = fit(published("qwen2.5-0.5b"), parse_cluster("8xH100", HARDWARE), request)
    assert small.quote.layout == Layout(data=8)
    alone = fit(published("qwen2.5-0.5b"), parse_cluster("H100", HARDWARE), request).quote
    assert (alone.price_request, 8 * alone.sequences) == (pytest.approx(small.quote.price_request), small.quote.sequences)


def test_memory_layers():
    shape = {"model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    table = {"memory_keys": 64, "memory_key_dim": 16, "memory_value_dim": 32, "memory_top_k": 8}
    layers = ModelConfig(**shape, **table, memory_layers=("0:1", "2:3"))
    plain, memory = Deployment(ModelConfig(**shape), H800), Deployment(layers, H800)
    assert memory.weights == 2 * parameters(layers).total
    tables = 2 * 2 * 64 * 64 * 32
    searches = memory.weights - plain.weights - tables
    assert memory.read_bytes(0) - plain.read_bytes(0) == searches
    assert memory.read_bytes(1) - memory.read_bytes(0) == pytest.approx(2 * 2 * 2 * 8 * 32, rel=0.01)  # layers, bytes, heads, rows, width
    assert memory.read_bytes(10**6) - memory.read_bytes(0) == pytest.approx(tables)
    shared = ModelConfig(**shape, **table, memory_layers=("0:1", "2:3"), memory_version="ultramem_v2")
    assert Deployment(shared, H800).weights == 2 * parameters(shared).total


@pytest.mark.parametrize("name", names())
def test_weights_are_counted_once(name):
    config = published(name)
    counts = parameters(config)
    assert Deployment(config, H800).weights == 2 * (counts.total + counts.buffers)
    halves = Deployment(config, H800, Layout(tensor=2))
    assert 2 * halves.weights == pytest.approx(2 * counts.total, rel=0.01)


def test_refusals():
    with pytest.raises(ValueError, match="expert: must divide tensor x data = 12 and be a multiple of tensor 4, is 8"):
        Layout(tensor=4, data=3, expert=8)
    with pytest.raises(ValueError, match="tensor: 8 does not divide 28 attention heads"):
        Deployment(published("qwen2.5-7b"), H800, Layout(tensor=8))
    with pytest.raises(ValueError, match="no experts"):
        Deployment(published("qwen2.5-7b"), H800, Layout(data=2, expert=2))
    with pytest.raises(ValueError, match="the speed between 16 RTX 4090 is not known"):
        Deployment(V3, HARDWARE.device("RTX 4090"), Layout(data=16, expert=16))
    with pytest.raises(ValueError, match="no peak in fp8"):
        Deployment(V3, HARDWARE.device("A100"), products="fp8")
    with pytest.raises(ValueError, match=r"8 x H800, fp8, tensor 8: a device needs 8\d\.\d GB for weights .* of 80 GB 72\.0 are usable"):
        quote(Deployment(V3, H800, Layout(tensor=8), FORMATS["fp8"]), Request(4000, 1000))
    with pytest.raises(ValueError, match="unknown format 'fp16'; known: bf16"):
        fit(V3, parse_cluster("8xH800", HARDWARE), Request(4000, 1000), format="fp16")
    with pytest.raises(ValueError, match="cached < prompt"):
        Request(prompt=10, cached=10, output=1)


def test_calibration_sets_the_shares():
    config = published("qwen2.5-0.5b")
    cpu = HARDWARE.device("CPU")
    plain = Deployment(config, cpu, format=FORMATS["int8"])
    seconds = {"decode": 3 * plain.decode(4, 512).roofline, "prefill": 2 * plain.prefill(512).roofline * 512 / plain.chunk}
    decode = Entry("decode", signature(config), {"weights": "int8", "batch": 4, "context": 512}, {"seconds": seconds["decode"]}, "today")
    shape = {"weights": "int8", "tokens": 512, "context": 0}
    prefill = Entry("prefill", signature(config), shape, {"seconds": seconds["prefill"]}, "today")
    other = Entry("decode", signature(config), {"weights": "bf16", "batch": 4, "context": 512}, {"seconds": 1.0}, "today")
    large = {"weights": "int8", "batch": 64, "context": 512}
    many = Entry("decode", signature(config), large, {"seconds": 2 * plain.decode(64, 512).roofline}, "today")
    measured = plain.calibrated(Profile("cpu", "", "", 0, "today", entries=(many, decode, prefill, other)))
    assert measured.measured and not plain.measured
    assert measured.decode(4, 512).seconds == pytest.approx(seconds["decode"])
    assert measured.decode(64, 512).seconds == pytest.approx(many.rates["seconds"])
    # halfway between them in doublings the share lies halfway; beyond them it is the nearest's
    assert [measured.decode(batch, 512).share for batch in (1, 4, 16, 64, 500)] == pytest.approx([1 / 3, 1 / 3, 5 / 12, 1 / 2, 1 / 2])
    assert measured.prefill_share == pytest.approx(0.5, rel=0.03)
    two = Deployment(config, H800, Layout(tensor=2), FORMATS["int8"])  # of several devices, what one of them reached counts
    assert two.calibrated(Profile("gpu", "", "", 0, "today", entries=(decode, prefill))).decode(4, 512).share == pytest.approx(
        Deployment(config, H800, format=FORMATS["int8"]).decode(4, 512).roofline / seconds["decode"]
    )
    for nothing in ((), (decode,), (other, prefill)):  # of this format both are needed
        assert plain.calibrated(Profile("cpu", "", "", 0, "today", entries=nothing)) == plain


def test_margins_of_the_published_day():
    prices = Prices.load()

    def revenue(model, day):
        return next(bill.dollars for bill in bills(DAY, prices, day) if bill.model == model)

    cost = COST
    assert cost == 87_072
    assert revenue("deepseek-reasoner", date(2025, 2, 20)) == pytest.approx(562_100)
    assert margin(562_027, cost) == pytest.approx(5.45, abs=5e-3)  # published: 545 %
    assert margin(revenue("deepseek-reasoner", date(2025, 2, 20)), cost) == pytest.approx(5.45, abs=0.01)
    assert margin(revenue("deepseek-chat", date(2025, 1, 20)), cost) == pytest.approx(0.02, abs=5e-3)  # at the promotional price
    assert margin(revenue("deepseek-chat", date(2025, 2, 20)), cost) == pytest.approx(2.22, abs=5e-3)  # at the list price
    # from first principles and the two stated shares, instead of the published rates
    request = Request(prompt=4600, cached=round(4600 * 342 / 608), output=800)
    mine = own(DAY, [quote(PREFILL, request), quote(DECODE, request)])
    assert mine.full == pytest.approx(cost, rel=0.05)


def test_a_day_is_priced_by_the_hour():
    prices = Prices.load()
    request = Request(prompt=4000, cached=3000, output=1000)
    wednesday, saturday = date(2026, 11, 25), date(2026, 11, 28)  # peak hours are 01:00 to 04:00 and 06:00 to 10:00 on weekdays

    def flash(day, *only):
        hours = tuple(float(hour in only) for hour in range(24)) if only else (1.0,) * 24
        return next(bill for bill in bills(Traffic.of(request, 1000, hours), prices, day) if bill.model == "deepseek-flash")

    cheap = 3 * 0.003 + 0.15 + 0.60
    assert flash(wednesday, 0).dollars == pytest.approx(cheap) and flash(wednesday, 2).dollars == pytest.approx(2 * cheap)
    assert flash(wednesday).dollars == pytest.approx(cheap * 31 / 24) and flash(saturday).dollars == pytest.approx(cheap)
    assert flash(saturday).per_million == pytest.approx(cheap / 5)
    everyone = bills(Traffic.of(request, 1000), prices, wednesday)
    assert {bill.model for bill in everyone} == set(prices.models)
    assert [bill.dollars for bill in everyone] == sorted(bill.dollars for bill in everyone)
    before = {bill.model for bill in bills(Traffic.of(request, 1000), prices, date(2025, 3, 1))}
    assert "o1" in before and "gpt-5" not in before


def test_own_cost_counts_idle_hours():
    request = Request(prompt=4000, cached=2000, output=1000)
    offered = fit(published("qwen2.5-7b"), parse_cluster("H100", HARDWARE), request).quote
    full_day = offered.requests_per_second * 86_400
    prices, day = Prices.load(), date(2026, 11, 27)
    busy = compare(Traffic.of(request, full_day), prices, day, offered)
    assert (busy.own.deployments, busy.own.devices) == (1, 1) and busy.own.busy == pytest.approx(1)
    assert (busy.own.dollars, busy.own.full) == (pytest.approx(24 * 2.5), pytest.approx(24 * 2.5))
    assert busy.own.full == pytest.approx(full_day * offered.price_request)
    idle = compare(Traffic.of(request, full_day / 10), prices, day, offered)
    assert idle.own.busy == pytest.approx(0.1) and idle.own.dollars == pytest.approx(60)
    assert idle.own.per_million(idle.traffic) == pytest.approx(10 * busy.own.per_million(busy.traffic))
    # at the break-even utilisation, our own costs what the bill does
    bill = next(b for b in busy.bills if b.model == "gpt-4o-mini")
    share = busy.break_even(bill)
    assert 0 < share < 1
    even = compare(Traffic.of(request, full_day * share), prices, day, offered)
    assert even.own.dollars == pytest.approx(next(b.dollars for b in even.bills if b.model == "gpt-4o-mini"))
    # a day that peaks needs more devices than its mean
    peak = own(Traffic.of(request, 10 * full_day, DAYTIME), [offered])
    assert peak.deployments > 10 and peak.full < peak.by_the_hour < peak.dollars and peak.busy == pytest.approx(peak.full / peak.dollars)
    assert own(Traffic.of(request, 10 * full_day), [offered], headroom=1.2).deployments == 12
    free = quote(Deployment(published("qwen2.5-7b"), H800), request, price_per_hour=0)
    assert own(Traffic.of(request, 10), [free]).dollars == 0
    with pytest.raises(ValueError, match="24 weights"):
        Traffic(1, 0, 1, (1.0,) * 23)
    with pytest.raises(ValueError, match="cached <= prompt"):
        Traffic(1, 2, 1)
