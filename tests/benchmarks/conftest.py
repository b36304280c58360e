"""Paired timing: this library and the other way, in one process, on the same work, in turn."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_ROWS: list[dict[str, Any]] = []


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., float]:
    """Time ``ours`` against ``other``, alternating; returns the ratio of their medians."""

    def measure(
        work: str, against: str, target: float, ours: Any, other: Any, rounds: int = 3
    ) -> float:
        ours()
        mine: list[float] = []
        theirs: list[float] = []
        for _ in range(rounds):
            mine.append(_seconds(ours))
            theirs.append(_seconds(other))
        benchmark.pedantic(ours, rounds=1)
        ratio = statistics.median(theirs) / statistics.median(mine)
        record(work, against, target, ratio, ours_s=statistics.median(mine))
        return ratio

    return measure


def record(work: str, against: str, target: float, ratio: float, **more: float) -> None:
    """Add a row to the table of ratios."""
    row = {"work": work, "against": against, "target": target, "ratio": round(ratio, 2)}
    _ROWS.append({**row, **{name: round(value, 3) for name, value in more.items()}})


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.fixture(scope="session", autouse=True)
def _table() -> Iterator[None]:
    yield
    if not _ROWS:
        return
    print("\n\n| work | against | at least | measured |\n|---|---|---|---|")
    for row in _ROWS:
        print(f"| {row['work']} | {row['against']} | {row['target']:g} x | {row['ratio']:.1f} x |")
    path = Path(os.environ.get("TASKVEC_BENCHMARKS", ".benchmarks")) / "ratios.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_ROWS, indent=1))
