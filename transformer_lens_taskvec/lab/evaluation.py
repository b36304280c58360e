"""Losses at each point of a sequence: a model's, and those of a problem's oracles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.lab.problems.base import Batch, Problem, balanced_labels
from transformer_lens_taskvec.models.protocol import hook_name

_EVAL_SEED = 2_000_003
_SEQUENCES_AT_ONCE = 1000


@dataclass(frozen=True)
class Evaluation:
    """A model's mean loss and accuracy on a problem, and the norms of its residual stream.

    Attributes:
        loss: Of the problem's kind, ``[task, point]``.
        accuracy: The share of predictions that count as right, ``[task, point]``.
        norms: The mean norm of the residual stream before the first block and after each,
            ``[layer + 1, token]``; empty for a model without these hook points.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> found = lab.evaluate_problem(run.model(), run.config.problem, n_eval=20)
        >>> found.loss.shape, found.norms.shape
        (torch.Size([4, 16]), torch.Size([6, 31]))
    """

    loss: Float[Tensor, "task point"]
    accuracy: Float[Tensor, "task point"]
    norms: Float[Tensor, "layer token"]


def evaluate_problem(
    model: Any, problem: Problem, *, n_eval: int = 250, seed: int = _EVAL_SEED
) -> Evaluation:
    """Return a model's mean loss and accuracy for each task at each point, and its norms.

    A point that no sequence of a task counts (``Batch.weights``) is NaN.

    Args:
        model: The model.
        problem: What the sequences are drawn from.
        n_eval: Sequences per task.
        seed: Their seed; by default the one that training evaluates with.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> lab.evaluate_problem(run.model(), run.config.problem, n_eval=20).loss.shape
        torch.Size([4, 16])
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    labels = balanced_labels(len(problem.tasks), n_eval, device)
    batch = problem.sample(len(labels), generator, labels=labels)
    norms: list[Tensor] = []

    def note(residual: Tensor, hook: Any) -> None:
        norms.append(residual.float().norm(dim=-1).mean(0))

    names = [name for name in _residuals(model) if name in model.hook_dict]
    forward = partial(model.run_with_hooks, fwd_hooks=[(name, note) for name in names])
    with torch.no_grad():
        predictions = problem.predict(forward, batch)
        rows = rearrange(labels, "batch -> batch 1")
        losses = problem.losses(predictions, batch.ys, rows)
        right = problem.right(predictions, batch.ys, rows)
    by_task = partial(_by_task, batch=batch, each=n_eval)
    stacked = torch.stack(norms).cpu() if norms else torch.zeros(0, 0)
    return Evaluation(by_task(losses), by_task(right.float()), stacked)


def _by_task(
    values: Float[Tensor, "batch point"], *, batch: Batch, each: int
) -> Float[Tensor, "task point"]:
    weights = torch.ones_like(values) if batch.weights is None else batch.weights
    total, count = (
        reduce(one, "(task each) point -> task point", "sum", each=each)
        for one in (values * weights, weights)
    )
    return total / count


def _residuals(model: Any) -> list[str]:
    after = [hook_name("resid_post", layer) for layer in range(model.cfg.n_layers)]
    return [hook_name("resid_pre", 0), *after]


@dataclass(frozen=True)
class OracleErrors:
    """The mean loss of each oracle at each point, of the problem's kind.

    Attributes:
        names: The oracles.
        loss: ``[oracle, point]``.
        n_sequences: The number of sequences in the mean.
        told: The oracles that read the latent task, which no model can.
        late_from: The first of the points that ``late`` averages.

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
    late_from: int = 0

    def __getitem__(self, name: str) -> Float[Tensor, " point"]:
        """The error curve of one oracle."""
        if name not in self.names:
            raise KeyError(f"no oracle {name!r}; there are {', '.join(self.names)}")
        return self.loss[self.names.index(name)]

    def late(self, name: str) -> float:
        """The mean error over the late points."""
        return float(self[name][self.late_from :].nanmean())

    @property
    def best(self) -> str:
        """The oracle with the lowest late error among those that are not told the task."""
        return min([n for n in self.names if n not in self.told] or self.names, key=self.late)

    def __repr__(self) -> str:
        late = ", ".join(f"{name} {self.late(name):.4f}" for name in self.names)
        return f"OracleErrors(points {self.late_from + 1} to {self.loss.shape[1]}: {late})"


def oracle_errors(
    problem: Problem,
    *,
    n_sequences: int = 10_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> OracleErrors:
    """Estimate the expected loss of every oracle of a problem, at every point.

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
    count = torch.zeros(problem.n_points, dtype=torch.double, device=device)
    for start in range(0, n_sequences, _SEQUENCES_AT_ONCE):
        batch = problem.sample(min(_SEQUENCES_AT_ONCE, n_sequences - start), generator)
        labels = rearrange(batch.labels, "batch -> batch 1")
        for name, prediction in checked_oracles(problem, batch).items():
            losses = problem.losses(prediction, batch.ys, labels).double()
            weighted = losses if batch.weights is None else losses * batch.weights
            errors = reduce(weighted, "batch point -> point", "sum")
            total[name] = total[name] + errors if name in total else errors
        weights = torch.ones_like(losses) if batch.weights is None else batch.weights
        count += reduce(weights, "batch point -> point", "sum")
    curves = torch.stack(list(total.values())) / count
    few = problem.sample(20, generator)
    relabelled = replace(few, labels=(few.labels + 1) % len(problem.tasks))
    own, others = problem.oracles(few), problem.oracles(relabelled)
    # An oracle that is told the task predicts something else for other labels.
    told = tuple(name for name in total if not own[name].allclose(others[name], equal_nan=True))
    return OracleErrors(tuple(total), curves.float().cpu(), n_sequences, told, problem.late_from)


def checked_oracles(
    problem: Problem, batch: Batch
) -> dict[str, Float[Tensor, "batch point *output"]]:
    """The problem's predictions for some sequences, all of the shape that the model's have."""
    predictions = problem.oracles(batch)
    if not predictions:
        raise ValueError(f"{type(problem).__name__}.oracles gives no predictions; give one or more")
    several = () if problem.n_outputs == 1 else (problem.n_outputs,)
    expected = (*batch.ys.shape[:2], *several)
    for name, prediction in predictions.items():
        if prediction.shape != expected:
            axes = "[batch, point, output]" if several else "[batch, point]"
            raise ValueError(
                f"oracle {name!r} of {type(problem).__name__} gives predictions of shape "
                f"{tuple(prediction.shape)}; expected {axes}, {expected}"
            )
    return predictions
