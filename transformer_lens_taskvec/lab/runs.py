"""What a training run is: its settings, its folder, and reading both back.

A run's folder holds ``config.json`` (settings and seed), ``metrics.jsonl`` (one evaluation a line),
``checkpoints/step_000000.safetensors`` (the model at each evaluation) and, to resume from,
``state.safetensors`` (model, optimisers and generator at the last save). Every file is written
beside its place and then moved there, so that none is ever half written.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from transformer_lens_taskvec.lab import mixtures
from transformer_lens_taskvec.lab.mixtures import Mixture, RegressionFamilies, SparseLinearMixture
from transformer_lens_taskvec.lab.model import RegressionConfig, RegressionTransformer

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run; the defaults are the paper's (App. D).

    Attributes:
        mixture: What the sequences are drawn from.
        n_layers: Blocks of the model.
        n_heads: Attention heads of a block.
        d_model: Width of the residual stream.
        init: ``"gpt2"`` for standard deviations of 0.02, ``"fan_in"`` for ones that keep the scale
            of activations; either way, smaller for projections back into the residual stream.
        steps: Training steps.
        batch_size: Sequences a step.
        optimizer: ``"adam"`` for all parameters, or ``"muon"`` for the blocks' matrices and Adam
            for the rest.
        learning_rate: Adam's.
        betas: Adam's.
        muon_learning_rate: Muon's.
        weight_decay: Muon's.
        warmup: Steps over which the learning rates rise linearly.
        schedule: What follows: ``"constant"``, or ``"cosine"`` down to zero at the last step.
        n_checkpoints: Evaluations, about evenly spaced in the logarithm of the step.
        n_eval: Sequences a task at each evaluation.
    """

    mixture: Mixture = field(default_factory=SparseLinearMixture)
    n_layers: int = 12
    n_heads: int = 8
    d_model: int = 256
    init: Literal["gpt2", "fan_in"] = "gpt2"
    steps: int = 80_000
    batch_size: int = 128
    optimizer: Literal["adam", "muon"] = "adam"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.9999)
    muon_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    n_checkpoints: int = 40
    n_eval: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "n_checkpoints", "n_eval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices = {
            "init": ("gpt2", "fan_in"),
            "optimizer": ("adam", "muon"),
            "schedule": ("constant", "cosine"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be in [0, {self.steps}], steps; got {self.warmup}")

    def model(self, *, seed: int = 0, device: torch.device | str = "cpu") -> RegressionTransformer:
        """An untrained model of this size."""
        cfg = RegressionConfig(
            d_input=self.mixture.dim,
            n_points=self.mixture.n_points,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            init=self.init,
            device=str(device),
        )
        return RegressionTransformer(cfg, seed=seed)

    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps at which the model is evaluated and kept: 0, then a geometric series."""
        if self.n_checkpoints == 1:
            return (0, self.steps)
        first = max(1.0, self.steps / 1000)
        ratio = (self.steps / first) ** (1 / (self.n_checkpoints - 1))
        series = {round(first * ratio**i) for i in range(self.n_checkpoints)}
        return tuple(sorted({0, *series, self.steps}))


@dataclass(frozen=True, repr=False)
class Run:
    """A training run, finished or not, as it stands in its folder.

    Attributes:
        path: The folder.
        config: Its settings.
        seed: The seed of weights and data.
        steps: The steps at which there is an evaluation and a checkpoint.
        mse: Mean squared error at each of them, ``[checkpoint, task, point]``.
        train_mse: The mean error of the training steps since the checkpoint before; NaN at step 0.
    """

    path: Path
    config: TrainConfig
    seed: int
    steps: tuple[int, ...]
    mse: Float[Tensor, "checkpoint task point"]
    train_mse: tuple[float, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the latent tasks."""
        return self.config.mixture.tasks

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        return bool(self.steps) and self.steps[-1] == self.config.steps

    @property
    def late_mse(self) -> Float[Tensor, "checkpoint task"]:
        """The mean error over the second half of the sequence."""
        return self.mse[..., self.mse.shape[-1] // 2 :].mean(-1)

    def model(
        self, step: int | None = None, *, device: torch.device | str = "cpu"
    ) -> RegressionTransformer:
        """The model at a checkpoint, the last one by default, in evaluation mode.

        Raises:
            ValueError: If there is no checkpoint of that step.
        """
        step = self.steps[-1] if step is None else step
        if step not in self.steps:
            raise ValueError(f"no checkpoint at step {step}; there are {list(self.steps)}")
        model = self.config.model(device=device)
        model.cfg.model_name = f"{self.path.name}@{step}"
        model.load_state_dict(load_file(checkpoint_path(self.path, step), device=str(device)))
        return model.eval()

    def to_frame(self) -> pd.DataFrame:
        """One row for each checkpoint, task and point."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.steps, self.tasks, range(self.mse.shape[-1])], names=["step", "task", "point"]
        )
        return pd.DataFrame({"mse": self.mse.flatten().numpy()}, index=index).reset_index()

    def __repr__(self) -> str:
        late = ", ".join(
            f"{task} {float(mse):.4f}"
            for task, mse in zip(self.tasks, self.late_mse[-1], strict=True)
        )
        return (
            f"Run({str(self.path)!r}: step {self.steps[-1]} of {self.config.steps}, "
            f"{len(self.steps)} checkpoints, late MSE: {late})"
        )


def load_run(path: str | Path, *, mixture: Mixture | None = None) -> Run:
    """Read a run from its folder.

    Args:
        path: The folder that ``train`` wrote.
        mixture: The mixture of the run, needed when it has functions of the user's own, which no
            file can hold.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        ValueError: If the mixture is needed and not given.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} holds no run: there is no config.json in it")
    saved = json.loads((path / "config.json").read_text())
    seed = saved.pop("seed")
    description = saved.pop("mixture")
    saved["betas"] = tuple(saved["betas"])
    known = {name: saved[name] for name in saved.keys() & _settings()}
    config = TrainConfig(mixture=mixture or _mixture_from(description), **known)
    records = read_metrics(path)
    return Run(
        path=path,
        config=config,
        seed=seed,
        steps=tuple(record["step"] for record in records),
        mse=torch.tensor([record["mse"] for record in records]),
        train_mse=tuple(
            float("nan") if record["train_mse"] is None else record["train_mse"]
            for record in records
        ),
    )


def _settings() -> set[str]:
    return {setting.name for setting in dataclasses.fields(TrainConfig)}


def describe(config: TrainConfig, seed: int) -> dict[str, Any]:
    """The settings as JSON has them."""
    fields = {name: getattr(config, name) for name in sorted(_settings())}
    fields["mixture"] = _mixture_to(config.mixture)
    described: dict[str, Any] = json.loads(json.dumps({"seed": seed, **fields}))
    return described


def checkpoint_path(path: Path, step: int) -> Path:
    """Where the model at a step is kept."""
    return path / "checkpoints" / f"step_{step:06d}.safetensors"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, in order."""
    file = path / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    _write(path, lambda beside: beside.write_text(text))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a whole safetensors file or nothing."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda beside: save_file(tensors, beside, metadata))


def _write(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    os.replace(beside, path)


def _mixture_to(mixture: Mixture) -> dict[str, Any]:
    if type(mixture) is SparseLinearMixture:
        return {"kind": "SparseLinearMixture", **dataclasses.asdict(mixture)}
    if type(mixture) is RegressionFamilies:
        return {
            "kind": "RegressionFamilies",
            "families": {name: _family_to(family) for name, family in mixture.families.items()},
            "dim": mixture.dim,
            "noise_variance": mixture.noise_variance,
            "n_points": mixture.n_points,
        }
    return {"kind": type(mixture).__qualname__, "tasks": list(mixture.tasks), "own": True}


def _mixture_from(description: dict[str, Any]) -> Mixture:
    fields = dict(description)
    kind = fields.pop("kind")
    if kind == "SparseLinearMixture":
        fields["bases"] = tuple(tuple(basis) for basis in fields["bases"])
        return SparseLinearMixture(**fields)
    if kind == "RegressionFamilies":
        families = {name: _family_from(name, family) for name, family in fields["families"].items()}
        return RegressionFamilies(**{**fields, "families": families})
    raise ValueError(f"this run's mixture is a {kind} of its author's; give it as mixture=")


_FUNCTIONS: Mapping[str, mixtures.Family] = {
    "linear": mixtures.linear,
    "quadratic": mixtures.quadratic,
}
_CLASSES: Mapping[str, Any] = {
    "SparseLinear": mixtures.SparseLinear,
    "LeakyReLU": mixtures.LeakyReLU,
    "LinearOnRepresentation": mixtures.LinearOnRepresentation,
}


def _family_to(family: mixtures.Family) -> dict[str, Any]:
    for name, function in _FUNCTIONS.items():
        if family is function:
            return {"function": name}
    if type(family).__name__ in _CLASSES and dataclasses.is_dataclass(family):
        return {"class": type(family).__name__, **dataclasses.asdict(cast(Any, family))}
    return {"own": getattr(family, "__qualname__", type(family).__qualname__)}


def _family_from(name: str, description: dict[str, Any]) -> mixtures.Family:
    fields = dict(description)
    if "function" in fields:
        return _FUNCTIONS[fields["function"]]
    if "class" in fields:
        family: mixtures.Family = _CLASSES[fields.pop("class")](**fields)
        return family
    raise ValueError(
        f"the family {name!r} is a function of its author's ({fields['own']}); give the run's "
        "mixture as mixture="
    )
