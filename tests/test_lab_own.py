"""A problem of the user's own: trained, resumed, read back, measured and drawn like any other."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.problems.base import check_problem
from transformer_lens_taskvec.lab.training.on_problem import Run


@dataclass(frozen=True)
class Switched(lab.Problem):
    """The sum of the coordinates or its negative, shifted; a sequence is of one sign."""

    shift: float
    dim: int = 3
    n_points: int = 5
    tasks: tuple[str, ...] = ("plus", "minus")

    def sample(
        self, batch_size: int, generator: torch.Generator, *, labels: Any = None
    ) -> lab.Batch:
        if labels is None:
            labels = torch.randint(2, (batch_size,), generator=generator)
        xs = torch.randn(batch_size, self.n_points, self.dim, generator=generator)
        noise = 0.1 * torch.randn(batch_size, self.n_points, generator=generator)
        return lab.Batch(xs, self._clean(xs, 1.0 - 2 * labels[:, None]) + noise, labels)

    def oracles(self, batch: lab.Batch) -> dict[str, Float[Tensor, "batch point"]]:
        agreement = ((batch.ys - self.shift) * batch.xs.sum(-1)).cumsum(1)
        sign = torch.cat([torch.zeros_like(agreement[:, :1]), agreement[:, :-1].sign()], dim=1)
        return {"sign of the pairs": self._clean(batch.xs, sign)}

    def right(self, predictions: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        return (predictions > self.shift) == (targets > self.shift)

    def _clean(self, xs: Tensor, sign: Tensor) -> Tensor:
        return sign * xs.sum(-1) + self.shift


@dataclass(frozen=True)
class Filtered(Switched):
    """Has a function among its settings."""

    gate: Any = abs


PROBLEM = Switched(shift=0.5)
CONFIG = dataclasses.replace(
    lab.PRESETS["small"],
    problem=PROBLEM,
    n_layers=2,
    n_heads=2,
    d_model=16,
    steps=60,
    batch_size=16,
    warmup=5,
    n_checkpoints=3,
    n_eval=20,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    trained: Run = lab.train(CONFIG, tmp_path_factory.mktemp("own"), progress=False, device="cpu")
    return trained


def test_its_run_reads_back_by_itself(run: Run) -> None:
    read = lab.load_run(run.path)
    assert read.config == CONFIG and read.config.problem.shift == 0.5
    saved = json.loads((run.path / "config.json").read_text())["problem"]
    expected = {"shift": 0.5, "dim": 3, "n_points": 5, "tasks": ["plus", "minus"]}
    assert saved == {"kind": "Switched", **expected}


def test_resuming_with_another_setting_is_refused_by_name(run: Run) -> None:
    for problem, message in (
        (Switched(shift=0.25), r"its problem\.shift is 0\.5, not 0\.25"),
        (Switched(0.5, tasks=("a", "b")), r"its problem\.tasks is \['plus', 'minus'\], not"),
        (Filtered(0.5), r"its problem\.kind is 'Switched', not 'Filtered'"),
    ):
        other = dataclasses.replace(CONFIG, problem=problem)
        with pytest.raises(ValueError, match=message):
            lab.train(other, run.path, progress=False, device="cpu")
        with pytest.raises(ValueError, match=message):
            lab.load_run(run.path, problem=problem)


def test_a_class_that_is_not_defined_here_must_be_given(run: Run, tmp_path: Path) -> None:
    run.export(tmp_path / "some", run.steps)
    file = tmp_path / "some" / "config.json"
    file.write_text(file.read_text().replace("Switched", "Elsewhere"))
    with pytest.raises(ValueError, match=r"no problem 'Elsewhere' .* run's problem as problem="):
        lab.load_run(tmp_path / "some")


def test_functions_are_recorded_by_name_and_must_be_given() -> None:
    described = Filtered(0.5).to_json()
    assert described["gate"] == {"own": "abs"}
    fields = {name: value for name, value in described.items() if name != "kind"}
    with pytest.raises(ValueError, match="gate holds 'abs', which no file can hold"):
        Filtered.from_json(fields)
    with pytest.raises(TypeError, match="a Tensor among its fields"):
        Filtered(0.5, gate=torch.zeros(2)).to_json()


def test_its_rule_says_what_is_right(run: Run) -> None:
    episodes = lab.problem_episodes(PROBLEM, 10, seed=2)
    scores = tv.evaluate(run.model(), episodes)
    with torch.no_grad():
        predicted = run.model()(torch.stack([episode.prompt for episode in episodes]))[:, -1]
    answers = torch.tensor([episode.answer for episode in episodes])
    assert scores.correct.tolist() == ((predicted > 0.5) == (answers > 0.5)).tolist()
    assert bool(episodes[0].right(torch.tensor([100.0]))) == (episodes[0].answer > 0.5)


def test_its_oracle_is_measured_and_drawn(run: Run) -> None:
    found = lab.measure_emergence(run, n=12, n_oracle=50, progress=False)
    assert found.oracles.names == ("sign of the pairs",) == (found.oracles.best,)
    assert found.oracles.loss[0, -1] == pytest.approx(0.01, rel=0.7)
    assert found.oracles.loss[0, 0] > 1
    assert found.oracle_distance.shape == (len(run.steps), 1)
    figures = lab.emergence_figures(run, found, n=12)
    for name in ("training", "oracles"):
        lines = [line for ax in figures[name].axes for line in ax.get_lines()]
        assert "sign of the pairs" in [line.get_label() for line in lines]
    for figure in figures.values():
        plt.close(figure)


def test_what_a_mixture_lacks_is_named() -> None:
    with pytest.raises(TypeError, match="a dict without tasks, dim"):
        check_problem({})
    with pytest.raises(ValueError, match=r"Switched has no exact posterior .* posterior\(batch\)"):
        PROBLEM.posterior(PROBLEM.sample(2, torch.Generator().manual_seed(0)))
    with pytest.raises(TypeError, match="sample"):
        type("Empty", (lab.Problem,), {})()
