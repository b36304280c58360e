"""Training on a problem: the settings, and the run that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_taskvec.lab.evaluation import evaluate_problem
from transformer_lens_taskvec.lab.problems.base import (
    Problem,
    check_problem,
    fields_of,
    problem_from_json,
)
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture
from transformer_lens_taskvec.lab.training.recipe import Recipe, stacked, stopped_in
from transformer_lens_taskvec.lab.training.runs import TrainingRun, load_run
from transformer_lens_taskvec.lab.training.vector_loss import VectorLoss, check_vector_model

_NAMED = 8
"""The most tasks whose errors are written out."""


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """The settings of a training on a problem, besides those of :class:`Recipe`.

    The defaults are the paper's (App. D).

    Attributes:
        problem: What the sequences are drawn from.
        init: The scale of the initial weights; see :class:`RegressionConfig`.
        targets: What the squared error is taken of: the sequences' ``"outputs"``, or what is
            ``"expected"`` of them given what comes before, by ``Problem.expected``. The expected
            gradient is the same, since an output's deviation from its mean is independent of the
            prediction, and it has far less noise. Evaluations are of the outputs in either case.
        vector_loss: A second loss, which asks for the answer from the vector alone; None for the
            usual loss only.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> config = lab.TrainConfig()
        >>> config.n_layers, config.problem.tasks, config.steps
        (12, ('B1', 'B2', 'B3', 'B4'), 80000)
    """

    problem: Problem = field(default_factory=SparseLinearMixture)
    init: Literal["gpt2", "fan_in"] = "gpt2"
    targets: Literal["outputs", "expected"] = "outputs"
    vector_loss: VectorLoss | None = None

    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        **Recipe._choices,
        "init": ("gpt2", "fan_in"),
        "targets": ("outputs", "expected"),
    }
    loss_name: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_problem(self.problem)
        if self.targets == "expected" and self.problem.loss_kind != "squared_error":
            raise ValueError(
                f"targets is 'expected', and the loss of {type(self.problem).__name__} is "
                f"{self.problem.loss_kind!r}; only a squared error has the same gradient then. "
                "Use targets='outputs'"
            )
        if self.targets == "expected":  # raises where it is not known
            self.problem.expected(self.problem.sample(1, torch.Generator().manual_seed(0)))
        if self.vector_loss is not None:
            self.vector_loss.check(self.problem, self.n_layers)

    def model(self, *, seed: int = 0, device: torch.device | str = "cpu") -> Any:
        """An untrained model of this size, as the problem makes it."""
        model = self.problem.make_model(self, seed=seed, device=device)
        if self.vector_loss is not None:
            check_vector_model(model)
        return model

    def matrices(self, model: Any) -> list[nn.Parameter]:
        """The blocks' weight matrices."""
        named = model.named_parameters()
        return [p for name, p in named if name.startswith("blocks") and ".w_" in name]

    def loss(
        self,
        model: Any,
        forward: Callable[..., Any],
        generator: torch.Generator,
        autocast: bool,
    ) -> Tensor:
        """The mean loss over the points of a new batch, by their weights, and the vector loss."""
        batch = self.problem.sample(self.batch_size, generator)
        low = torch.autocast(batch.xs.device.type, torch.bfloat16, enabled=autocast)
        with low:
            predictions = self.problem.predict(forward, batch)
        labels = rearrange(batch.labels, "batch -> batch 1")
        ys = batch.ys if self.targets == "outputs" else self.problem.expected(batch)
        losses = self.problem.losses(predictions.float(), ys, labels)
        loss: Tensor = (
            losses.mean()
            if batch.weights is None
            else (losses * batch.weights).sum() / batch.weights.sum()
        )
        if self.vector_loss is None:
            return loss
        with low:
            return self.vector_loss.added_to(loss, model, self.problem, batch)

    def evaluate(self, model: Any) -> dict[str, Any]:
        """The mean loss and accuracy of each task at each point, and the norms."""
        found = evaluate_problem(model, self.problem, n_eval=self.n_eval)
        return {name: value.tolist() for name, value in fields_of(found).items()}

    def task_losses(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The mean loss of each task over the problem's late points."""
        late = torch.tensor(record["loss"])[:, self.problem.late_from :].nanmean(1).tolist()
        return dict(zip(self.problem.tasks, late, strict=True))

    def summary(self, record: dict[str, Any]) -> str:
        """The late error of each task, or their mean if there are many."""
        late = self.task_losses(record)
        if len(late) > _NAMED:
            return f"{self.mean_loss(record):.3f}"
        return " ".join(f"{task} {loss:.3f}" for task, loss in late.items())

    def fewest_weights(self) -> int:
        """A matrix for each block and what reads a token."""
        return (self.n_layers * self.d_model + self.problem.dim) * self.d_model

    def run(self, path: Path, seed: int, records: list[dict[str, Any]]) -> Run:
        """The run in a folder, given its evaluations."""
        shape = (len(self.problem.tasks), self.problem.n_points)
        curves: dict[str, Any] = stacked(records, loss=shape, accuracy=shape)
        norms = tuple(torch.tensor(record["norms"]) for record in records)
        train = [record["train_loss"] for record in records]
        train_loss = tuple(float("nan" if loss is None else loss) for loss in train)
        steps = tuple(record["step"] for record in records)
        return Run(
            path,
            self,
            seed,
            steps,
            **curves,
            norms=norms,
            train_loss=train_loss,
            stopped=stopped_in(records),
        )

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], **given: Any) -> TrainConfig:
        """As for :meth:`Recipe.from_json`."""
        problem = given.get("problem") or problem_from_json(saved["problem"])
        vectors = saved.get("vector_loss")
        restored = {"problem": problem, "vector_loss": vectors and VectorLoss(**vectors)}
        config: TrainConfig = super().from_json(saved, **{**given, **restored})
        return config


@dataclass(frozen=True, repr=False)
class Run(TrainingRun):
    """A :class:`TrainingRun` on a problem.

    Attributes:
        loss: Mean loss at each checkpoint, of the problem's kind, ``[checkpoint, task, point]``.
        accuracy: The share of predictions that count as right, ``[checkpoint, task, point]``.
        norms: For each checkpoint the mean norm of the residual stream before the first block and
            after each, ``[layer + 1, token]``.
        train_loss: The mean loss of the training steps since the previous checkpoint; NaN at
            step 0.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> run.tasks, run.late_loss[-1].shape, run.model().cfg.n_layers
        (('B1', 'B2', 'B3', 'B4'), torch.Size([4]), 5)
    """

    config: TrainConfig
    loss: Float[Tensor, "checkpoint task point"]
    accuracy: Float[Tensor, "checkpoint task point"]
    norms: tuple[Float[Tensor, "layer token"], ...]
    train_loss: tuple[float, ...]

    _table: ClassVar[tuple[str, str]] = ("loss", "point")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the latent tasks."""
        return self.config.problem.tasks

    @property
    def late_loss(self) -> Float[Tensor, "checkpoint task"]:
        """The mean loss over the problem's late points."""
        return self.loss[..., self.config.problem.late_from :].nanmean(-1)

    def model(self, step: int | None = None, *, device: torch.device | str = "cpu") -> Any:
        """The model at a checkpoint, the last one by default, in evaluation mode.

        Raises:
            ValueError: If there is no checkpoint of that step, or it is damaged.
        """
        model, name = self.restored(step, lambda: self.config.model(device=device))
        model.cfg.model_name = name
        return model.eval()

    def _summary(self) -> str:
        late = self.late_loss[-1]
        if len(late) > _NAMED:
            return f", late loss {float(late.mean()):.4f} over {len(late)} tasks"
        pairs = zip(self.tasks, late, strict=True)
        return ", late loss: " + ", ".join(f"{task} {float(loss):.4f}" for task, loss in pairs)


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
