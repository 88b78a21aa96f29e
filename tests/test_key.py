"""Keys, limits and the meter: secrets that leave no trace, limits that are exact, rows that neither vanish nor count twice."""

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import sqlalchemy as sql
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from jevons.cli import app
from jevons.cost.ledger import Ledger
from jevons.cost.price import Prices
from jevons.cost.usage import KEYS, USAGE, UsageRow, UsageStore
from jevons.server import key as key_module
from jevons.server import meter as meter_module
from jevons.server.error import APIError
from jevons.server.key import Account, Bucket, Keys
from jevons.server.meter import Meter
from jevons.stages.key import parse_moment

NOON = 1_795_608_000.0  # 2026-11-25 12:00 UTC, off-peak


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def row(**fields):
    values = {"key_id": "", "key_name": "open", "model": "m", "endpoint": "/v1/completions", "request_id": "r", "started": NOON}
    return UsageRow(**{**values, "money": 0.0, **fields})


@pytest.fixture
def store(ledger_url):
    store = UsageStore(ledger_url)
    yield store
    store.close()


@pytest.fixture
def file_store(tmp_path):
    """For what does not depend on the database."""
    store = UsageStore(tmp_path / "ledger.db")
    yield store
    store.close()


@asynccontextmanager
async def metering(store, keys=None, **options):
    meter = Meter(store, Prices.load(price_per_hour=36.0), keys, **options)
    try:
        yield meter
    finally:
        await meter.close(1.0)


def refused(status, call, *args):
    with pytest.raises(APIError) as caught:
        result = call(*args)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
    assert caught.value.status == status, caught.value.message
    return caught.value


def account_of(keys, secret):
    return asyncio.run(keys.authenticate(secret))


# --- secrets


def test_a_secret_is_shown_once_and_kept_nowhere(store, caplog):
    caplog.set_level(logging.DEBUG)
    keys = Keys(store)
    key, secret = keys.create("alice", models=["a", "b"], budget=5.0, rate=2.0, concurrency=4, expires=time.time() + 60, tenant="team")
    assert secret.startswith("sk-jevons-") and len(secret) == 53 and keys.create("bob")[1] != secret
    account = account_of(keys, secret)
    assert account == Account(key.id, "alice", "team", ("a", "b"), 5.0, 2.0, 4, key.expires)
    hidden = secret[len("sk-jevons-") + 8 :]
    with store.engine.connect() as connection:
        table = str(connection.execute(sql.select(KEYS)).all())
    assert hashlib.sha256(secret.encode()).hexdigest() in table
    assert not [t for t in (table, repr(key), repr(account), repr(store.all_keys()), caplog.text) if hidden in t]
    assert key.digest not in repr(key)
    error = refused(401, keys.authenticate, secret[:-1] + ("a" if secret[-1] != "a" else "b"))
    assert hidden[:-1] not in error.message


def test_digests_are_compared_in_constant_time(file_store, monkeypatch):
    keys = Keys(file_store)
    key, secret = keys.create("alice")
    compared = []

    def compare(a, b):
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(key_module, "hmac", SimpleNamespace(compare_digest=compare))
    assert account_of(keys, secret).name == "alice"
    refused(401, keys.authenticate, secret[:18] + "x" * 35)
    assert [a for a, _ in compared] == [key.digest] * 2 and compared[0][1] == key.digest != compared[1][1]


@pytest.mark.parametrize("secret", [None, "", "sk-jevons-", "nonsense", "sk-jevons-" + "é" * 43, "\udc80" * 60, "x" * 100_000])
def test_other_secrets_are_refused(file_store, secret):
    keys = Keys(file_store)
    keys.create("alice")
    assert refused(401, keys.authenticate, secret).code == "invalid_api_key"


def test_revoked_rotated_and_expired(store):
    clock, wall = Clock(), Clock(NOON)
    server, admin = Keys(store, clock=clock, wall=wall), Keys(store, wall=wall)
    key, secret = admin.create("alice", expires=NOON + 100)
    account = account_of(server, secret)
    rotated, second = admin.rotate("alice")
    assert rotated.id == key.id and second != secret
    assert account_of(server, secret) == account  # for less than a second
    clock.now += 1.0
    refused(401, server.authenticate, secret)
    assert account_of(server, second) == account
    wall.now += 100
    assert "expired" in refused(401, server.authenticate, second).message
    assert "expired" in refused(401, server.admit, account, "m").message  # was let in before
    assert not server.any()
    wall.now -= 100
    assert server.any()
    admin.revoke(key.id)
    clock.now += 1.0
    assert "revoked" in refused(401, server.authenticate, second).message
    for verb in (admin.revoke, admin.rotate):
        with pytest.raises(ValueError, match="no key 'alice' is in force; there are: none"):
            verb("alice")
    wall.now += 1
    again, _ = admin.create("alice")  # the name is free again
    with pytest.raises(ValueError, match="there is a key named 'alice'"):
        admin.create("alice")
    assert [(k.id, k.state(NOON)) for k in store.all_keys()] == [(key.id, "revoked"), (again.id, "active")]


def test_open_only_until_the_first_key(file_store):
    clock = Clock()
    closed, keys = Keys(file_store, clock=clock), Keys(file_store, allow_open=True, clock=clock)
    refused(401, closed.authenticate, None)
    assert account_of(keys, None) == account_of(keys, "any key that a client insists on") == Account.open()
    key, secret = keys.create("alice")
    clock.now += 1.0
    refused(401, keys.authenticate, None)
    assert account_of(keys, secret).tenant == key.id
    keys.revoke("alice")
    clock.now += 1.0
    refused(401, keys.authenticate, None)  # the last key's end does not open the door


def test_limits_change_while_the_server_runs(store):
    clock = Clock()
    server, admin = Keys(store, clock=clock), Keys(store)
    key, secret = admin.create("alice", budget=1.0, models=["a"], rate=0.001)
    store.insert([row(key_id=key.id, money=1.5)])
    account = account_of(server, secret)
    refused(402, server.admit, account, "a")
    changed = admin.change("alice", budget=2.0, models=None, rate=None)
    assert (changed.budget, changed.models, changed.rate, changed.digest) == (2.0, None, None, key.digest)
    clock.now += 1.0
    account = account_of(server, secret)
    for _ in range(2):
        server.admit(account, "b").release()
    assert server.balance(account).remaining == 0.5
    with pytest.raises(ValueError, match="budget: must be more than 0"):
        admin.change("alice", budget=-1.0)
    with pytest.raises(ValueError, match="no key 'bob'"):
        admin.change("bob", budget=1.0)


def test_limits_that_make_no_sense(file_store):
    keys = Keys(file_store)
    wrong = [{"budget": 0.0}, {"rate": -1.0}, {"concurrency": 0}, {"expires": 1.0}, {"models": []}, {"models": ["a", ""]}, {"tenant": ""}]
    for limits in wrong:
        with pytest.raises(ValueError, match=next(iter(limits))):
            keys.create("alice", **limits)
    for name in ("", "a\nb", "x" * 101):
        with pytest.raises(ValueError, match="name"):
            keys.create(name)
    assert file_store.all_keys() == []


# --- limits


def test_models(file_store):
    keys = Keys(file_store)
    account = Account("k", "alice", "t", models=("small", "deepseek-chat"))
    keys.admit(account, "small").release()
    keys.admit(account, "deepseek-chat", "small-0.5b").release()
    keys.admit(account, "alias", "small").release()
    assert refused(403, keys.admit, account, "large").param == "model"


def test_rate_is_exact(file_store):
    clock = Clock()
    keys = Keys(file_store, clock=clock)
    account = Account("k", "alice", "t", rate=4.0)
    for _ in range(4):  # a second's worth at once
        keys.admit(account, "m").release()
    assert refused(429, keys.admit, account, "m").retry_after == pytest.approx(0.25)
    clock.now += 0.1
    error = refused(429, keys.admit, account, "m")
    assert error.retry_after == pytest.approx(0.15) and error.headers()["retry-after"] == "1"
    clock.now += error.retry_after
    keys.admit(account, "m").release()
    assert refused(429, keys.admit, account, "m").retry_after == pytest.approx(0.25)
    keys.admit(Account("other", "bob", "t", rate=4.0), "m").release()


@given(rate=st.floats(0.05, 50), gaps=st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_no_window_holds_more_than_the_rate(rate, gaps):
    bucket, now, taken = Bucket(rate, 0.0), 0.0, []
    for gap in gaps:
        now += gap
        if wait := bucket.take(now):
            assert 0 < wait <= 1 / rate + 1e-9
            now += wait
            assert bucket.take(now) == 0.0, "came back when told to, and was refused"
        taken.append(now)
    for i, start in enumerate(taken):
        for j in range(i, len(taken)):
            assert j - i + 1 <= max(1.0, rate) + rate * (taken[j] - start) + 1e-6


def test_concurrency_and_leases(file_store):
    keys = Keys(file_store)
    account = Account("k", "alice", "t", concurrency=2)
    first, second = keys.admit(account, "m"), keys.admit(account, "m")
    assert refused(429, keys.admit, account, "m").code == "concurrency_limit_exceeded"
    first.release()
    first.release()  # once is enough, twice is not two
    with pytest.raises(RuntimeError, match="inside"), keys.admit(account, "m"):
        refused(429, keys.admit, account, "m")
        raise RuntimeError("inside")
    third = keys.admit(account, "m")
    refused(429, keys.admit, account, "m")
    second.release()
    third.release()
    assert not keys._running


def test_a_refused_request_takes_no_place(file_store):
    clock = Clock()
    keys = Keys(file_store, clock=clock)
    account = Account("k", "alice", "t", concurrency=1, rate=1.0)
    lease = keys.admit(account, "m")
    clock.now += 1.0
    refused(429, keys.admit, account, "m")  # by concurrency: the rate's token stays
    lease.release()
    lease = keys.admit(account, "m")
    lease.release()
    assert refused(429, keys.admit, account, "m").code == "rate_limit_exceeded"
    assert not keys._running


def test_budget_holds_over_restarts_and_servers(store):
    clock = Clock()
    admin = Keys(store)
    _, secret = admin.create("alice", budget=0.5)

    async def first_server():
        keys = Keys(store, clock=clock)
        account = await keys.authenticate(secret)
        async with metering(store, keys) as meter:
            keys.admit(account, "m").release()
            used = {"key_id": account.key_id, "key_name": "alice", "money": None}
            assert await meter.record(row(**used, device_seconds=40.0))  # at 36 dollars an hour
            assert keys.balance(account).spent == pytest.approx(0.4)
            clock.now += 1.0
            await keys.authenticate(secret)  # read anew: neither lost nor counted twice
            assert keys.balance(account).spent == pytest.approx(0.4) and keys.balance(account).remaining == pytest.approx(0.1)
            keys.admit(account, "m").release()
            await meter.record(row(**used, device_seconds=20.0))
            error = refused(402, keys.admit, account, "m")
            assert "$0.50" in error.message and keys.balance(account).remaining == 0.0

    other = Keys(store, clock=clock)
    account = account_of(other, secret)
    asyncio.run(first_server())
    clock.now += 1.0
    account_of(other, secret)
    refused(402, other.admit, account, "m")  # a server beside it
    again = Keys(store)
    refused(402, again.admit, account_of(again, secret), "m")
    assert other.balance(account).spent == pytest.approx(0.6)


def test_money_that_is_not_written_yet_counts(file_store):
    keys = Keys(file_store)
    key, secret = keys.create("alice", budget=1.0)
    account = account_of(keys, secret)
    keys.charge(key.id, 1.0)
    refused(402, keys.admit, account, "m")
    assert keys.balance(Account.open()).spent == 0.0


def test_keys_while_the_database_is_away(file_store, monkeypatch):
    clock = Clock()
    keys = Keys(file_store, clock=clock)
    _, secret = keys.create("alice")
    account = account_of(keys, secret)

    def away():
        raise OperationalError("SELECT", {}, Exception("server closed the connection"))

    monkeypatch.setattr(file_store, "all_keys", away)
    clock.now += 60.0
    assert account_of(keys, secret) == account
    clock.now += 1.0
    assert refused(503, keys.authenticate, secret).retry_after == 5.0
    monkeypatch.undo()
    clock.now += 1.0
    assert account_of(keys, secret) == account


# --- the meter


def test_many_at_once_are_few_commits(store, monkeypatch):
    insert, commits = store.insert, []

    async def load():
        async with metering(store) as meter:

            def slow(rows):  # as a disk is, so that all others have come by the end of the first commit
                commits.append(len(rows))
                while meter.pending < 64 and len(commits) == 1:
                    time.sleep(0.001)
                insert(rows)

            monkeypatch.setattr(store, "insert", slow)
            assert await asyncio.gather(*(meter.record(row(prompt=i, cached=i // 2)) for i in range(64))) == [True] * 64
            assert meter.pending == 0

    asyncio.run(load())
    assert len(commits) <= 2 and sum(commits) == 64
    (sums,) = store.sums("key")
    assert (sums.requests, sums.prompt, sums.cached) == (64, sum(range(64)), sum(i // 2 for i in range(64)))


def test_a_batch_that_is_sent_again_counts_once(store):
    key, _ = Keys(store).create("alice")
    rows = [row(key_id=key.id, key_name="alice", money=0.25, prompt=1) for _ in range(3)]
    store.insert(rows[:2])
    store.insert(rows)
    store.insert(rows)
    (sums,) = store.sums("key")
    assert (sums.requests, sums.money, store.all_keys()[0].spent) == (3, 0.75, 0.75)


def test_rows_outlast_a_database_that_is_down(store, monkeypatch, caplog):
    insert, down = store.insert, threading.Event()
    down.set()

    def flaky(rows):
        if down.is_set():
            raise OperationalError("INSERT", {}, Exception("no route to host"))
        insert(rows)

    monkeypatch.setattr(store, "insert", flaky)
    monkeypatch.setattr(meter_module, "LONGEST_PAUSE", 0.1)

    async def load():
        async with metering(store, capacity=3, patience=0.2) as meter:
            meter.check()
            assert await asyncio.gather(*(meter.record(row(prompt=1)) for _ in range(3))) == [False] * 3
            while meter.error is None:  # its thread may not have come to it
                await asyncio.sleep(0.01)
            assert meter.error == "no route to host" and meter.pending == 3
            assert refused(503, meter.check).retry_after
            meter.patience = 30.0
            await asyncio.wait({task := asyncio.ensure_future(meter.record(row(prompt=1)))}, timeout=0.05)  # under way: still taken
            down.clear()
            assert await task is True
            meter.check()
            assert meter.error is None and meter.pending == 0

    asyncio.run(load())
    assert store.sums("key")[0].requests == 4
    assert [r.levelname for r in caplog.records if "wait" in r.message or "again" in r.message] == ["ERROR", "WARNING"]


def test_rows_left_at_the_end_are_logged(file_store, monkeypatch, caplog):
    def down(rows):
        raise OperationalError("INSERT", {}, Exception("disk is gone"))

    monkeypatch.setattr(file_store, "insert", down)

    async def load():
        meter = Meter(file_store, Prices.load(), patience=0.05)
        assert not await meter.record(row(request_id="lost-one"))
        began = time.monotonic()
        await meter.close(0.3)
        assert time.monotonic() - began < 60  # and not for ever
        with pytest.raises(RuntimeError, match="closed"):
            await meter.record(row())

    asyncio.run(load())
    assert [r.levelname for r in caplog.records if '"request_id": "lost-one"' in r.message] == ["ERROR"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_requests_without_a_meter(file_store, monkeypatch):
    monkeypatch.setattr(file_store, "insert", lambda rows: 1 / 0)

    async def load():
        async with metering(file_store, patience=0.2) as meter:
            meter.check()
            assert not await meter.record(row())
            while meter._thread.is_alive():
                await asyncio.sleep(0.01)
            assert refused(503, meter.check) and "ZeroDivisionError" in meter.error

    asyncio.run(load())


def test_a_row_that_the_database_refuses_holds_up_nobody(store, caplog):
    bad = row(request_id="half a surrogate \ud800")
    nul = row(request_id="nul \0")  # PostgreSQL's text cannot hold it, SQLite's can
    good = 3 if store.engine.dialect.name == "sqlite" else 2

    async def load():
        async with metering(store) as meter:
            results = await asyncio.gather(*(meter.record(r) for r in (row(), bad, nul, row())), return_exceptions=True)
            assert [result is True for result in results] == [True, False, good == 3, True]
            assert all(isinstance(result, Exception) for result in results if result is not True)
            assert meter.pending == 0 and meter.error is None

    asyncio.run(load())
    assert store.sums("key")[0].requests == good and caplog.text.count("usage refused") == 4 - good


def test_connections_that_the_server_drops(store):
    if store.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no connections to drop")
    keys, clock = Keys(store), Clock()
    key, secret = keys.create("alice")
    keys._clock = clock

    async def load():
        async with metering(store, keys) as meter:
            for n in range(3):
                other = UsageStore(store.engine.url.render_as_string(hide_password=False))
                with other.engine.begin() as connection:  # as a server does that restarts
                    mine = "datname = current_database() AND pid <> pg_backend_pid() AND query ILIKE '%%usage%%'"
                    connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {mine}")
                other.close()
                clock.now += 1.0
                assert (await keys.authenticate(secret)).key_id == key.id
                assert await meter.record(row(key_id=key.id, money=1.0, prompt=n))
            assert meter.error is None

    asyncio.run(load())
    assert store.sums("key")[0].requests == store.all_keys()[0].spent == 3


def test_a_cancelled_client_is_metered(store):
    async def load():
        async with metering(store) as meter:
            task = asyncio.ensure_future(meter.record(row(prompt=7, status="abort")))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(load())
    assert store.sums("key")[0].prompt == 7


KILLED = """
import asyncio, sys
from jevons.cost.price import Prices
from jevons.cost.usage import UsageRow, UsageStore
from jevons.server.meter import Meter

async def client(meter, n):
    while True:
        row = UsageRow(key_id="", key_name="open", model="m", endpoint="e", request_id="r", prompt=n, started=1.8e9)
        assert await meter.record(row)
        print(row.id, flush=True)

async def main():
    meter = Meter(UsageStore(sys.argv[1]), Prices.load())
    await asyncio.gather(*(client(meter, n) for n in range(16)))

asyncio.run(main())
"""


def test_kill_in_the_middle_of_load(ledger_url):
    process = subprocess.Popen([sys.executable, "-c", KILLED, ledger_url], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(100)]
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.read().splitlines(keepends=True)
    process.wait()
    process.stdout.close()
    printed = {line.strip() for line in lines if line.endswith("\n")}
    store = UsageStore(ledger_url)
    with store.engine.connect() as connection:
        kept = set(connection.scalars(sql.select(USAGE.c.id)))
    assert len(printed) >= 100 and printed <= kept
    store.insert([row()])  # and it takes more
    store.close()


SERVER = """
import asyncio, sys
from jevons.cost.price import Prices
from jevons.cost.usage import UsageRow, UsageStore
from jevons.server.key import Keys
from jevons.server.meter import Meter

async def main(url, key_id, worker):
    store = UsageStore(url)
    meter = Meter(store, Prices.load(), Keys(store))
    used = {"key_id": key_id, "key_name": "alice", "model": "m", "endpoint": "e", "request_id": "r", "money": 0.5, "started": 1.8e9}
    for start in range(0, 60, 20):
        await asyncio.gather(*(meter.record(UsageRow(**used, prompt=worker * 1000 + i)) for i in range(start, start + 20)))
    await meter.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def test_several_servers_one_ledger(ledger_url):
    seed = UsageStore(ledger_url)
    key, _ = Keys(seed).create("alice")
    workers = [subprocess.Popen([sys.executable, "-c", SERVER, ledger_url, key.id, str(worker)]) for worker in range(3)]
    assert [process.wait() for process in workers] == [0, 0, 0]
    (sums,) = seed.sums("key")
    assert (sums.requests, sums.prompt) == (180, sum(worker * 1000 + i for worker in range(3) for i in range(60)))
    assert sums.money == seed.all_keys()[0].spent == 90.0
    seed.close()
    Ledger(ledger_url).close()  # lives beside it


def test_tables_made_by_many_at_once(ledger_url):
    errors = []

    def make():
        try:
            UsageStore(ledger_url).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


ROW = st.builds(
    row,
    key_id=st.sampled_from(["", "a", "b"]),
    model=st.sampled_from(["m", "n"]),
    prompt=st.integers(100, 10**6),
    cached=st.integers(0, 100),
    completion=st.integers(50, 10**5),
    reasoning=st.integers(0, 50),
    ttft=st.none() | st.floats(0, 100),
    device_seconds=st.floats(0, 1000),
    money=st.integers(0, 1000).map(lambda n: n / 64),  # exact in binary, so sums are equal in every order
    started=st.floats(NOON - 3 * 86400, NOON + 3 * 86400),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, max_size=40), seed=st.integers(0, 2**32))
def test_totals_are_the_sums_of_rows_whatever_the_batches(store, rows, seed):
    rows = [dataclasses.replace(r, id=f"{i}") for i, r in enumerate(rows)]
    with store.engine.begin() as connection:
        connection.execute(USAGE.delete())
    chance, left = random.Random(seed), list(rows)
    while left:
        size = chance.randint(1, len(left))
        store.insert(left[:size])
        left = left[size if chance.random() < 0.7 else size // 2 :]  # some are sent again
    since = NOON - 86400
    for by, group in [
        ("key", lambda r: r.key_id),
        ("model", lambda r: r.model),
        ("day", lambda r: time.strftime("%F", time.gmtime(r.started))),
    ]:
        for start in (None, since):
            expected = {}
            for r in rows:
                if start is None or r.started >= start:
                    expected.setdefault(group(r), []).append(r)
            sums = store.sums(by, start)
            assert [s.group for s in sums] == sorted(expected)
            for s in sums:
                members = expected[s.group]
                assert s.requests == len(members)
                for name in ("prompt", "cached", "completion", "reasoning", "money"):
                    assert getattr(s, name) == sum(getattr(r, name) for r in members)
                assert s.device_seconds == pytest.approx(sum(r.device_seconds for r in members))
                first = [r.ttft for r in members if r.ttft is not None]
                assert s.ttft == (pytest.approx(statistics.median(first)) if first else None)
    assert store.money(since) == sum(r.money for r in rows if r.started >= since)
    prices = Prices.load()
    costs = store.cost_at(prices, "deepseek-flash")
    counts = ("prompt", "cached", "completion")
    for key_id, money in costs.items():
        own = [prices.cost("deepseek-flash", **{c: getattr(r, c) for c in counts}, when=r.started) for r in rows if r.key_id == key_id]
        assert money == pytest.approx(sum(own))


def test_money_today_turns_at_midnight(file_store):
    wall = Clock(NOON)
    file_store.insert([row(money=1.0, started=NOON - 3600), row(money=8.0, started=NOON - 86400)])

    async def load():
        async with metering(file_store, wall=wall) as meter:
            await meter.record(row(money=2.0))
            assert meter.today() == 3.0
            wall.now += 86400
            assert meter.today() == 0.0
            await meter.record(row(money=4.0, started=wall.now))
            assert meter.today() == 4.0

    asyncio.run(load())


# --- the verbs


def jevons(*args, **env):
    result = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "80", "JEVONS_LEDGER": "", **env})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_verbs(ledger_url):
    where = ("--ledger", ledger_url)
    made = jevons(
        "keys", "create", "--name", "alice", "--models", "a, b", "--budget", 5, "--rate", 2, "--concurrency", 4, "--expires", "30d", *where
    )
    secret = made.stdout.strip()  # nothing else, so that a script can take it
    store = UsageStore(ledger_url)
    keys = Keys(store)
    account = account_of(keys, secret)
    assert account.models == ("a", "b") and (account.budget, account.rate, account.concurrency) == (5.0, 2.0, 4)
    assert account.expires == pytest.approx(time.time() + 30 * 86400, abs=60)
    second = jevons("keys", "rotate", "alice", JEVONS_LEDGER=ledger_url).stdout.strip()
    refused(401, Keys(store).authenticate, secret)
    assert account_of(Keys(store), second).key_id == account.key_id
    used = {"key_id": account.key_id, "key_name": "alice", "completion": 400_000, "reasoning": 150_000}
    store.insert([row(**used, prompt=2_000_000, cached=1_000_000, ttft=t, device_seconds=1800.0, money=0.05) for t in (0.1, 0.3, 0.9)])
    receipt = jevons("receipt", "--keys", "--since", "2026-11-25", *where).stdout
    # at deepseek-flash's price off-peak: 3 x (0.003 + 0.15 + 0.4 x 0.6)
    parts = "alice|3|6.00M|3.00M|1.20M|450K|0.30s|1.50|0.1500|1.18|since 2026-11-25 00:00 UTC|deepseek-flash"
    assert [part for part in parts.split("|") if part not in receipt] == []
    assert "alice" not in jevons("receipt", "--keys", "--since", "2026-11-26", *where).stdout
    assert "139.50" in jevons("receipt", "--keys", "--compare", "o1", *where).stdout  # 3 x (7.50 + 15 + 0.4 x 60)
    listed = jevons("keys", "list", *where).stdout
    assert [part for part in (account.key_id, second[:18], "0.1500", "$5", "active") if part not in listed] == []
    assert second not in listed
    assert jevons("keys", "change", "alice", "--budget", 7, "--rate", 0, "--expires", "never", *where).stdout.endswith(
        ": $7, 4 at once, a b\n"
    )
    (changed,) = store.all_keys()
    assert (changed.budget, changed.rate, changed.concurrency, changed.models, changed.expires) == (7.0, None, 4, ("a", "b"), None)
    with pytest.raises(ValueError, match="name a limit to change"):
        jevons("keys", "change", "alice", *where)
    assert "is revoked" in jevons("keys", "revoke", account.key_id, *where).stdout
    assert "revoked" in jevons("keys", "list", *where).stdout
    store.close()


def test_verbs_want_a_ledger(tmp_path):
    for verb in (("keys", "list"), ("keys", "revoke", "x"), ("receipt", "--keys")):
        with pytest.raises(ValueError, match=r"ledger\.db: no ledger"):
            jevons(*verb, "--runs", tmp_path)
    jevons("keys", "create", "--name", "alice", "--runs", tmp_path / "runs")
    with pytest.raises(ValueError, match="--expires: 'soon' is neither"):
        jevons("keys", "create", "--name", "bob", "--expires", "soon", "--runs", tmp_path / "runs")
    with pytest.raises(ValueError, match="no model 'gpt'"):
        UsageStore(tmp_path / "runs" / "ledger.db").insert([row()])
        jevons("receipt", "--keys", "--compare", "gpt", "--runs", tmp_path / "runs")
    with pytest.raises(ValueError, match="--keys: is about what was served"):
        jevons("receipt", "quickstart", "--keys", "--runs", tmp_path / "runs")


def test_moments():
    assert parse_moment("2d", NOON, -1, "--since") == NOON - 2 * 86400 and parse_moment("90m", NOON, 1, "--expires") == NOON + 5400
    assert parse_moment("2026-11-25", 0, 1, "") == NOON - 43200 == parse_moment("2026-11-25T02:00+02:00", 0, 1, "")
