"""Training: resuming to the same bits, breaking down loudly, reading a run back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from transformer_lens_taskvec.lab.evaluation import evaluate_problem
from transformer_lens_taskvec.lab.presets import PRESETS, train
from transformer_lens_taskvec.lab.problems.base import Batch
from transformer_lens_taskvec.lab.problems.families import RegressionFamilies
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture
from transformer_lens_taskvec.lab.training import loop as train_module
from transformer_lens_taskvec.lab.training.loop import TrainingDiverged
from transformer_lens_taskvec.lab.training.muon import Muon, orthogonalized
from transformer_lens_taskvec.lab.training.on_problem import TrainConfig
from transformer_lens_taskvec.lab.training.runs import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dataclasses.replace(
    PRESETS["small"],
    problem=SparseLinearMixture.orthogonal(2, 2, n_points=5),
    n_layers=1,
    n_heads=2,
    d_model=16,
    steps=60,
    batch_size=8,
    warmup=5,
    n_checkpoints=6,
    n_eval=20,
)


class Killed(BaseException):
    """Stands for the power going off."""


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "state.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    states = state_of(one), state_of(other)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    files = [sorted(p.name for p in (d / "checkpoints").iterdir()) for d in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        first, second = (load_file(d / "checkpoints" / name) for d in (one, other))
        assert all(torch.equal(first[key], second[key]) for key in first), name
    metrics = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (d / "metrics.jsonl").read_text().splitlines()
        ]
        for d in (one, other)
    ]
    assert metrics[0] == metrics[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(TINY, folder, seed=3, progress=False, device="cpu")
    return folder


def call_that_kills(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, whose ``at``-th call is the end."""
    calls = itertools.count(1)

    def killing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise Killed
        return function(*args, **kwargs)

    return killing


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_run_killed_again_and_again_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Literal["muon", "adam"]
) -> None:
    config = dataclasses.replace(TINY, optimizer=optimizer)
    train(config, tmp_path / "straight", seed=3, progress=False, device="cpu")
    in_a_step = [(train_module, "_take_step", at) for at in (1, 2, 9, 21)]
    in_a_write = [(os, "replace", at) for at in (1, 2, 3, 4, 5, 6)]
    for owner, name, at in in_a_write + in_a_step + in_a_write:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, call_that_kills(getattr(owner, name), at))
            train(config, tmp_path / "killed", seed=3, progress=False, device="cpu")
    train(config, tmp_path / "killed", seed=3, progress=False, device="cpu")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_process_that_is_killed_resumes_to_the_same_bits(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "import sys, time, torch; sys.path.insert(0, 'tests')\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "import test_lab_train as t\n"
        "from transformer_lens_taskvec.lab.training import loop as module\n"
        "take = module._take_step\n"
        "module._take_step = lambda *args: (time.sleep(0.02), take(*args))\n"
        f"t.train(t.TINY, {str(folder)!r}, seed=3, progress=False, device='cpu')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "step_000005.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(load_run(folder).steps) < len(load_run(straight).steps)
    train(TINY, folder, seed=3, progress=False, device="cpu")
    assert_same_run(straight, folder)


def test_another_number_of_threads_is_warned_of(straight: Path) -> None:
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match=r"torch.set_num_threads\(1\) first"):
            train(TINY, straight, seed=3, progress=False, device="cpu")
    finally:
        torch.set_num_threads(1)


def test_a_finished_run_is_not_trained_again(straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    run = train(TINY, straight, seed=3, progress=False, device="cpu")
    assert run.finished
    assert (straight / "metrics.jsonl").read_text() == before


def test_the_global_random_state_is_neither_read_nor_changed(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, steps=3, warmup=0, n_checkpoints=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(config, tmp_path / "a", progress=False, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    train(config, tmp_path / "b", progress=False, device="cpu")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_seed_is_another_run(straight: Path, tmp_path: Path) -> None:
    other = train(TINY, tmp_path / "run", seed=4, progress=False, device="cpu")
    assert not torch.equal(other.loss[0], load_run(straight).loss[0])


def test_the_folder_of_another_run_is_refused(straight: Path) -> None:
    with pytest.raises(ValueError, match="its seed is 3, not 4"):
        train(TINY, straight, seed=4, progress=False)
    with pytest.raises(ValueError, match="batch_size is 8, not 9"):
        train(dataclasses.replace(TINY, batch_size=9), straight, seed=3, progress=False)
    with pytest.raises(ValueError, match="autocast is False, not True"):
        train(TINY, straight, seed=3, autocast=True, progress=False, device="cpu")
    with pytest.raises(ValueError, match="already holds a run"):
        train(TINY, straight, seed=3, resume=False, progress=False)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "not finite"), (1e4, "a mean error of")]
)
def test_training_that_breaks_down_stops_and_keeps_the_last_good_state(
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    message: str,
) -> None:
    sample, calls = SparseLinearMixture.sample, itertools.count()

    def poisoned(self: SparseLinearMixture, *args: Any, **kwargs: Any) -> Batch:
        batch = sample(self, *args, **kwargs)
        if next(calls) >= 32 and not kwargs:
            batch.ys.fill_(value)
        return batch

    monkeypatch.setattr(SparseLinearMixture, "sample", poisoned)
    with pytest.raises(TrainingDiverged, match=message):
        train(TINY, tmp_path / "run", seed=3, progress=False, device="cpu")
    kept = load_run(tmp_path / "run")
    assert kept.steps == load_run(straight).steps[: len(kept.steps)]
    assert all(value.isfinite().all() for value in state_of(tmp_path / "run").values())
    healthy = kept.model()
    expected = load_run(straight).model(kept.steps[-1])
    for one, other in zip(healthy.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_reads_back_what_training_measured(straight: Path) -> None:
    run = load_run(straight)
    assert run.config == TINY and run.seed == 3 and run.finished
    assert run.steps[0] == 0 and run.steps[-1] == 60
    for step in (0, 60):
        measured = evaluate_problem(run.model(step), run.config.problem, n_eval=20)
        at = run.steps.index(step)
        torch.testing.assert_close(measured.loss, run.loss[at])
        torch.testing.assert_close(measured.accuracy, run.accuracy[at])
        torch.testing.assert_close(measured.norms, run.norms[at])
    assert run.to_frame().shape == (len(run.steps) * 2 * 5, 4)
    assert "step 60 of 60" in repr(run)
    with pytest.raises(ValueError, match="no checkpoint at step 7"):
        run.model(7)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_run(straight / "checkpoints")


def test_families_read_back_but_the_users_own_functions_must_be_given(tmp_path: Path) -> None:
    families = RegressionFamilies(dim=4, n_points=4)
    config = dataclasses.replace(TINY, problem=families, steps=2, warmup=0)
    train(config, tmp_path / "built-in", progress=False, device="cpu")
    assert load_run(tmp_path / "built-in").config == config
    own = RegressionFamilies({"sum": lambda xs, generator: xs.sum(-1)}, dim=4, n_points=4)
    run = train(dataclasses.replace(config, problem=own), tmp_path / "own", progress=False)
    assert run.tasks == ("sum",)
    with pytest.raises(ValueError, match="problem="):
        load_run(tmp_path / "own")
    assert load_run(tmp_path / "own", problem=own).tasks == ("sum",)
    with pytest.raises(ValueError, match="its problem.n_points is 4, not 5"):
        load_run(tmp_path / "own", problem=dataclasses.replace(own, n_points=5))


def test_training_lowers_the_error_of_a_learnable_task(tmp_path: Path) -> None:
    problem = RegressionFamilies({"sum": lambda xs, generator: xs.sum(-1)}, dim=3, n_points=3)
    config = dataclasses.replace(
        TINY, problem=problem, steps=150, learning_rate=0.01, muon_learning_rate=0.02
    )
    run = train(config, tmp_path / "run", progress=False, device="cpu")
    assert run.loss[-1].mean() < 0.2 * run.loss[0].mean()


def test_the_paper_preset_is_the_papers() -> None:
    paper = PRESETS["paper"]
    assert paper == TrainConfig()
    assert (paper.problem.dim, len(paper.problem.tasks), paper.problem.n_points) == (16, 4, 20)
    assert (paper.steps, paper.batch_size, paper.learning_rate) == (80_000, 128, 1e-4)
    assert paper.betas == (0.9, 0.9999) and paper.optimizer == "adam"
    n_params = sum(parameter.numel() for parameter in paper.model().parameters())
    assert abs(n_params - 9.5e6) < 0.1e6


@pytest.mark.parametrize("autocast", [False, True])
def test_the_paper_preset_takes_steps_on_the_cpu(tmp_path: Path, autocast: bool) -> None:
    config = dataclasses.replace(PRESETS["paper"], batch_size=2, n_eval=2, n_checkpoints=1)
    run = train(config, tmp_path, steps=3, progress=False, device="cpu", autocast=autocast)
    assert run.steps == (0, 3) and run.finished
    assert run.loss.isfinite().all() and not torch.equal(run.loss[0], run.loss[1])


@pytest.mark.slow
def test_200_steps_of_the_paper_preset_lower_the_error(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["paper"], batch_size=16)
    run = train(config, tmp_path, steps=200, progress=False, device="cpu")
    assert run.finished and run.loss[-1].mean() < run.loss[0].mean()


def test_an_unknown_preset_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no preset 'tiny'; there are paper, small"):
        train("tiny", "unused")


def test_checkpoints_stand_on_a_log_schedule() -> None:
    steps = PRESETS["paper"].checkpoint_steps()
    assert steps[:2] == (0, 80) and steps[-1] == 80_000
    ratios = [later / earlier for earlier, later in zip(steps[1:], steps[2:], strict=False)]
    assert max(ratios) < 1.25


def test_muon_is_torchs_muon() -> None:
    reference = torch.optim
    if not hasattr(reference, "Muon"):
        pytest.skip("needs torch 2.9 or newer")
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (32, 8), (8, 32)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    stacked = torch.nn.Parameter(torch.stack([ours[0].detach()] * 2))
    optimizers = Muon([*ours, stacked], lr=0.1), reference.Muon(theirs, lr=0.1)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        assert ours[0].grad is not None
        stacked.grad = torch.stack([ours[0].grad] * 2)
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=0.01, rtol=0.02)  # theirs is in bfloat16
    torch.testing.assert_close(stacked[1], ours[0])


def test_orthogonalized_keeps_singular_vectors_and_levels_singular_values() -> None:
    matrix = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.5 and values.max() < 1.5


def test_expected_targets_have_the_same_gradient_with_less_noise() -> None:
    configs = [dataclasses.replace(TINY, batch_size=64, targets=t) for t in ("outputs", "expected")]
    model = TINY.model(seed=1)
    parameters = list(model.parameters())
    gradients = [
        torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
                for generator in [torch.Generator().manual_seed(7)]
                for loss in (config.loss(model, model, generator, False) for _ in range(200))
            ]
        )
        for config in configs
    ]
    apart = gradients[0] - gradients[1]  # of the same sequences
    error = apart.std(0) / 200**0.5
    z = (apart.mean(0) / error)[error > 0]
    assert 0.6 < float(z.square().mean()) < 1.4  # 1 if the means are the same
    noise = [float(g.var(0).sum()) for g in gradients]
    assert noise[1] < 0.5 * noise[0]


def test_expected_targets_need_a_mean_that_is_known() -> None:
    with pytest.raises(ValueError, match="RegressionFamilies has no exact predictions by task"):
        dataclasses.replace(TINY, problem=RegressionFamilies(dim=4), targets="expected")
