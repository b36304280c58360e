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
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from torch.optim import Adam, Optimizer
from tqdm.auto import tqdm

from transformer_lens_taskvec.lab.mixtures import Mixture, SparseLinearMixture, balanced_labels
from transformer_lens_taskvec.lab.model import RegressionTransformer
from transformer_lens_taskvec.lab.optim import Muon
from transformer_lens_taskvec.lab.runs import (
    Run,
    TrainConfig,
    checkpoint_path,
    describe,
    load_run,
    read_metrics,
    write_tensors,
    write_text,
)

PRESETS: Mapping[str, TrainConfig] = MappingProxyType(
    {
        "paper": TrainConfig(),
        "small": TrainConfig(
            mixture=SparseLinearMixture.small(),
            n_layers=4,
            n_heads=4,
            d_model=64,
            init="fan_in",
            steps=25_000,
            batch_size=64,
            optimizer="muon",
            learning_rate=1e-3,
            betas=(0.9, 0.999),
            muon_learning_rate=3e-3,
            warmup=200,
            schedule="cosine",
        ),
    }
)
"""The settings that have a name: the paper's, and one that two CPU cores learn in minutes."""

_DATA_SEED = 1_000_003
_EVAL_SEED = 2_000_003
_SAVES = 100
_DIVERGED = 10.0


class TrainingDiverged(RuntimeError):
    """The error or a parameter is no longer finite, or the error has grown beyond reason."""


def train(
    config: str | TrainConfig,
    out_dir: str | Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = True,
    autocast: bool = False,
    compile: bool = False,
) -> Run:
    """Train a regression transformer, or go on with a run that was interrupted.

    Args:
        config: The name of a preset (``"paper"``, ``"small"``), or settings of one's own:
            ``dataclasses.replace(PRESETS["small"], mixture=...)``.
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
        The run, as :func:`~transformer_lens_taskvec.lab.runs.load_run` reads it.

    Raises:
        ValueError: If there is no such preset, or the folder holds a run with other settings.
        TrainingDiverged: If the training broke down; the last good state is still in the folder.
    """
    config = _resolve(config, steps)
    path = Path(out_dir)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    numerics = {"device": device.type, "autocast": autocast, "compile": compile}
    _open_folder(path, {**describe(config, seed), **numerics}, resume)
    state = _State.start(config, seed, device)
    saved = path / "state.safetensors"
    taken = state.load(saved) if saved.exists() else None
    forward = torch.compile(state.model.forward) if compile else state.model.forward
    with _matmul_precision(device):
        _loop(config, path, state, taken, forward, progress, autocast)
    return load_run(path, mixture=config.mixture)


def evaluate_mixture(
    model: RegressionTransformer, mixture: Mixture, *, n_eval: int = 250, seed: int = _EVAL_SEED
) -> Float[Tensor, "task point"]:
    """The model's mean squared error for each task at each position.

    Args:
        model: The model.
        mixture: What the sequences are drawn from.
        n_eval: Sequences a task.
        seed: Their seed; by default the one that training evaluates with.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    n_tasks = len(mixture.tasks)
    labels = balanced_labels(n_tasks, n_eval, device)
    batch = mixture.sample(len(labels), generator, labels=labels)
    with torch.no_grad():
        errors: Tensor = (model(batch.xs, batch.ys) - batch.ys).square()
    return errors.view(n_tasks, n_eval, -1).mean(1)


def _resolve(config: str | TrainConfig, steps: int | None) -> TrainConfig:
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
    saved = json.loads(file.read_text())
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} holds another run: its {name} is {saved.get(name)!r}, not {value!r}; "
                "choose another folder"
            )


@dataclasses.dataclass
class _State:
    """All that a training step changes."""

    model: RegressionTransformer
    optimizers: list[Optimizer]
    generator: torch.Generator
    error_sum: Tensor

    @classmethod
    def start(cls, config: TrainConfig, seed: int, device: torch.device) -> _State:
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
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        device = self.error_sum.device
        if device.type == "cpu" and int(metadata["threads"]) != torch.get_num_threads():
            warnings.warn(
                f"this run was trained with {metadata['threads']} threads and goes on with "
                f"{torch.get_num_threads()}: sums are rounded differently. For the same bits call "
                f"torch.set_num_threads({metadata['threads']}) first",
                stacklevel=3,
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
        return int(metadata["step"])


def _loop(
    config: TrainConfig,
    path: Path,
    state: _State,
    taken: int | None,
    forward: Callable[[Tensor, Tensor], Tensor],
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
    with tqdm(total=config.steps, disable=not progress, unit="step") as bar:
        if taken is None:
            records = [_keep(config, path, state, [], 0, started)]
            state.save(path / "state.safetensors", 0)
            taken = 0
        else:
            _write_metrics(path, records)
        bar.update(taken)
        bar.set_postfix_str(_summary(config, records[-1]))
        for step in range(taken + 1, config.steps + 1):
            _take_step(config, state, step, forward, autocast)
            bar.update()
            if step in checkpoints:
                _check(state, records, step)
                records.append(_keep(config, path, state, records, step, started))
                bar.set_postfix_str(_summary(config, records[-1]))
                state.error_sum.zero_()
                state.save(path / "state.safetensors", step)
            elif step % every == 0:
                _check(state, records, step)
                state.save(path / "state.safetensors", step)


def _take_step(
    config: TrainConfig,
    state: _State,
    step: int,
    forward: Callable[[Tensor, Tensor], Tensor],
    autocast: bool,
) -> None:
    """Step number ``step``, counted from 1."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * _rate(config, step)
    batch = config.mixture.sample(config.batch_size, state.generator)
    with torch.autocast(batch.xs.device.type, torch.bfloat16, enabled=autocast):
        predictions = forward(batch.xs, batch.ys)
    error = (predictions.float() - batch.ys).square().mean()
    error.backward()
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    state.error_sum += error.detach()


def _rate(config: TrainConfig, step: int) -> float:
    """The share of the full learning rate at a step."""
    if step <= config.warmup:
        return step / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def _optimizers(model: RegressionTransformer, config: TrainConfig) -> list[Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for name, p in named if name.startswith("blocks") and ".w_" in name]
    rest = [p for _, p in named if all(p is not matrix for matrix in matrices)]
    adam_on = rest if config.optimizer == "muon" else [p for _, p in named]
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


def _check(state: _State, records: list[dict[str, Any]], step: int) -> None:
    """Raise unless the state is worth keeping."""
    norms = torch.stack(torch._foreach_norm(list(state.model.parameters())))
    error = float(state.error_sum) / (step - records[-1]["step"])
    untrained = float(torch.tensor(records[0]["mse"]).mean())
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
    config: TrainConfig,
    path: Path,
    state: _State,
    records: list[dict[str, Any]],
    step: int,
    started: float,
) -> dict[str, Any]:
    """Evaluate the model, and write it and its evaluation."""
    mse = evaluate_mixture(state.model, config.mixture, n_eval=config.n_eval)
    steps_since = step - records[-1]["step"] if records else 0
    record = {
        "step": step,
        "seconds": round(time.perf_counter() - started, 2),
        "train_mse": float(state.error_sum) / steps_since if steps_since else None,
        "mse": mse.tolist(),
    }
    write_tensors(checkpoint_path(path, step), state.model.state_dict(), {"step": str(step)})
    _write_metrics(path, [*records, record])
    return record


def _write_metrics(path: Path, records: list[dict[str, Any]]) -> None:
    lines = (json.dumps(record) + "\n" for record in records)
    write_text(path / "metrics.jsonl", "".join(lines))


def _summary(config: TrainConfig, record: dict[str, Any]) -> str:
    """The error of each task over the second half of the sequence, for the progress bar."""
    half = config.mixture.n_points // 2
    means = [sum(curve[half:]) / len(curve[half:]) for curve in record["mse"]]
    pairs = zip(config.mixture.tasks, means, strict=True)
    return " ".join(f"{task} {mse:.3f}" for task, mse in pairs)


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
