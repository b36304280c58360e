"""Training from the first step to the last, and resuming one that was killed.

At the steps of the checkpoint schedule the model is evaluated per task and kept; in between, every
hundredth of the run, the state to resume from is saved. A training killed at any moment resumes
from the last saved state. On the same machine with the same number of threads, it ends in the same
bits as one that was never interrupted: the data come from one generator whose state is saved, and
everything else is a function of the step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.atomic_io import write_text
from transformer_lens_taskvec._utils.training_state import TrainingState, write_tensors
from transformer_lens_taskvec.lab.training.folder import (
    checkpoint_path,
    open_folder,
    read_metrics,
)
from transformer_lens_taskvec.lab.training.muon import Muon
from transformer_lens_taskvec.lab.training.recipe import Recipe

_DATA_SEED = 1_000_003
_SAVES = 100
_DIVERGED = 10.0


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
    resume: bool,
    progress: bool,
    autocast: bool,
    compile: bool,
) -> Any:
    """Train by these settings, or resume; the arguments are those of ``train``."""
    numerics = {"device": device.type, "autocast": autocast, "compile": compile}
    open_folder(path, {"seed": seed, **config.to_json(), **numerics}, resume=resume)
    state = _State.start(config, seed, device)
    saved = state.saved_in(path)
    taken = saved.load()
    forward: Callable[..., Any] = state.model.forward
    if compile:
        forward = torch.compile(forward)
    with _matmul_precision(device):
        _loop(config, path, state, saved, taken, forward, progress, autocast)
    return config.load(path)


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
        return cls(
            model,
            _optimizers(model, config),
            torch.Generator(device).manual_seed(_DATA_SEED + seed),
            torch.zeros((), device=device),
        )

    def saved_in(self, folder: Path) -> TrainingState:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return TrainingState(
            folder / "state.safetensors",
            {**tensors, "error_sum": self.error_sum},
            self.optimizers,
            {"data": self.generator},
        )


def _loop(
    config: Recipe,
    path: Path,
    state: _State,
    saved: TrainingState,
    taken: int | None,
    forward: Callable[..., Any],
    progress: bool,
    autocast: bool,
) -> None:
    """Continue after ``taken`` steps; None if the untrained model has not been evaluated yet.

    It waits for the device only where something is written.
    """
    checkpoints = set(config.checkpoint_steps())
    every = max(1, config.steps // _SAVES)
    records = [record for record in read_metrics(path) if record["step"] <= (taken or 0)]
    started = time.perf_counter() - (records[-1]["seconds"] if records else 0.0)
    with tqdm(total=config.steps, disable=not progress, unit="step", leave=False) as bar:
        if taken is None:
            records = [_keep(config, path, state, [], 0, started)]
            saved.save(0)
            taken = 0
        else:
            _write_metrics(path, records)
        bar.update(taken)
        bar.set_postfix_str(config.summary(records[-1]))
        for step in range(taken + 1, config.steps + 1):
            _take_step(config, state, step, forward, autocast)
            bar.update()
            if step in checkpoints:
                _check(config, state, records, step)
                records.append(_keep(config, path, state, records, step, started))
                bar.set_postfix_str(config.summary(records[-1]))
                state.error_sum.zero_()
                saved.save(step)
            elif step % every == 0:
                _check(config, state, records, step)
                saved.save(step)


def _take_step(
    config: Recipe,
    state: _State,
    step: int,
    forward: Callable[..., Any],
    autocast: bool,
) -> None:
    """Step number ``step``, counted from 1."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.rate(step)
    error = config.loss(forward, state.generator, autocast)
    error.backward()
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    state.error_sum += error.detach()


def _optimizers(model: nn.Module, config: Recipe) -> list[Optimizer]:
    parameters, matrices = list(model.parameters()), config.matrices(model)
    rest = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    adam_on = rest if config.optimizer == "muon" else parameters
    optimizers: list[Optimizer] = [
        Adam(adam_on, lr=config.learning_rate, betas=config.betas, fused=True)
    ]
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
    untrained = float(torch.tensor(records[0][config.loss_name]).mean())
    finite = bool(norms.isfinite().all()) and math.isfinite(error)
    if finite and error <= _DIVERGED * untrained:
        return
    what = (
        f"a mean error of {error:.3g} (the untrained model's is {untrained:.3g})"
        if finite
        else f"a mean error of {error:.3g} or parameters that are not finite"
    )
    raise TrainingDiverged(
        f"training broke down before step {step}: {what} since step {records[-1]['step']}. "
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
) -> dict[str, Any]:
    """Evaluate the model, and write it and its evaluation."""
    evaluation = config.evaluate(state.model)
    steps_since = step - records[-1]["step"] if records else 0
    record = {
        "step": step,
        "seconds": round(time.perf_counter() - started, 2),
        f"train_{config.loss_name}": float(state.error_sum) / steps_since if steps_since else None,
        **evaluation,
    }
    write_tensors(checkpoint_path(path, step), state.model.state_dict(), {"step": str(step)})
    _write_metrics(path, [*records, record])
    return record


def _write_metrics(path: Path, records: list[dict[str, Any]]) -> None:
    lines = (json.dumps(record) + "\n" for record in records)
    write_text(path / "metrics.jsonl", "".join(lines))


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
