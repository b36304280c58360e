"""Training from the first step to the last, and resuming one that was killed.

At the steps of the checkpoint schedule the model is evaluated and kept; in between, every hundredth
of the run, the state to resume from is saved. A training killed at any moment resumes from there.
On the same machine with the same number of threads, it ends in the same bits as one that was never
interrupted: the data come from one generator whose state is saved, and everything else is a
function of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.loggers import Logger, log_once
from transformer_lens_taskvec._utils.training_state import TrainingState, write_tensors
from transformer_lens_taskvec.lab.training.folder import (
    checkpoint_path,
    read_metrics,
    write_metrics,
)
from transformer_lens_taskvec.lab.training.muon import Muon
from transformer_lens_taskvec.lab.training.recipe import Recipe, stopped_in
from transformer_lens_taskvec.lab.training.stopping import EarlyStopping
from transformer_lens_taskvec.models.replay import most_alive

_DATA_SEED = 1_000_003
_SAVES = 100
_DIVERGED = 10.0
_WARMING, _SAMPLED = 3, 9


class TrainingDiverged(RuntimeError):
    """The error or a parameter is no longer finite, or the error has exploded.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> issubclass(lab.TrainingDiverged, RuntimeError)
        True
    """


def train_recipe(
    config: Recipe,
    path: Path,
    *,
    seed: int,
    device: torch.device,
    progress: bool,
    autocast: bool,
    compile: bool,
    stop: EarlyStopping | None,
    loggers: Sequence[Logger],
) -> None:
    """Take all steps, or those that a run in the folder still lacks.

    It waits for the device only where something is written. Loggers get an evaluation when it and
    the state are safe.
    """
    state = _State.start(config, seed, device)
    draw_loss = _drawing(config, state, autocast=autocast, compile=compile)
    saved = state.saved_in(path)
    taken = saved.load()  # None if the untrained model has not been evaluated yet
    records = [] if taken is None else [r for r in read_metrics(path) if r["step"] <= taken]
    started = time.perf_counter() - (records[-1]["seconds"] if records else 0.0)
    checkpoints, every = set(config.checkpoint_steps()), max(1, config.steps // _SAVES)
    logged = path / "logged.json"
    bar = tqdm(total=config.steps, disable=not progress, unit="step", leave=False)
    with _matmul_precision(device), bar:
        if records:
            write_metrics(path, records)
            bar.update(taken)
            bar.set_postfix_str(config.summary(records[-1]))
            log_once(loggers, _rows(config, records), logged)
        if stopped_in(records) is not None:
            return
        for step in range(0 if taken is None else taken + 1, config.steps + 1):
            if step > 0:
                _take_step(config, state, step, draw_loss)
                bar.update()
            if step not in checkpoints and step % every:
                continue
            if step > 0:
                _check(config, state, records, step)
            if step in checkpoints:
                records.append(_keep(config, path, state, records, step, started, stop))
                bar.set_postfix_str(config.summary(records[-1]))
                state.error_sum.zero_()
            saved.save(step)
            if step in checkpoints:
                log_once(loggers, _rows(config, records), logged)
                if stopped_in(records) is not None:
                    return


def _rows(config: Recipe, records: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """What loggers get of each evaluation."""
    return [
        (record["step"], config.numbers(records[: number + 1]))
        for number, record in enumerate(records)
    ]


def sample_training(
    config: Recipe, *, seed: int, device: torch.device, autocast: bool, compile: bool
) -> tuple[dict[str, tuple[int, int, float]], int]:
    """Return what a training step and an evaluation take: passes, tokens and seconds each.

    A few steps of a model are taken that is then dropped. The second number is the most bytes of
    new tensors at once.
    """
    state = _State.start(config, seed, device)
    first = _first_block(state.model)
    entering: list[int] = []

    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        entering.append(next(iter((*args, *kwargs.values()))).shape[:2].numel())

    def timed(run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with _matmul_precision(device):
        with first.register_forward_pre_hook(note, with_kwargs=True):
            evaluating = timed(partial(config.evaluate, state.model))
            evaluation = len(entering), sum(entering), evaluating
            entering.clear()
            plain = _drawing(config, state, autocast=autocast, compile=False)
            most = most_alive(partial(_take_step, config, state, 1, plain))
        draw_loss = _drawing(config, state, autocast=autocast, compile=compile)
        step = partial(_take_step, config, state, 1, draw_loss)
        for _ in range(_WARMING):
            step()
        seconds = median(timed(step) for _ in range(_SAMPLED))
    return {"training": (1, sum(entering), seconds), "evaluation": evaluation}, most


def _first_block(model: nn.Module) -> nn.Module:
    """What every token enters once: the first block, or the first part with weights."""
    parts = [*model.modules()][1:]
    blocks = [part[0] for part in parts if isinstance(part, nn.ModuleList)]
    weighted = [part for part in parts if [*part.parameters(recurse=False)]]
    return [*blocks, *weighted, model][0]


def training_step(
    config: Recipe,
    *,
    seed: int,
    device: torch.device,
    autocast: bool = False,
    compile: bool = False,
) -> Callable[[], None]:
    """A function that takes a training step of a new model, as a training does; for measurements.

    Nothing is written, and no call waits for the device.
    """
    state = _State.start(config, seed, device)
    draw_loss = _drawing(config, state, autocast=autocast, compile=compile)
    return partial(_take_step, config, state, config.steps // 2, draw_loss)


@dataclass
class _State:
    """All that a training step changes."""

    model: nn.Module
    optimizers: list[Optimizer]
    generator: torch.Generator
    error_sum: Tensor

    @classmethod
    def start(cls, config: Recipe, seed: int, device: torch.device) -> _State:
        model = config.model(seed=seed, device=device)
        data = torch.Generator(device).manual_seed(_DATA_SEED + seed)
        return cls(model, _optimizers(model, config), data, torch.zeros((), device=device))

    def saved_in(self, folder: Path) -> TrainingState:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors["error_sum"] = self.error_sum
        file = folder / "state.safetensors"
        return TrainingState(file, tensors, self.optimizers, {"data": self.generator})


def _drawing(
    config: Recipe, state: _State, *, autocast: bool, compile: bool
) -> Callable[[], Tensor]:
    """What draws a batch and returns its loss."""
    forward = torch.compile(state.model.forward) if compile else state.model.forward
    return partial(config.loss, state.model, forward, state.generator, autocast)


def _take_step(config: Recipe, state: _State, step: int, draw_loss: Callable[[], Tensor]) -> None:
    """Step number ``step``, counted from 1."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.rate(step)
    error = draw_loss()
    error.backward()
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    state.error_sum += error.detach()


def _optimizers(model: nn.Module, config: Recipe) -> list[Optimizer]:
    parameters, matrices = list(model.parameters()), config.matrices(model)
    rest = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    adam_on = rest if config.optimizer == "muon" else parameters
    adam = Adam(adam_on, lr=config.learning_rate, betas=config.betas, fused=True)
    optimizers: list[Optimizer] = [adam]
    if config.optimizer == "muon":
        muon = Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _check(config: Recipe, state: _State, records: list[dict[str, Any]], step: int) -> None:
    """Raise unless the state is worth keeping."""
    norms = torch.stack(torch._foreach_norm(list(state.model.parameters())))
    error = float(state.error_sum) / (step - records[-1]["step"])
    untrained = float(torch.tensor(records[0][config.loss_name]).nanmean())
    finite = bool(norms.isfinite().all()) and math.isfinite(error)
    if finite and error <= _DIVERGED * untrained:
        return
    what = (
        f"(the untrained model's is {untrained:.3g})"
        if finite
        else "or parameters that are not finite"
    )
    raise TrainingDiverged(
        f"training broke down before step {step}: a mean error of {error:.3g} {what} "
        f"since step {records[-1]['step']}. "
        "The last good state and all earlier checkpoints are kept. In another folder, try a "
        "smaller learning_rate or muon_learning_rate, or a longer warmup"
    )


def _keep(
    config: Recipe,
    path: Path,
    state: _State,
    records: list[dict[str, Any]],
    step: int,
    started: float,
    stop: EarlyStopping | None,
) -> dict[str, Any]:
    """Evaluate the model, and write it and its evaluation."""
    steps_since = step - records[-1]["step"] if records else 0
    record = {
        "step": step,
        "seconds": round(time.perf_counter() - started, 2),
        f"train_{config.loss_name}": float(state.error_sum) / steps_since if steps_since else None,
        **config.evaluate(state.model),
    }
    if stop is not None and step < config.steps:
        so_far = [*records, record]
        reason = stop.reason([one["step"] for one in so_far], list(map(config.mean_loss, so_far)))
        record |= {} if reason is None else {"stopped": reason}
    write_tensors(checkpoint_path(path, step), state.model.state_dict(), {"step": str(step)})
    write_metrics(path, [*records, record])
    return record


@contextmanager
def _matmul_precision(device: torch.device) -> Iterator[None]:
    """TF32 for matrix products on CUDA; the setting is restored afterwards."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
