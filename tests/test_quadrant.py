"""Serving in four quadrants: the cycle of micro-batches as events, and which devices which model wants."""

import dataclasses

import pytest

from jevons.cost.hardware import Hardware
from jevons.cost.published import published
from jevons.cost.quadrant import cycle, quadrants
from jevons.cost.serving import Request

HARDWARE = Hardware.load()
H800, H20 = HARDWARE.device("H800"), HARDWARE.device("H20")
REQUEST = Request(prompt=4000, cached=2000, output=1000)


def simulated(attention, feed_forward, exchange, micro, layers=400):
    """Seconds a layer of `micro` batches that queue, one at a time, for attention, the way there, feed-forward and the way back."""
    stations = (attention, exchange, feed_forward, exchange)
    free, ready, places = [0.0] * 4, [0.0] * micro, [0] * micro
    for _ in range(4 * micro * layers):
        batch = min(range(micro), key=lambda i: (max(ready[i], free[places[i] % 4]), places[i]))
        station = places[batch] % 4
        ready[batch] = free[station] = max(ready[batch], free[station]) + stations[station]
        places[batch] += 1
    return max(ready) / layers


@pytest.mark.parametrize(
    ("times", "bound"),
    [((3, 1, 0.5), "attention"), ((1, 4, 0.5), "feed-forward"), ((1, 1, 2), "exchange"), ((1, 1, 1), "round trip")],
)
@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_cycle_is_what_events_give(times, bound, micro):
    seconds, found = cycle(*times, micro)
    assert simulated(*times, micro) == pytest.approx(seconds, rel=0.02)
    assert found == ("round trip" if micro == 1 else found) and (micro < 4 or bound in (found, "round trip"))


def test_which_model_wants_which_device():
    dense, latent = published("qwen2.5-72b"), published("deepseek-v3")
    alone = {name: quadrants(dense, [device], REQUEST, format="fp8") for name, device in (("H800", H800), ("H20", H20))}
    both = quadrants(dense, [H800, H20], REQUEST, format="fp8")
    # grouped-query attention is 8 FLOPs a byte: memory is all it wants, so cheap bandwidth decodes and dear FLOPS do the rest
    assert (both.decode.attention.device, both.decode.feed_forward.device) == (H20, H800)
    assert both.prefill.attention.device == both.prefill.feed_forward.device == H800
    assert both.price(REQUEST) < 0.8 * min(found.price(REQUEST) for found in alone.values())
    # latent attention is 242 FLOPs a byte, and an H20 has 37: mixing does not pay
    mixed = quadrants(latent, [H800, H20], REQUEST, format="fp8")
    assert mixed == quadrants(latent, [H800], REQUEST, format="fp8") and mixed.decode.attention.device == H800
    for found in (both, mixed):
        assert found.decode.seconds <= 0.05
        assert found.price(REQUEST) == pytest.approx(2000 * found.prefill.price + 1000 * found.decode.price)
        assert found.decode.price * found.decode.rate * 3600 / 1e6 == pytest.approx(found.decode.price_per_hour)
    slow = quadrants(dense, [H800, H20], REQUEST, format="fp8", slowest=0.1)
    assert slow.decode.price < both.decode.price and slow.prefill == both.prefill


def test_refusals():
    with pytest.raises(ValueError, match="prefill: no two groups of up to 64 of RTX 4090 hold"):
        quadrants(published("deepseek-v3"), [dataclasses.replace(HARDWARE.device("RTX 4090"), network=1e9)], REQUEST)
    with pytest.raises(ValueError, match="of nothing hold the model"):
        quadrants(published("qwen2.5-7b"), [HARDWARE.device("RTX 4090")], REQUEST)
