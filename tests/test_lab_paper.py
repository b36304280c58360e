"""The script that trains the paper's model on an accelerator, in a small size on the CPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_lab_train import TINY

from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.training.loop import training_step

TUTORIALS = Path(__file__).parents[1] / "tutorials"
CPU = torch.device("cpu")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(TUTORIALS), *sys.path])
    import lab_paper

    return lab_paper


@pytest.mark.parametrize("autocast", [False, True])
def test_the_products_of_a_step_are_those_of_the_formula(paper: ModuleType, autocast: bool) -> None:
    config = dataclasses.replace(lab.PRESETS["paper"], batch_size=3, n_layers=2)
    counts = paper.products_of(training_step(config, seed=0, device=CPU, autocast=autocast))
    problem, width, tokens = config.problem, config.d_model, 3 * 39
    blocks = 3 * 2 * tokens * 2 * 12 * width**2  # forward, and twice that backward
    read_in = 2 * 2 * tokens * problem.dim * width  # no gradient of the input
    # Two products of a head forward and four backward, each of them causal.
    attention = 2 * (2 + 4) * 2 * 3 * 8 * 39**2 * (width // 8) / 2
    assert blocks + read_in + attention == pytest.approx(paper.flops(counts), rel=0.001)
    # The data, drawn by one product with a vector per sequence, stay in float32.
    dtypes = {operand.dtype for a, b in counts for operand in (a, b) if b.shape[-1] > 1}
    assert dtypes == {torch.bfloat16 if autocast else torch.float32}


def test_the_bound_is_the_time_of_the_products(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = torch.randn(200, 300), torch.randn(400, 300)
    counts = paper.products_of(lambda: [a @ b.mT for _ in range(5)])
    ((left, right),) = counts
    assert counts[left, right] == 5 and (left.shape, right.shape) == ((200, 300), (300, 400))
    assert right.stride == (1, 300) and right.random(CPU).stride() == (1, 300)
    assert 0 < paper.seconds_of(a, b.mT) < 0.2
    monkeypatch.setattr(paper, "seconds_of", lambda a, b: 1e-9 * a.numel() * b.shape[1])
    assert paper.bound(counts, CPU) == pytest.approx(5 * 1e-9 * 200 * 300 * 400)
    assert paper.flops(counts) == 5 * 2 * 200 * 300 * 400


def test_the_script_writes_times_and_errors(paper: ModuleType, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, steps=4)
    modes = [(False, False), (True, False)]
    found = paper.report(config, tmp_path, seed=1, device=CPU, modes=modes, often=2, n_oracle=200)
    assert found == json.loads((tmp_path / "paper.json").read_text())
    assert [row["precision"] for row in found["step"]] == ["float32", "bfloat16"]
    assert all(row["step_ms"] > 0 and row["bound_ms"] > 0 for row in found["step"])
    run = lab.load_run(tmp_path)
    assert run.finished and run.seed == 1 and found["steps"] == 4
    assert list(found["late_error"].values()) == pytest.approx(run.late_loss[-1].tolist())
    table = (tmp_path / "paper.md").read_text()
    assert "| bfloat16 | no | " in table and "| the model on B2 | " in table
    assert f"| the model's mean / {found['best_oracle']} | {found['over_best']:.2f} |" in table
