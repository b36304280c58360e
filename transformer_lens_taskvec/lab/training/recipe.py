"""What a training needs to know: the settings of any training, and what each kind adds."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_taskvec._utils.atomic_io import reading
from transformer_lens_taskvec._utils.subclasses import subclass_named
from transformer_lens_taskvec.lab.model import check_size
from transformer_lens_taskvec.lab.training.folder import read_metrics, read_settings


@dataclass(frozen=True)
class Recipe(ABC):
    """The settings of a training, and the model, data and evaluation that go with them.

    Attributes:
        steps: Training steps.
        batch_size: Sequences per step.
        optimizer: ``"adam"`` for all parameters, or ``"muon"`` for the blocks' matrices and Adam
            for the rest.
        learning_rate: Adam's.
        betas: Adam's.
        muon_learning_rate: Muon's.
        weight_decay: Muon's.
        warmup: Steps over which the learning rates rise linearly, at most a tenth of all steps.
        schedule: What follows: ``"constant"``, or ``"cosine"`` down to zero at the last step.
        n_checkpoints: Number of evaluations, about evenly spaced in the logarithm of the step.
        n_eval: Sequences per task at each evaluation.
        n_layers: Blocks of the model.
        n_heads: Attention heads per block.
        d_model: Width of the residual stream.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> recipe = lab.PRESETS["small"]
        >>> isinstance(recipe, lab.Recipe), recipe.checkpoint_steps()[:4]
        (True, (0, 26, 31, 37))
    """

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
    n_layers: int = 12
    n_heads: int = 8
    d_model: int = 256

    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "optimizer": ("adam", "muon"),
        "schedule": ("constant", "cosine"),
    }
    loss_name: ClassVar[str]
    """The name of the loss, which is its key in the evaluations."""

    def __post_init__(self) -> None:
        check_size(self, "steps", "batch_size", "n_checkpoints", "n_eval")
        for name, allowed in self._choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")

    @abstractmethod
    def model(self, *, seed: int = 0, device: torch.device | str = "cpu") -> nn.Module:
        """An untrained model."""

    @abstractmethod
    def matrices(self, model: Any) -> list[nn.Parameter]:
        """The parameters that Muon is for."""

    @abstractmethod
    def loss(
        self,
        model: Any,
        forward: Callable[..., Any],
        generator: torch.Generator,
        autocast: bool,
    ) -> Tensor:
        """The loss of a new batch, drawn with the generator, on its device.

        Args:
            model: The model.
            forward: Its forward pass, compiled or not.
            generator: Source of the batch.
            autocast: Whether to compute in bfloat16 where that is safe.
        """

    @abstractmethod
    def evaluate(self, model: Any) -> dict[str, Any]:
        """An evaluation in the form of JSON; under ``loss_name`` the loss, of any shape."""

    @abstractmethod
    def task_losses(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The loss of each task that an evaluation holds, as one number."""

    @abstractmethod
    def summary(self, record: dict[str, Any]) -> str:
        """An evaluation in a few words, for the progress bar."""

    @abstractmethod
    def fewest_weights(self) -> int:
        """A lower bound on the number of weights, found without making the model."""

    @abstractmethod
    def run(self, path: Path, seed: int, records: list[dict[str, Any]]) -> Any:
        """The run of these settings in a folder, given its evaluations."""

    def load(self, path: str | Path) -> Any:
        """The run in a folder, whose settings must be these; see :func:`load_run`."""
        path = Path(path)
        saved, records = read_settings(path), read_metrics(path)
        with reading(path / "config.json", "damaged settings of a run"):
            seed = int(saved["seed"])
        with reading(path / "metrics.jsonl", "not the evaluations of this run"):
            return self.run(path, seed, records)

    def to_json(self) -> dict[str, Any]:
        """The settings in the form of JSON, and the class's name as ``kind``."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        described: dict[str, Any] = json.loads(
            json.dumps(settings, default=methodcaller("to_json"))
        )
        return {"kind": type(self).__name__, **described}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], **given: Any) -> Any:
        """The settings that :meth:`to_json` wrote, some of them replaced by those given."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: saved[name] for name in saved.keys() & names}
        if "betas" in known:
            known["betas"] = tuple(known["betas"])
        return cls(**{**known, **given})

    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps at which the model is evaluated and kept: 0, then a geometric series."""
        if self.n_checkpoints == 1:
            return (0, self.steps)
        first = max(1.0, self.steps / 1000)
        ratio = (self.steps / first) ** (1 / (self.n_checkpoints - 1))
        series = {round(first * ratio**i) for i in range(self.n_checkpoints)}
        return tuple(sorted({0, *series, self.steps}))

    def mean_loss(self, record: Mapping[str, Any]) -> float:
        """The mean over tasks of :meth:`task_losses`, without those that are not numbers."""
        losses = [loss for loss in self.task_losses(record).values() if not math.isnan(loss)]
        return fmean(losses) if losses else math.nan

    def numbers(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What loggers get of the last evaluation, given all until then.

        The mean loss and each task's, the mean training loss since the evaluation before, seconds
        per step since then (evaluating and saving included), and the learning rates.
        """
        record = records[-1]
        step, trained = record["step"], record[f"train_{self.loss_name}"]
        losses = {f"loss/{task}": loss for task, loss in self.task_losses(record).items()}
        found = {"loss": self.mean_loss(record), **losses}
        if trained is not None:
            found["train_loss"] = trained
        if len(records) > 1:
            before = records[-2]
            seconds = record["seconds"] - before["seconds"]
            found["seconds_per_step"] = seconds / (step - before["step"])
        found["learning_rate"] = self.learning_rate * self.rate(step)
        if self.optimizer == "muon":
            found["muon_learning_rate"] = self.muon_learning_rate * self.rate(step)
        return found

    def rate(self, step: int) -> float:
        """The share of the full learning rate at a step."""
        warmup = min(self.warmup, self.steps // 10)
        if step < warmup:
            return step / warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, self.steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))


def stacked(
    records: Sequence[Mapping[str, Any]], **shapes: tuple[int, ...]
) -> dict[str, Float[Tensor, "checkpoint ..."]]:
    """What evaluations hold under these names; a ValueError if it is not of these shapes."""
    found = {}
    for name, shape in shapes.items():
        values = torch.tensor([record[name] for record in records], dtype=torch.float32)
        if records and values.shape[1:] != shape:
            raise ValueError(f"{name} of shape {tuple(values.shape[1:])}, not {shape}")
        found[name] = values.view(len(records), *shape)
    return found


def recipe_named(name: str) -> type[Recipe]:
    """The class of settings of this name; a ValueError if none is defined."""
    recipe: type[Recipe] | None = subclass_named(Recipe, name)
    if recipe is None:
        raise ValueError(f"no kind of run {name!r} is defined")
    return recipe


def stopped_in(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Why training ended at the last evaluation, or None if nothing ended it there."""
    reason = records[-1].get("stopped") if records else None
    if reason is not None and not isinstance(reason, str):
        raise ValueError(f"stopped is {reason!r}, not a text")
    return reason
