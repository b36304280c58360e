"""The scaling benchmark, on a tiny model in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_scaling_benchmark_measures_fits_and_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    import scaling

    cubic = scaling.fit([2, 4, 8, 16], [3 * size**3 for size in (2, 4, 8, 16)])
    assert (cubic.exponent, cubic.low, cubic.high) == pytest.approx((3, 3, 3))
    kinked = scaling.fit([1, 2, 4], [1, 1, 4])
    assert (kinked.exponent, kinked.low, kinked.high) == pytest.approx((1, 0, 2))

    def in_this_process(cases: list[scaling.Case]) -> list[dict[str, float]]:
        return [scaling.measure(case, rounds=1) for case in cases]

    monkeypatch.setattr(scaling, "measure_apart", in_this_process)
    rows = scaling.main(["--out", str(tmp_path), "--quick"])
    assert {(row["call"], row["varied"]) for row in rows} == {
        ("evaluate_many", "variants"),
        ("evaluate_many", "prompts"),
        ("collect", "prompts"),
    }
    for row in rows:
        assert row["seconds"] > 0 and row["MiB"] >= 0
        assert row[row["varied"]] in scaling.QUICK[row["varied"]]
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert "| evaluate_many | prompts 4 to 32 |" in capsys.readouterr().out
