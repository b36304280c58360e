"""Training by name: the presets, and ``train``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from transformer_lens_taskvec._utils.loggers import Logger, check_loggers, closing
from transformer_lens_taskvec.lab.problems import (
    Concepts,
    Lego,
    LinearOrLogistic,
    MimoEqualisation,
    NoisyLinear,
    PatternTasks,
    Represented,
    TriggeredBigrams,
)
from transformer_lens_taskvec.lab.problems.base import QUICK, Problem
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture
from transformer_lens_taskvec.lab.toy.model import ToyConfig
from transformer_lens_taskvec.lab.training.config_file import settings_of
from transformer_lens_taskvec.lab.training.folder import open_folder
from transformer_lens_taskvec.lab.training.loop import sample_training, train_recipe
from transformer_lens_taskvec.lab.training.on_problem import TrainConfig
from transformer_lens_taskvec.lab.training.recipe import Recipe
from transformer_lens_taskvec.lab.training.stopping import EarlyStopping
from transformer_lens_taskvec.planning import Plan

_PROBLEMS: Mapping[str, Problem] = {
    "noise_levels": NoisyLinear(),
    "linear_or_logistic": LinearOrLogistic(),
    "representations": Represented(),
    "mimo": MimoEqualisation(n_channels=1024),
    "bigrams": TriggeredBigrams(),
    "lego": Lego(),
    "patterns": PatternTasks(),
    "concepts": Concepts(),
}

PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {
        "paper": TrainConfig(),
        "small": TrainConfig(
            problem=SparseLinearMixture.small(),
            **{**QUICK, "n_layers": 5, "n_heads": 4, "d_model": 64, "steps": 26_000},
        ),
        "toy": ToyConfig(),
        **{
            name: TrainConfig(problem=problem, **problem.defaults)
            for name, problem in _PROBLEMS.items()
        },
        "representation": TrainConfig(
            problem=Represented.single(),
            **{**Represented.defaults, "steps": 4_000, "n_checkpoints": 30},
        ),
    }
)
"""Settings by name: the paper's, a model that two CPU cores train in minutes, the toy model, and a
model for each problem of the neighbourhood."""


def train(
    config: str | Recipe | Problem,
    out_dir: str | Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = True,
    autocast: bool = False,
    compile: bool = False,
    stop: EarlyStopping | None = None,
    loggers: Iterable[Logger] = (),
) -> Any:
    """Train a model of the lab, or resume a training that was interrupted, and return the run.

    Args:
        config: The name of a preset, a key of ``PRESETS``; a problem, which is trained with its own
            defaults; or settings of your own, such as
            ``dataclasses.replace(PRESETS["small"], steps=...)``.
        out_dir: The folder of the run.
        seed: Seed of the weights and of the data.
        steps: Training steps, in place of the settings'.
        device: Where to train; by default on CUDA if it is available.
        resume: Whether to resume the run in the folder; if not, the folder must hold no run.
        progress: Whether to show a progress bar with the error of each task.
        autocast: Whether to compute in bfloat16 where that is safe. It is faster on CUDA, and at
            the paper's size on a CPU with bfloat16 instructions.
        compile: Whether to compile the model first. It is faster on CUDA only.
        stop: When to end before the last step; by default never.
        loggers: What gets the numbers of each evaluation: the loss of each task, the training loss,
            seconds per step, learning rates. They do not change the run, and are closed in the end.

    Raises:
        TypeError: If one of ``loggers`` is not a :class:`Logger`.
        ValueError: If there is no such preset, or the folder holds a run with other settings.
        TrainingDiverged: If the training broke down; the last good state is still in the folder.

    Example:
        >>> import dataclasses, tempfile
        >>> from transformer_lens_taskvec import lab
        >>> config = dataclasses.replace(lab.PRESETS["small"], n_layers=1, n_checkpoints=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     half = lab.train(config, folder, steps=4, progress=False)
        >>> half.steps[-1], half.finished
        (4, True)
    """
    loggers, path = list(loggers), Path(out_dir)
    check_loggers(loggers)
    with closing(loggers):
        config, device = _chosen(config, steps), _device(device)
        how: dict[str, Any] = {"autocast": autocast, "compile": compile, "stop": stop}
        settings = settings_of(config, seed=seed, device=device, **how)
        open_folder(path, settings, resume=resume)
        where: dict[str, Any] = {"device": device, "progress": progress, "loggers": loggers}
        train_recipe(config, path, seed=seed, **where, **how)
    return config.load(path)


def plan_training(
    config: str | Recipe | Problem,
    *,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str | None = None,
    autocast: bool = False,
    compile: bool = False,
    stop: EarlyStopping | None = None,
) -> Plan:
    """Return what :func:`train` would run in an empty folder, by a few steps; nothing is written.

    Args:
        config: As for :func:`train`.
        seed: As for :func:`train`.
        steps: As for :func:`train`.
        device: As for :func:`train`.
        autocast: As for :func:`train`.
        compile: As for :func:`train`.
        stop: As for :func:`train`. The plan is of all steps, which is the most there can be.

    Raises:
        ValueError: If there is no such preset.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> plan = lab.plan_training("small", steps=1000)
        >>> plan.by_kind["training"]  # passes and tokens
        (1000, 1984000)
    """
    config, device = _chosen(config, steps), _device(device)
    sampled, most = sample_training(
        config, seed=seed, device=device, autocast=autocast, compile=compile
    )
    times = {"training": config.steps, "evaluation": len(config.checkpoint_steps())}
    by_kind, seconds = {}, 0.0
    for kind, (passes, tokens, each) in sampled.items():
        by_kind[kind] = times[kind] * passes, times[kind] * tokens
        seconds += times[kind] * each
    return Plan(by_kind, most, seconds)


def _chosen(config: str | Recipe | Problem, steps: int | None) -> Recipe:
    if isinstance(config, Problem):
        config = TrainConfig(problem=config, **config.defaults)
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"no preset {config!r}; there are {', '.join(PRESETS)}")
        config = PRESETS[config]
    if steps is not None:
        config = replace(config, steps=steps)
    return config


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
