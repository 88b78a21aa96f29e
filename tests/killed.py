"""Runs and servers that are killed at random moments, begun again and thrown away, and what must hold of their ledger all the while.

A process of its own that has no threads: it forks a child that works, lets it live for a moment drawn by chance, kills it, and looks.

    python tests/killed.py SEED KILLS FOLDER
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jevons.run
from jevons.cost.ledger import Ledger
from jevons.cost.price import Prices
from jevons.cost.receipt import Plan, Receipt
from jevons.cost.usage import UsageRow, UsageStore
from jevons.data.disk import write_text
from jevons.recipe import load
from jevons.run import Run
from jevons.server.uptime import Uptime
from jevons.stages.invoice import gather
from jevons.stages.printout import document

STEPS, TOKENS = 12, 7  # of a stage, of a step
LATE = 1e-3  # seconds between two clocks' being read


def child(work: Callable[[int], None], words: int | None, pause: float = 0.0) -> tuple[int, list[str], float]:
    """Fork, work, and die `pause` seconds after so many lines, if any. Its exit status, the lines that it wrote, the seconds from
    fork to end. Lines and not seconds, because on a busy machine it may take seconds to begin."""
    start, (read, write) = time.perf_counter(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(write)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, encoding="ascii") as lines:
        said = [] if words is None else [lines.readline() for _ in range(words)]
        if words is not None:
            time.sleep(pause)
            os.kill(pid, signal.SIGKILL)
        said += lines.readlines()
    status = os.waitpid(pid, 0)[1]
    return status, [line for line in said if line.endswith("\n")], time.perf_counter() - start


def live(root: Path, seed: int, again: str | None, pipe: int) -> None:
    """A recipe's stages, each picking up where it was; says what a stage's row holds once that is committed."""
    chance = random.Random(seed)
    jevons.run.LEDGER_SECONDS = 0.005
    run = Run(load("quickstart", ["price_per_hour=3600"]), root, "cpu", again=again, memory=lambda: chance.randrange(100, 200))
    for stage in (stage for stage in run.recipe.stages if not run.is_done(stage)):
        run.stage_folder(stage).mkdir(exist_ok=True)
        saved = run.stage_folder(stage) / "saved"
        step = int(saved.read_text()) if saved.exists() else 0
        with run.spend(stage, planned=Plan(STEPS * TOKENS, 1.0, 1.0, 1.0, 100)) as spending:
            spending.update(tokens=step * TOKENS, flops=float(step))  # as stages do: killed behind what was saved, it only has to finish
            while step < STEPS:
                time.sleep(chance.random() * 0.003)
                step += 1
                force = chance.random() < 0.4
                spending.update(tokens=step * TOKENS, flops=float(step), force=force)
                write_text(saved, str(step))
                if force:
                    os.write(pipe, f"{stage} {spending.receipt.seconds!r} {spending.receipt.memory}\n".encode())
        run.mark_done(stage)


def serve(root: Path, session: str, pipe: int) -> None:
    """A server that answers for ever; says each request's tokens once its row is committed."""
    chance, store = random.Random(session), UsageStore(root / "ledger.db")
    receipt = Receipt(run_id=session, run="quickstart", stage="serve", device="cpu", price_per_hour=3600.0, started=time.time())
    Uptime(Ledger(root / "ledger.db"), receipt, seconds=0.004)
    while True:
        prompt, completion = chance.randrange(50), chance.randrange(50)
        row = UsageRow(key_id="", key_name="open", model="m", endpoint="e", request_id="r", money=1.0, session=session, started=time.time())
        row.__dict__.update(prompt=prompt, completion=completion)
        store.insert([row])
        os.write(pipe, f"{prompt + completion}\n".encode())


def rows(root: Path) -> dict[tuple[str, str], Receipt]:
    ledger = Ledger(root / "ledger.db")
    found = ledger.rows()
    ledger.close()
    assert len({(r.run_id, r.stage) for r in found}) == len(found)
    return {(r.run_id, r.stage): r for r in found}


def torture(seed: int, kills: int, root: Path) -> None:
    chance = random.Random(seed)
    Ledger(root / "ledger.db").close()
    UsageStore(root / "ledger.db").close()
    alive, served, kept = 0.0, {}, {}
    up: dict[str, float] = {}
    for i in range(kills + 1):
        last = i == kills
        if chance.random() < 0.5:  # a server in between
            session = f"session{i}"
            _, said, up[session] = child(partial(serve, root, session), chance.randrange(8), chance.random() * 0.02)
            served[session] = [int(line) for line in said]
        again = chance.choice(["prepare", "pretrain", "rl"]) if chance.random() < 0.25 and i else None
        words = None if last else chance.randrange(8)
        status, said, seconds = child(partial(live, root, seed * 1000 + i, again), words, chance.random() * 0.02)
        alive += seconds
        assert not last or status == 0
        now = rows(root)
        for line in said:
            stage, spent, memory = line.split()
            (row,) = [r for (_, name), r in now.items() if name == stage]
            assert row.seconds >= float(spent) and row.memory >= int(memory), "what was committed is gone"
        for place, row in kept.items():
            assert now[place].seconds >= row.seconds and now[place].started == row.started and (now[place].memory or 0) >= (row.memory or 0)
        stages = [r for r in now.values() if r.stage != "serve"]
        assert len({r.run_id for r in stages}) <= 1 and sum(r.seconds for r in stages) <= alive + LATE, "time was counted twice"
        for session, tokens in served.items():
            assert (session, "serve") in now or not tokens
        assert all(r.seconds <= up[r.run_id] + LATE and r.finished is None for r in now.values() if r.stage == "serve")
        kept = now
    finished = document(gather(root, None, prices=Prices.load(), compare="deepseek-flash"))
    stages = [entry for entry in finished["stages"] if entry["stage"] != "serve"]
    assert [(s["tokens"], s["flops"]) for s in stages] == [(STEPS * TOKENS, STEPS)] * 5, "work was counted twice, or not at all"
    assert all(s["finished"] and s["planned"]["tokens"] == s["tokens"] and s["difference"]["tokens"] == 0 for s in stages)
    assert math.isclose(finished["total"]["money"], sum(r.seconds for r in kept.values()))  # a dollar a second
    receipt = json.loads((root / "quickstart" / "receipt.json").read_text())
    assert [s["seconds"] for s in receipt["stages"]] == [s["seconds"] for s in stages]
    tokens = finished.get("served", {"tokens": 0})["tokens"]
    assert finished["total"]["tokens"] == sum(s["tokens"] for s in stages) + tokens
    found = {s["run_id"]: s for s in finished.get("served", {"sessions": []})["sessions"]}
    for session, tokens in served.items():  # the last row may have been committed and not told
        if tokens:
            assert sum(tokens) <= found[session]["tokens"] and 0 <= found[session]["requests"] - len(tokens) <= 1


if __name__ == "__main__":
    torture(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
