"""Squared errors at each point of a sequence: a model's, and those of a problem's oracles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.lab.model import RegressionTransformer
from transformer_lens_taskvec.lab.problems.base import Batch, Problem, balanced_labels

_EVAL_SEED = 2_000_003
_SEQUENCES_AT_ONCE = 1000


def evaluate_problem(
    model: RegressionTransformer, problem: Problem, *, n_eval: int = 250, seed: int = _EVAL_SEED
) -> Float[Tensor, "task point"]:
    """Return the model's mean squared error for each task at each point, ``[task, point]``.

    Args:
        model: The model.
        problem: What the sequences are drawn from.
        n_eval: Sequences per task.
        seed: Their seed; by default the one that training evaluates with.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> lab.evaluate_problem(run.model(), run.config.problem, n_eval=20).shape
        torch.Size([4, 16])
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    labels = balanced_labels(len(problem.tasks), n_eval, device)
    batch = problem.sample(len(labels), generator, labels=labels)
    with torch.no_grad():
        errors: Tensor = (model(batch.xs, batch.ys) - batch.ys).square()
    means: Tensor = reduce(errors, "(task each) point -> task point", "mean", each=n_eval)
    return means


@dataclass(frozen=True)
class OracleErrors:
    """Mean squared error of each oracle at each point.

    Attributes:
        names: The oracles.
        loss: ``[oracle, point]``.
        n_sequences: The number of sequences in the mean.
        told: The oracles that read the latent task, which no model can.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> errors = lab.oracle_errors(lab.SparseLinearMixture.small(), n_sequences=50)
        >>> errors["ridge"].shape, errors.late("Bayes mixture") < errors.late("ridge")
        (torch.Size([16]), True)
    """

    names: tuple[str, ...]
    loss: Float[Tensor, "oracle point"]
    n_sequences: int
    told: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Float[Tensor, " point"]:
        """The error curve of one oracle."""
        if name not in self.names:
            raise KeyError(f"no oracle {name!r}; there are {', '.join(self.names)}")
        return self.loss[self.names.index(name)]

    def late(self, name: str) -> float:
        """The mean error over the second half of the points."""
        curve = self[name]
        return float(curve[len(curve) // 2 :].mean())

    @property
    def best(self) -> str:
        """The oracle with the lowest late error among those that are not told the task."""
        return min([n for n in self.names if n not in self.told] or self.names, key=self.late)

    def __repr__(self) -> str:
        late = ", ".join(f"{name} {self.late(name):.4f}" for name in self.names)
        return f"OracleErrors(second half of {self.loss.shape[1]} points: {late})"


def oracle_errors(
    problem: Problem,
    *,
    n_sequences: int = 10_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> OracleErrors:
    """Estimate the expected squared error of every oracle of a problem, at every point.

    Args:
        problem: What the sequences are drawn from, and whose ``oracles`` predict them.
        n_sequences: Sequences to average over.
        seed: Seed of the sequences.
        device: Where to compute.

    Raises:
        ValueError: If there are no sequences, or an oracle's predictions have the wrong shape.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> errors = lab.oracle_errors(lab.SparseLinearMixture.small(), n_sequences=50)
        >>> errors.names, errors.told
        (('least squares', 'ridge', 'lasso', 'true basis', 'Bayes mixture'), ('true basis',))
    """
    if n_sequences < 1:
        raise ValueError(f"n_sequences is {n_sequences}; ask for 1 or more")
    generator = torch.Generator(device).manual_seed(seed)
    total: dict[str, Tensor] = {}
    for start in range(0, n_sequences, _SEQUENCES_AT_ONCE):
        batch = problem.sample(min(_SEQUENCES_AT_ONCE, n_sequences - start), generator)
        for name, prediction in checked_oracles(problem, batch).items():
            squares = (prediction - batch.ys).square()
            errors = reduce(squares, "batch point -> point", "sum").double()
            total[name] = total[name] + errors if name in total else errors
    curves = torch.stack(list(total.values())) / n_sequences
    few = problem.sample(20, generator)
    relabelled = replace(few, labels=(few.labels + 1) % len(problem.tasks))
    own, others = problem.oracles(few), problem.oracles(relabelled)
    # An oracle that is told the task predicts something else for other labels.
    told = tuple(name for name in total if not own[name].allclose(others[name], equal_nan=True))
    return OracleErrors(tuple(total), curves.float().cpu(), n_sequences, told)


def checked_oracles(problem: Problem, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
    """The problem's predictions for some sequences, all of the shape of ``ys``."""
    predictions = problem.oracles(batch)
    if not predictions:
        raise ValueError(f"{type(problem).__name__}.oracles gives no predictions; give one or more")
    for name, prediction in predictions.items():
        if prediction.shape != batch.ys.shape:
            raise ValueError(
                f"oracle {name!r} of {type(problem).__name__} gives predictions of shape "
                f"{tuple(prediction.shape)}; expected [batch, point], {tuple(batch.ys.shape)}"
            )
    return predictions
