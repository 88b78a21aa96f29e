"""What training by steps leaves behind while it runs: rows of metrics, a progress line, and a receipt that grows."""

from __future__ import annotations

import time
from typing import Any

import torch

from jevons.progress import Meter
from jevons.run import Run, Spending
from jevons.train.balance import max_violation
from jevons.train.trainer import Metrics


class StepLog:
    """`flops` of a token; `tokens` that earlier attempts have trained on already."""

    def __init__(self, run: Run, stage: str, spending: Spending, meter: Meter, flops: float, tokens: int = 0) -> None:
        self.run, self.stage, self.spending, self.meter, self.flops = run, stage, spending, meter, flops
        self.tokens, self.since_tokens, self.since = tokens, 0, time.perf_counter()
        self.loads: dict[int, torch.Tensor] = {}
        spending.update(tokens=tokens, flops=tokens * flops)  # the ledger may have been killed behind the last checkpoint

    def add(self, step: int, metrics: Metrics, norm: float, lr: float, *, force: bool, **fields: Any) -> None:
        """A step that is done; a row, with `fields`, only where `force` says so."""
        self.tokens += metrics.tokens
        self.since_tokens += metrics.tokens
        for layer, loads_E in metrics.loads.items():
            self.loads[layer] = self.loads[layer] + loads_E if layer in self.loads else loads_E
        receipt = self.spending.update(tokens=self.tokens, flops=self.tokens * self.flops)
        rate = self.since_tokens / (time.perf_counter() - self.since)
        self.meter.update(step, f"loss {metrics.loss:.3f}  {rate:,.0f} tok/s  ${receipt.money:.4f}")
        if not force:
            return
        row: dict[str, Any] = {
            "tokens": self.tokens,
            "loss": metrics.loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": rate,
            "seconds": receipt.seconds,
            "money": receipt.money,
            **fields,
        }
        if metrics.mtp_loss is not None:
            row["mtp_loss"] = metrics.mtp_loss
        if metrics.balance_loss is not None:
            row["balance_loss"] = metrics.balance_loss
        if self.loads:
            row["max_violation"] = max(float(max_violation(loads_E)) for loads_E in self.loads.values())
            shares = [(loads_E / loads_E.sum()).tolist() for _, loads_E in sorted(self.loads.items())]
            self.run.log(self.stage, step, loads=[[round(x, 5) for x in share] for share in shares])
        self.run.log(self.stage, step, **row)
        self.since_tokens, self.since, self.loads = 0, time.perf_counter(), {}
