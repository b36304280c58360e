"""Training on a problem: the settings, and the run that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_taskvec.lab.evaluation import evaluate_problem
from transformer_lens_taskvec.lab.model import RegressionConfig, RegressionTransformer
from transformer_lens_taskvec.lab.problems.base import Problem, check_problem, problem_from_json
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture
from transformer_lens_taskvec.lab.training.recipe import Recipe, stacked
from transformer_lens_taskvec.lab.training.runs import TrainingRun, load_run


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """The settings of a training on a problem, besides those of :class:`Recipe`.

    The defaults are the paper's (App. D).

    Attributes:
        problem: What the sequences are drawn from.
        init: The scale of the initial weights; see :class:`RegressionConfig`.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> config = lab.TrainConfig()
        >>> config.n_layers, config.problem.tasks, config.steps
        (12, ('B1', 'B2', 'B3', 'B4'), 80000)
    """

    problem: Problem = field(default_factory=SparseLinearMixture)
    init: Literal["gpt2", "fan_in"] = "gpt2"

    _choices: ClassVar[dict[str, tuple[str, ...]]] = {**Recipe._choices, "init": ("gpt2", "fan_in")}
    loss_name: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_problem(self.problem)

    def model(self, *, seed: int = 0, device: torch.device | str = "cpu") -> RegressionTransformer:
        """An untrained model of this size."""
        cfg = RegressionConfig(
            d_input=self.problem.dim,
            n_points=self.problem.n_points,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            init=self.init,
            device=str(device),
        )
        return RegressionTransformer(cfg, seed=seed)

    def matrices(self, model: Any) -> list[nn.Parameter]:
        """The blocks' weight matrices."""
        named = model.named_parameters()
        return [p for name, p in named if name.startswith("blocks") and ".w_" in name]

    def loss(
        self, forward: Callable[..., Any], generator: torch.Generator, autocast: bool
    ) -> Tensor:
        """The mean squared error over every point of a new batch."""
        batch = self.problem.sample(self.batch_size, generator)
        with torch.autocast(batch.xs.device.type, torch.bfloat16, enabled=autocast):
            predictions = forward(batch.xs, batch.ys)
        error: Tensor = (predictions.float() - batch.ys).square().mean()
        return error

    def evaluate(self, model: Any) -> dict[str, Any]:
        """The mean squared error of each task at each point."""
        return {"loss": evaluate_problem(model, self.problem, n_eval=self.n_eval).tolist()}

    def summary(self, record: dict[str, Any]) -> str:
        """The error of each task over the second half of the sequence."""
        half = self.problem.n_points // 2
        curves = zip(self.problem.tasks, record["loss"], strict=True)
        return " ".join(f"{task} {fmean(curve[half:]):.3f}" for task, curve in curves)

    def fewest_weights(self) -> int:
        """The weights of the blocks' matrices, the read-in and the positions."""
        ends = (self.problem.dim + 2 * self.problem.n_points) * self.d_model
        return 12 * self.n_layers * self.d_model**2 + ends

    def run(self, path: Path, seed: int, records: list[dict[str, Any]]) -> Run:
        """The run in a folder, given its evaluations."""
        curves = stacked(records, loss=(len(self.problem.tasks), self.problem.n_points))
        train = [record["train_loss"] for record in records]
        train_loss = tuple(float("nan" if loss is None else loss) for loss in train)
        steps = tuple(record["step"] for record in records)
        return Run(path, self, seed, steps, **curves, train_loss=train_loss)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], **given: Any) -> TrainConfig:
        """As for :meth:`Recipe.from_json`."""
        problem = given.get("problem") or problem_from_json(saved["problem"])
        config: TrainConfig = super().from_json(saved, **{**given, "problem": problem})
        return config


@dataclass(frozen=True, repr=False)
class Run(TrainingRun):
    """A :class:`TrainingRun` on a problem.

    Attributes:
        loss: Mean squared error at each checkpoint, ``[checkpoint, task, point]``.
        train_loss: The mean error of the training steps since the previous checkpoint; NaN at
            step 0.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> run.tasks, run.late_loss[-1].shape, run.model().cfg.n_layers
        (('B1', 'B2', 'B3', 'B4'), torch.Size([4]), 5)
    """

    config: TrainConfig
    loss: Float[Tensor, "checkpoint task point"]
    train_loss: tuple[float, ...]

    _table: ClassVar[tuple[str, str]] = ("loss", "point")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the latent tasks."""
        return self.config.problem.tasks

    @property
    def late_loss(self) -> Float[Tensor, "checkpoint task"]:
        """The mean error over the second half of the sequence."""
        return self.loss[..., self.loss.shape[-1] // 2 :].mean(-1)

    def model(
        self, step: int | None = None, *, device: torch.device | str = "cpu"
    ) -> RegressionTransformer:
        """The model at a checkpoint, the last one by default, in evaluation mode.

        Raises:
            ValueError: If there is no checkpoint of that step, or it is damaged.
        """
        model, name = self.restored(step, lambda: self.config.model(device=device))
        model.cfg.model_name = name
        return model.eval()

    def _summary(self) -> str:
        late = zip(self.tasks, self.late_loss[-1], strict=True)
        return ", late loss: " + ", ".join(f"{task} {float(loss):.4f}" for task, loss in late)


def shipped_run() -> Run:
    """Return the run that ships with the package: ``small``, seed 0, a dozen checkpoints.

    ``taskvec train --preset small`` retrains it. The shipped weights are float16.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> run.steps[0], run.steps[-1], run.seed
        (0, 26000, 0)
    """
    run: Run = load_run(Path(__file__).parents[1] / "shipped" / "small")
    return run
