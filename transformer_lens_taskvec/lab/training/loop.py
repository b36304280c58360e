"""Training on a mixture, so that what it learns can be watched and a killed run goes on.

``train("small", "runs/small")`` is the whole of it. At the steps of the checkpoint schedule the
model is evaluated per task and kept; in between, every hundredth of the run, the state to resume
from is saved. Killed at any moment, the same call goes on from the last saved state, and on the
same machine, with as many threads, ends in the same bits as a run that was never interrupted: the
data come from one generator whose state is saved, and all else is a function of the step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.atomic_io import reading, write_text
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture
from transformer_lens_taskvec.lab.toy.model import ToyConfig
from transformer_lens_taskvec.lab.training.muon import Muon
from transformer_lens_taskvec.lab.training.recipe import Recipe
from transformer_lens_taskvec.lab.training.runs import (
    TrainConfig,
    checkpoint_path,
    read_metrics,
    read_settings,
    write_tensors,
)

PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {
        "paper": TrainConfig(),
        "small": TrainConfig(
            mixture=SparseLinearMixture.small(),
            n_layers=5,
            n_heads=4,
            d_model=64,
            init="fan_in",
            steps=26_000,
            batch_size=64,
            optimizer="muon",
            learning_rate=1e-3,
            betas=(0.9, 0.999),
            muon_learning_rate=3e-3,
            warmup=200,
            schedule="cosine",
        ),
        "toy": ToyConfig(),
    }
)
"""The settings that have a name: the paper's, one that two CPU cores learn in minutes, the toy."""

_DATA_SEED = 1_000_003
_SAVES = 100
_DIVERGED = 10.0


class TrainingDiverged(RuntimeError):
    """The error or a parameter is no longer finite, or the error has grown beyond reason.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> issubclass(lab.TrainingDiverged, RuntimeError)
        True
    """


def train(
    config: str | Recipe,
    out_dir: str | Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = True,
    autocast: bool = False,
    compile: bool = False,
) -> Any:
    """Train a model of the lab, or go on with a run that was interrupted.

    Args:
        config: The name of a preset (``"paper"``, ``"small"``, ``"toy"``), or settings of one's
            own: ``dataclasses.replace(PRESETS["small"], mixture=...)``.
        out_dir: The folder of the run.
        seed: Seed of the weights and of the data.
        steps: Training steps, in place of the settings'; warm-up and schedule are fitted to them.
        device: Where to train; CUDA if there is any, by default.
        resume: Whether to go on with what the folder holds; otherwise it must hold no run.
        progress: Whether to show a progress bar with the error of each task.
        autocast: Whether to compute in bfloat16 where that is safe; it pays on CUDA, and on a CPU
            with bfloat16 instructions at the paper's size.
        compile: Whether to compile the model first; it pays on CUDA only.

    Returns:
        The run, as :func:`load_run` reads it, or
        :func:`load_toy_run` one of the toy model.

    Raises:
        ValueError: If there is no such preset, or the folder holds a run with other settings.
        TrainingDiverged: If the training broke down; the last good state is still in the folder.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> import dataclasses, tempfile
        >>> config = dataclasses.replace(lab.PRESETS["small"], n_layers=1, n_checkpoints=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     half = lab.train(config, folder, steps=4, progress=False)
        >>> half.steps[-1], half.finished
        (4, True)
    """
    config = _resolve(config, steps)
    path = Path(out_dir)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    numerics = {"device": device.type, "autocast": autocast, "compile": compile}
    _open_folder(path, {"seed": seed, **config.described(), **numerics}, resume)
    state = _State.start(config, seed, device)
    saved = path / "state.safetensors"
    taken = state.load(saved) if saved.exists() else None
    forward: Callable[..., Any] = state.model.forward
    if compile:
        forward = torch.compile(forward)
    with _matmul_precision(device):
        _loop(config, path, state, taken, forward, progress, autocast)
    return config.load(path)


def _resolve(config: str | Recipe, steps: int | None) -> Recipe:
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"no preset {config!r}; there are {', '.join(PRESETS)}")
        config = PRESETS[config]
    if steps is None:
        return config
    return dataclasses.replace(config, steps=steps, warmup=min(config.warmup, steps // 10))


def _open_folder(path: Path, settings: dict[str, Any], resume: bool) -> None:
    """Make the folder a run's, or check that it is the run of these settings."""
    file = path / "config.json"
    if not file.exists():
        write_text(file, json.dumps(settings, indent=1) + "\n")
        return
    if not resume:
        raise ValueError(f"{path} already holds a run; choose another folder, or resume it")
    saved = read_settings(path)
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} holds another run: its {name} is {saved.get(name)!r}, not {value!r}; "
                "choose another folder"
            )


@dataclasses.dataclass
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

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, parameter in enumerate(_parameters(optimizer)):
                for key, value in optimizer.state[parameter].items():
                    found[f"optimizer.{number}.{index}.{key}"] = value
        return {**found, "generator": self.generator.get_state(), "error_sum": self.error_sum}

    def save(self, path: Path, step: int) -> None:
        metadata = {"step": str(step), "threads": str(torch.get_num_threads())}
        write_tensors(path, self.tensors(), metadata)

    def load(self, path: Path) -> int:
        """Put back a saved state; returns the steps that had been taken."""
        with reading(path, "damaged state; remove the folder to train anew"):
            return self._load(path)

    def _load(self, path: Path) -> int:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(metadata["step"])
        if step < 0:
            raise ValueError(f"it is of step {step}")
        device = self.error_sum.device
        if device.type == "cpu" and int(metadata["threads"]) != torch.get_num_threads():
            warnings.warn(
                f"this run was trained with {metadata['threads']} threads and goes on with "
                f"{torch.get_num_threads()}: sums are rounded differently. For the same bits call "
                f"torch.set_num_threads({metadata['threads']}) first",
                stacklevel=4,
            )
        weights = {
            name.removeprefix("model."): value
            for name, value in saved.items()
            if name.startswith("model.")
        }
        self.model.load_state_dict(weights)
        for number, optimizer in enumerate(self.optimizers):
            for index, parameter in enumerate(_parameters(optimizer)):
                prefix = f"optimizer.{number}.{index}."
                optimizer.state[parameter] = {
                    name.removeprefix(prefix): value.to(device, copy=True)
                    for name, value in saved.items()
                    if name.startswith(prefix)
                }
        self.generator.set_state(saved["generator"])
        self.error_sum = saved["error_sum"].to(device, copy=True)
        return step


def _loop(
    config: Recipe,
    path: Path,
    state: _State,
    taken: int | None,
    forward: Callable[..., Any],
    progress: bool,
    autocast: bool,
) -> None:
    """Go on from ``taken`` steps; None if the untrained model has not been evaluated yet.

    The device is waited for where something is written, and nowhere else.
    """
    checkpoints = set(config.checkpoint_steps())
    every = max(1, config.steps // _SAVES)
    records = [record for record in read_metrics(path) if record["step"] <= (taken or 0)]
    started = time.perf_counter() - (records[-1]["seconds"] if records else 0.0)
    with tqdm(total=config.steps, disable=not progress, unit="step", leave=False) as bar:
        if taken is None:
            records = [_keep(config, path, state, [], 0, started)]
            state.save(path / "state.safetensors", 0)
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
                state.save(path / "state.safetensors", step)
            elif step % every == 0:
                _check(config, state, records, step)
                state.save(path / "state.safetensors", step)


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


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
        "The last good state and all checkpoints before are kept; try a smaller learning_rate "
        "(muon_learning_rate) or a longer warmup in another folder"
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
    """TF32 for matrix products on CUDA, and the setting as it was afterwards."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
