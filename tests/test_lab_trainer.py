"""The trainer: loggers, early stopping, config files, short runs, and no waiting between saves."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_lab_train import TINY, Killed, assert_same_run, call_that_kills
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from transformer_lens_taskvec import lab
from transformer_lens_taskvec.cli import app
from transformer_lens_taskvec.lab.training import loop

pytestmark = pytest.mark.usefixtures("one_thread")

train = partial(lab.train, progress=False, device="cpu")
QUICK = dataclasses.replace(TINY, steps=30)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(TINY, folder, seed=3)
    return folder


class Noted:
    """A logger that keeps what it gets."""

    def __init__(self, raise_at: int | None = None) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0
        self.raise_at = raise_at

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step == self.raise_at:
            raise ConnectionError("the service is away")
        torch.rand(1)  # a logger may use the global generator
        self.rows.append((step, dict(numbers)))

    def close(self) -> None:
        self.closed += 1

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]


class Added(Noted):
    pass


# --- loggers ---


def test_loggers_get_each_evaluation_once_and_change_no_bit(straight: Path, tmp_path: Path) -> None:
    logger, other = Noted(), Noted()
    run = train(TINY, tmp_path / "run", seed=3, loggers=[logger, other])
    assert_same_run(straight, tmp_path / "run")
    assert logger.steps == other.steps == list(run.steps) and logger.closed == other.closed == 1
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for number, (step, numbers) in enumerate(logger.rows):
        late = torch.tensor(records[number]["loss"])[:, TINY.problem.late_from :].mean(1)
        assert [numbers["loss/B1"], numbers["loss/B2"]] == pytest.approx(late.tolist())
        assert numbers["loss"] == pytest.approx(float(late.mean()))
        assert numbers["learning_rate"] == pytest.approx(TINY.learning_rate * TINY.rate(step))
        assert numbers["muon_learning_rate"] == pytest.approx(3 * numbers["learning_rate"])
        assert ("train_loss" in numbers) == ("seconds_per_step" in numbers) == (step > 0)
    step, numbers = logger.rows[2]
    took = records[2]["seconds"] - records[1]["seconds"]
    assert numbers["seconds_per_step"] == pytest.approx(took / (step - logger.steps[1]))
    assert numbers["train_loss"] == records[2]["train_loss"]
    assert "logged" not in json.loads((run.path / "config.json").read_text())


def test_after_kills_no_step_is_logged_twice_and_none_is_lost(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    for owner, name, at in [
        *((os, "replace", at) for at in (1, 2, 3, 4, 5, 6, 7, 8)),
        *((loop, "_take_step", at) for at in (1, 9, 21)),
    ]:
        logger = Noted()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, call_that_kills(getattr(owner, name), at))
            train(TINY, tmp_path / "run", seed=3, loggers=[logger])
        steps += logger.steps
        assert logger.closed == 1
    logger = Noted()
    run = train(TINY, tmp_path / "run", seed=3, loggers=[logger])
    assert steps + logger.steps == list(run.steps) and steps and logger.steps
    assert_same_run(straight, tmp_path / "run")
    # A logger that was not there before gets all evaluations; nothing is trained for it.
    known, added = Noted(), Added()
    train(TINY, tmp_path / "run", seed=3, loggers=[known, added])
    assert known.steps == [] and added.steps == list(run.steps)


def test_a_logger_that_raises_stops_the_run_which_resumes(straight: Path, tmp_path: Path) -> None:
    at = lab.load_run(straight).steps[3]
    good, bad = Noted(), Noted(raise_at=at)
    with pytest.raises(ConnectionError, match="the service is away"):
        train(TINY, tmp_path / "run", seed=3, loggers=[good, bad])
    assert good.closed == bad.closed == 1
    assert good.steps == [*bad.steps, at] and lab.load_run(tmp_path / "run").steps[-1] == at
    again = Noted(), Noted()
    train(TINY, tmp_path / "run", seed=3, loggers=again)
    for first, second in zip((good, bad), again, strict=True):
        assert first.steps + second.steps == list(lab.load_run(straight).steps)
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_logger_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for logger, said in ((print, "print"), (Noted, "the class Noted")):
        with pytest.raises(TypeError, match=f"loggers holds .*{said}.*log\\(step, numbers\\)"):
            train(QUICK, tmp_path / "run", loggers=[logger])
    logger = Noted()
    with pytest.raises(ValueError, match="no preset"):
        train("smal", tmp_path / "run", loggers=[logger])
    assert logger.closed == 1 and not [*tmp_path.iterdir()]


def test_a_damaged_record_of_what_was_logged_is_named(tmp_path: Path) -> None:
    train(QUICK, tmp_path, loggers=[Noted()])
    for text in ("{", '{"Noted": "all"}', "[1]"):
        (tmp_path / "logged.json").write_text(text)
        with pytest.raises(ValueError, match=r"logged\.json: damaged record of what was logged"):
            train(QUICK, tmp_path, loggers=[Noted()])


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    noted = Noted()
    logger = lab.TensorBoardLogger(tmp_path)
    assert not [*tmp_path.iterdir()]
    run = train(QUICK, tmp_path, loggers=[logger, noted])
    read = EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["scalars"]) == set(noted.rows[-1][1])
    events = read.Scalars("loss/B1")
    assert [event.step for event in events] == list(run.steps)
    expected = [numbers["loss/B1"] for _, numbers in noted.rows]
    assert [event.value for event in events] == pytest.approx(expected)


class Service:
    """Stands for the module of Weights & Biases or of trackio."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **options: Any) -> Service:
        self.calls.append(options)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.calls.append((step, sorted(numbers)[-1]))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_the_numbers_of_one_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)  # type: ignore[arg-type]
    make: Any = {"wandb": lab.WandbLogger, "trackio": lab.TrackioLogger}[name]
    logger = make("vectors", name="s0")
    assert service.calls == [] and isinstance(logger, lab.Logger)
    run = train(QUICK, tmp_path, loggers=[logger])
    logged = [(0, "muon_learning_rate"), *((step, "train_loss") for step in run.steps[1:])]
    assert service.calls == [{"project": "vectors", "name": "s0"}, *logged, "finished"]


@pytest.mark.slow
def test_weights_and_biases_takes_it_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "from transformer_lens_taskvec import lab\n"
        f"logger = lab.WandbLogger('vectors', mode='offline', dir={str(tmp_path)!r})\n"
        "logger.log(0, {'loss': 1.0}); logger.log(5, {'loss': 0.5}); logger.close()\n"
    )
    environment = {**os.environ, "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    (written,) = tmp_path.rglob("run-*.wandb")
    assert written.stat().st_size > 0


@pytest.mark.parametrize(
    ("module", "make", "said"),
    [
        ("torch.utils.tensorboard", "TensorBoardLogger", r"taskvec\[tensorboard\]'"),
        ("trackio", "TrackioLogger", r"taskvec\[trackio\]'"),
        ("wandb", "WandbLogger", "pip install wandb"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    module: str, make: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{make} needs .*: pip install .*{said}|{said}"):
        getattr(lab, make)("somewhere")


# --- early stopping ---


def first_reason(stop: lab.EarlyStopping, losses: list[float]) -> int | None:
    """The first evaluation at which a training with these losses ends; one every ten steps."""
    steps = [10 * number for number in range(len(losses))]
    for n in range(1, len(losses) + 1):
        if stop.reason(steps[:n], losses[:n]) is not None:
            return n - 1
    return None


def test_the_rule_of_early_stopping() -> None:
    losses = [1.0, 0.8, 0.79, 0.785, 0.5, 0.5, math.nan, 0.5, 0.2]
    stop = lab.EarlyStopping
    assert first_reason(stop(3), losses) == 7
    assert first_reason(stop(2), losses) == 6
    assert first_reason(stop(2, min_delta=0.02), losses) == 3
    assert first_reason(stop(3, min_delta=0.02), losses) == 7
    assert first_reason(stop(2, min_delta=0.02, after=20), losses) == 6
    assert first_reason(stop(9), losses) is None
    assert first_reason(stop(target=0.5), losses) == 4
    assert first_reason(stop(target=0.5, after=60), losses) == 7
    assert first_reason(stop(1, target=0.8), losses) == 1
    for wrong, said in (
        ({}, "give at least one"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"patience": 1, "min_delta": -0.1}, "min_delta must not be negative, got -0.1"),
        ({"target": 1.0, "after": -1}, "after must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=said):
            lab.EarlyStopping(**wrong)  # type: ignore[arg-type]


def same_until(straight: Path, stopped: Path, steps: tuple[int, ...]) -> None:
    records = [
        [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
        for one in (straight, stopped)
    ]
    assert len(records[1]) == len(steps)
    for whole, cut in zip(*records, strict=False):
        for record in (whole, cut):
            record.pop("seconds")
        assert whole == {name: value for name, value in cut.items() if name != "stopped"}
    full, part = lab.load_run(straight), lab.load_run(stopped)
    for one, other in zip(
        full.model(steps[-1]).parameters(), part.model().parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_a_run_that_stops_early_is_finished_and_the_same_until_then(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lab.load_run(straight)
    stop = lab.EarlyStopping(target=99.0, after=whole.steps[2] + 1)
    run = train(TINY, tmp_path / "run", seed=3, stop=stop)
    assert run.steps == whole.steps[:4] and run.finished
    assert run.stopped is not None and "at most the target" in run.stopped
    assert f"step {run.steps[-1]} of 60" in repr(run) and "stopped early: late loss" in repr(run)
    assert whole.stopped is None and "stopped" not in repr(whole)
    same_until(straight, tmp_path / "run", run.steps)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_take_step", call_that_kills(loop._take_step, 1))
        assert train(TINY, tmp_path / "run", seed=3, stop=stop).stopped == run.stopped
    for other, said in (
        (None, "None"),
        (dataclasses.replace(stop, target=9.0), r"target is 99\.0"),
    ):
        with pytest.raises(ValueError, match=rf"its stop.*{said}"):
            train(TINY, tmp_path / "run", seed=3, stop=other)
    part = run.export(tmp_path / "part", run.steps[:2])
    assert not part.finished
    assert run.export(tmp_path / "end", run.steps[-1:]).finished


def test_a_run_killed_at_its_early_end_still_ends_there(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = lab.EarlyStopping(target=99.0, after=1)
    logger = Noted()
    for at in itertools.count(1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", call_that_kills(os.replace, at))
            try:
                run = train(TINY, tmp_path / "run", seed=3, stop=stop, loggers=[logger])
                break
            except Killed:
                assert at < 20
    assert run.finished and run.stopped and len(run.steps) == 2
    assert logger.steps == list(run.steps)
    same_until(straight, tmp_path / "run", run.steps)


def test_the_toy_model_stops_early_too(tmp_path: Path) -> None:
    small: dict[str, Any] = {"batch_size": 2, "n_eval": 2, "d_model": 16, "d_mlp": 16}
    config = lab.ToyConfig(steps=40, n_checkpoints=5, **small)
    logger = Noted()
    run = train(config, tmp_path, stop=lab.EarlyStopping(target=99.0, after=1), loggers=[logger])
    assert run.steps == (0, 2) and run.finished and "at most the target of 99" in str(run.stopped)
    assert lab.load_run(tmp_path).stopped == run.stopped
    assert logger.rows[1][1]["loss/XOR"] == pytest.approx(float(run.nll[1][run.tasks.index("XOR")]))


# --- short runs ---


def test_a_short_run_needs_no_other_warm_up(tmp_path: Path) -> None:
    short = dataclasses.replace(lab.PRESETS["small"], steps=150)
    rates = [short.rate(step) for step in range(151)]
    assert rates[:16] == pytest.approx([step / 15 for step in range(16)])
    assert rates[15] == max(rates) == 1 and rates[-1] == pytest.approx(0, abs=1e-12)
    tiny = dataclasses.replace(TINY, warmup=200)
    assert train(tiny, tmp_path, steps=3).finished
    assert dataclasses.replace(tiny, warmup=0, schedule="constant").rate(0) == 1


# --- config files ---


def test_the_config_that_a_run_writes_reproduces_it_to_the_bit(
    straight: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_bytes((straight / "config.json").read_bytes())
    arguments = lab.load_config(file)
    assert arguments["config"] == TINY and arguments["seed"] == 3
    lab.train(out_dir=tmp_path / "again", progress=False, **arguments)
    assert_same_run(straight, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == file.read_bytes()
    stop = lab.EarlyStopping(2, after=5)
    train(QUICK, tmp_path / "stop", stop=stop, autocast=True)
    expected = {"config": QUICK, "seed": 0, "autocast": True, "compile": False, "stop": stop}
    assert lab.load_config(tmp_path / "stop" / "config.json") == {**expected, "device": "cpu"}
    small: dict[str, Any] = {"batch_size": 2, "n_eval": 2, "d_model": 16, "d_mlp": 16}
    toy = lab.ToyConfig(steps=2, **small)
    train(toy, tmp_path / "toy")
    assert lab.load_config(tmp_path / "toy" / "config.json")["config"] == toy


def test_versions_stand_in_the_config_and_are_not_compared(straight: Path, tmp_path: Path) -> None:
    train(QUICK, tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved["made_with"]["torch"] == torch.__version__
    assert saved["made_with"]["threads"] == 1
    assert re.match(r"\d+\.\d+", saved["made_with"]["transformer-lens-taskvec"])
    saved["made_with"]["torch"] = "1.0"
    file.write_text(json.dumps(saved))
    assert train(QUICK, tmp_path).finished
    assert json.loads(file.read_text())["made_with"]["torch"] == "1.0"
    del saved["made_with"], saved["stop"]  # as older runs are
    file.write_text(json.dumps(saved))
    assert train(QUICK, tmp_path).finished


def test_functions_of_the_users_own_must_be_given(tmp_path: Path) -> None:
    own = lab.RegressionFamilies({"sum": lambda xs, generator: xs.sum(-1)}, dim=4, n_points=4)
    config = dataclasses.replace(QUICK, problem=own, steps=2)
    train(config, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: .*no file can hold; give .*problem="):
        lab.load_config(tmp_path / "config.json")
    assert lab.load_config(tmp_path / "config.json", problem=own)["config"] == config


def changed(saved: Any, key: str, value: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(saved))
    *path, last = key.split(".")
    place = found
    for part in path:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return found


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stepz", 3, r"unknown key 'stepz'; did you mean 'steps'\?"),
        ("zzz", 3, r"unknown key 'zzz'; there are steps, batch_size"),
        ("problem.basis", 3, r"unknown key 'problem\.basis'; did you mean 'bases'\?"),
        ("problem.kind", "Mine", r"problem\.kind is 'Mine', which is not defined"),
        ("problem.kind", ..., r"problem\.kind is None; it must be a text"),
        ("problem", 4, "problem is 4; it must be"),
        ("problem.dim", "8", r"problem\.dim is '8'; it must be a whole number"),
        ("problem.bases", [[0, 1], ["2", 3]], r"problem\.bases is .*item 0 of item 1 of tuple"),
        ("problem.bases", [[0, 9]], "dim is 4, so coordinates are 0 to 3"),
        ("kind", "Mine", "no kind of run 'Mine' is defined"),
        ("kind", ..., "no key 'kind'"),
        ("problem", ..., "no key 'problem'"),
        ("steps", "many", "steps is 'many'; it must be a whole number"),
        ("steps", True, "steps is True; it must be a whole number"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("learning_rate", None, "learning_rate is None; it must be a number"),
        (
            "betas",
            [0.9],
            r"betas is \[0\.9\]; it must be tuple\[float, float\] .*expected 2, got 1",
        ),
        ("optimizer", "sgd", r"optimizer is 'sgd'; it must be typing\.Literal\['adam', 'muon'\]"),
        ("seed", 1.5, r"seed is 1\.5; it must be a whole number"),
        ("device", "gpu", "device: 'gpu' is no device"),
        ("autocast", 1, "autocast is 1; it must be true or false"),
        ("stop", 3, "stop is 3; it must be"),
        ("stop", {"patienc": 3}, r"unknown key 'stop\.patienc'; did you mean 'patience'\?"),
        ("stop", {"patience": "3"}, r"stop\.patience is '3'; it must be int \| None"),
        ("stop", {"patience": 0}, "patience must be at least 1, got 0"),
    ],
)
def test_a_config_that_is_wrong_is_refused_with_the_file_and_the_key(
    straight: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    saved = json.loads((straight / "config.json").read_text())
    file = tmp_path / "run.json"
    file.write_text(json.dumps(changed(saved, key, value)))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: .*{said}"):
        lab.load_config(file)


def test_what_a_config_leaves_out_has_its_default(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    problem = {"kind": "SparseLinearMixture", "dim": 8, "bases": [[0, 1], [2, 3]]}
    file.write_text(json.dumps({"kind": "TrainConfig", "problem": problem, "steps": 9}))
    mixture = lab.SparseLinearMixture(8, ((0, 1), (2, 3)))
    assert lab.load_config(file) == {"config": lab.TrainConfig(problem=mixture, steps=9)}
    file.write_text(json.dumps({"kind": "TrainConfig", "problem": {"kind": "RegressionFamilies"}}))
    with pytest.raises(ValueError, match="no key 'families'"):
        lab.load_config(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json: .*the content is \[\]"):
        lab.load_config(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        lab.load_config(tmp_path / "nowhere.json")


# --- the command ---


def test_the_command_trains_from_a_config_and_records_what_overrides_it(
    straight: Path, tmp_path: Path
) -> None:
    file = straight / "config.json"

    def command(out: str, *more: str) -> dict[str, Any]:
        arguments = ["train", "--config", str(file), "--out", str(tmp_path / out), *more]
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == 0, outcome.output
        saved: dict[str, Any] = json.loads((tmp_path / out / "config.json").read_text())
        return saved

    first = json.loads(file.read_text())
    assert command("same") == first
    assert_same_run(straight, tmp_path / "same")
    other = command("other", "--seed", "4", "--steps", "20", "--autocast", "--patience", "9")
    stop = {"patience": 9, "min_delta": 0.0, "target": None, "after": 0}
    assert other == {**first, "seed": 4, "steps": 20, "autocast": True, "stop": stop}
    # The file that this wrote is the new run's own.
    file = tmp_path / "other" / "config.json"
    assert command("again") == other
    assert_same_run(tmp_path / "other", tmp_path / "again")
    assert command("plain", "--no-autocast", "--patience", "7")["stop"]["patience"] == 7
    both = ["train", "--config", str(file), "--preset", "small", "--out", str(tmp_path / "x")]
    outcome = CliRunner().invoke(app, both)
    assert outcome.exit_code == 2 and "give --preset or --config, not both" in outcome.stderr


def test_the_command_logs(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = {name: Service() for name in ("wandb", "trackio")}
    for name, service in services.items():
        monkeypatch.setitem(sys.modules, name, service)  # type: ignore[arg-type]
    arguments = ["train", "--config", str(straight / "config.json"), "--out", str(tmp_path / "run")]
    arguments += ["--steps", "8", "--logger"]
    outcome = CliRunner().invoke(app, [*arguments, "wandb,trackio"])
    assert outcome.exit_code == 0, outcome.output
    for service in services.values():
        options, *rows, end = service.calls
        assert options["project"] == "taskvec" and options["resume"] == "allow"
        assert [step for step, _ in rows] == list(lab.load_run(tmp_path / "run").steps)
        assert end == "finished"
    assert not [*tmp_path.glob("run/events*")]
    outcome = CliRunner().invoke(app, [*arguments, "wand"])
    assert outcome.exit_code == 2 and "no logger 'wand'; there are: tensorboard" in outcome.stderr


@pytest.mark.parametrize("kind", ["vectors", "tokens", "no blocks"])
def test_a_plan_says_minutes_for_any_problem(kind: str) -> None:
    problem = {"vectors": Signs(), "tokens": Repeated(), "no blocks": Lines()}[kind]
    plan = lab.plan_training(problem, steps=7)
    assert plan.by_kind["training"] == (7, 7 * 128 * {"vectors": 9, "tokens": 5}.get(kind, 9))
    assert plan.minutes > 0 and "minutes, at" in plan.lines[-1]


SMALL = {"n_layers": 1, "n_heads": 1, "d_model": 8, "n_checkpoints": 1, "n_eval": 2}


@dataclasses.dataclass(frozen=True)
class Signs(lab.Problem):
    dim: int = 4
    n_points: int = 5
    tasks: tuple[str, ...] = ("plus", "minus")
    defaults = SMALL

    def sample(
        self, batch_size: int, generator: torch.Generator, *, labels: Tensor | None = None
    ) -> lab.Batch:
        if labels is None:
            labels = torch.randint(2, (batch_size,), generator=generator)
        xs = torch.randn(batch_size, self.n_points, self.dim, generator=generator)
        return lab.Batch(xs, xs.sum(-1) * (1 - 2 * labels[:, None]), labels)


class Line(torch.nn.Module):
    """A model without blocks or hook points."""

    cfg = SimpleNamespace(n_layers=0)
    hook_dict: Mapping[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(4, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.line(tokens)[:, ::2, 0]
        return found

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any) -> Tensor:
        found: Tensor = self(tokens)
        return found


@dataclasses.dataclass(frozen=True)
class Lines(Signs):
    def make_model(self, size: Any, *, seed: int, device: torch.device | str) -> torch.nn.Module:
        return Line()


@dataclasses.dataclass(frozen=True)
class Repeated(lab.TokenProblem):
    tasks: tuple[str, ...] = ("0", "1", "2")
    n_points: int = 5
    d_vocab: int = 3
    n_tokens: int = 5
    defaults = SMALL

    def query_at(self, point: int) -> int:
        return point

    def sample(
        self, batch_size: int, generator: torch.Generator, *, labels: Tensor | None = None
    ) -> lab.Batch:
        if labels is None:
            labels = torch.randint(3, (batch_size,), generator=generator)
        tokens = labels[:, None].repeat(1, 5)
        return lab.Batch(tokens, tokens, labels)


# --- no waiting for the device ---


class Waits(TorchFunctionMode):
    """Counts the calls that make the host wait for a device, or copy to or from it."""

    READ = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu")
    COPIED = ("tensor", "as_tensor", "from_numpy", "nonzero", "unique", "masked_select", "cuda")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "to":
            waits = any(isinstance(one, (str, torch.device)) for one in args)
        elif name in ("__getitem__", "__setitem__"):
            waits = _reads_or_copies(args[1])
        else:
            waits = name in self.READ + self.COPIED
        if waits:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def _reads_or_copies(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list) or (isinstance(part, Tensor) and part.dtype == torch.bool)
        for part in parts
    )


def test_what_waits_is_counted() -> None:
    values, some = torch.ones(3), torch.tensor([True, False, True])
    waiting: list[Callable[[], Any]] = [
        lambda: values.sum().item(),
        lambda: float(values.sum()),
        lambda: bool(values[0] > 0),
        lambda: values.tolist(),
        lambda: values.to("cpu"),
        lambda: values[[0, 1]],
        lambda: values[some],
        lambda: torch.tensor([1.0]),
    ]
    for run in waiting:
        with Waits() as waits:
            run()
        assert len(waits.calls) == 1
    with Waits() as waits:
        values[torch.arange(2)].add_(1.0).mean()
        values.to(torch.float64)
    assert waits.calls == []


@pytest.mark.parametrize("case", ["paper", "small", "families", "tokens"])
def test_the_host_does_not_wait_between_saves(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = lab.PRESETS["small"]
    recipe = {
        "paper": lab.PRESETS["paper"],
        "small": small,
        "families": dataclasses.replace(small, problem=lab.RegressionFamilies(dim=4, n_points=4)),
        "tokens": dataclasses.replace(small, problem=Repeated()),
    }[case]
    config = dataclasses.replace(recipe, batch_size=2, n_eval=2, n_layers=2, n_checkpoints=1)
    step = loop.training_step(config, seed=0, device=torch.device("cpu"))
    step()
    with Waits() as waits:
        for _ in range(3):
            step()
    assert waits.calls == []
    # At a save it does wait: so the whole run waits as often as it saves, however long it is.
    monkeypatch.setattr(loop, "_SAVES", 4)
    counts = []
    for steps in (8, 24):
        with Waits() as waits:
            train(dataclasses.replace(config, steps=steps), tmp_path / str(steps))
        counts.append(len(waits.calls))
    assert counts[0] == counts[1] > 0
