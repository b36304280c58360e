"""Paired timing: this library and the other way, in one process, on the same work, in turn."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from timing import ROWS, paired, record, table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--peers",
        default=os.environ.get("TASKVEC_PEERS"),
        help="folder of the peers' environments, see tests/benchmarks/peers/README.md",
    )


@pytest.fixture
def compare(benchmark: Any, device: str) -> Callable[..., float]:
    """Time ``ours`` against ``other``, alternating; returns the ratio of their medians.

    Targets are for two cores: on the CPU a ratio must reach it, elsewhere it is only printed.
    ``agree`` gets both results; it checks them and returns what to say of them. Without ``warm``
    the first calls are timed: for work so long that what a first call does once does not matter.
    """

    def measure(
        work: str,
        against: str,
        target: float,
        ours: Any,
        other: Any,
        rounds: int = 3,
        warm: bool = True,
        agree: Callable[[Any, Any], str] | None = None,
    ) -> float:
        if warm:
            ours()
        mine, theirs, *results = paired(ours, other, rounds)
        benchmark.pedantic(ours if warm else lambda: None, rounds=1)
        note = "" if agree is None else agree(*results)
        record(work, against, target, theirs / mine, note, ours_s=mine)
        print(f"\n{work}: {theirs / mine:.1f} x {against} ({mine:.2f} s). {note}")
        assert device != "cpu" or theirs / mine >= target
        return theirs / mine

    return measure


@pytest.fixture(scope="session", autouse=True)
def _table() -> Iterator[None]:
    yield
    if not ROWS:
        return
    print(f"\n\n{table()}")
    path = Path(os.environ.get("TASKVEC_BENCHMARKS", ".benchmarks")) / "ratios.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ROWS, indent=1))
