"""Whether a model averages over the latent tasks as Bayes does (Zhang et al. 2023, 2305.19420).

The exact predictor of a mixture of tasks is the mean of the tasks' own predictors, weighted by the
posterior ``P(z | S_t)`` given the demonstrations ``S_t``. Against the best fixed task in hindsight,
``z*``, it loses little on any sequence::

    1/T sum_t log P(y_t | z*, S_t, x_t) - log P(y_t | S_t, x_t)  <=  -log P(z*) / T

A model whose outputs are tokens gives a distribution. A regression model gives a number ``m``; its
distribution is taken to be the Gaussian about ``m`` with the variance ``V`` of the exact mixture.
Then its expected regret exceeds that of a Gaussian at the mixture's own mean ``m*`` by
``(m - m*)^2 / 2V``, the Kullback-Leibler divergence of the two, which is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.lab.averaging_fits import barycentric_fit, implied_weights
from transformer_lens_taskvec.lab.problems.base import (
    Batch,
    Problem,
    TaskPredictions,
    balanced_labels,
)
from transformer_lens_taskvec.lab.training.on_problem import Run
from transformer_lens_taskvec.models.protocol import hook_name

if TYPE_CHECKING:
    import pandas as pd

_SEED = 41
_BY_POINT = (
    "divergence",
    "regret",
    "exact_regret",
    "gaussian_regret",
    "bound",
    "posterior",
    "implied",
    "implied_distance",
    "shuffled_distance",
)
_BY_LAYER = ("barycentric", "barycentric_label", "barycentric_shuffled", "explained")
_KINDS = ("squared_error", "cross_entropy")


@dataclass(frozen=True, repr=False)
class BmaGap(Shown):
    """A model compared with exact Bayesian averaging over the tasks, at every point of a sequence.

    Attributes:
        step: The checkpoint.
        divergence: Mean divergence of the model from the exact mixture in nats, ``[point]``.
        regret: The model's mean regret after each point against the best fixed task in hindsight,
            in nats per point, ``[point]``; NaN where nothing has counted yet.
        exact_regret: That of the exact mixture, ``[point]``.
        gaussian_regret: That of a Gaussian with the mixture's mean and variance, which is what a
            perfect regression model would have, ``[point]``; None for tokens.
        bound: The mean of ``-log P(z*) / T``, ``[point]``.
        posterior: Mean ``P(true task | S_t)``, ``[point]``.
        implied: The mean weight of the true task in the average of the tasks' predictions that is
            closest to the model's, ``[point]``; NaN where the predictions do not tell the tasks
            apart.
        implied_distance: Mean total variation between those weights and the posterior, ``[point]``.
        shuffled_distance: The control: the same with other sequences' posteriors, ``[point]``.
        barycentric: The share of the variance of vectors, in the space that the tasks' vectors
            span, that ``sum_z P(z | S_t) v_z`` explains on held-out sequences, ``[layer, point]``.
        barycentric_label: The same with the true task in place of the posterior.
        barycentric_shuffled: The control: the same with posteriors of other sequences.
        explained: The share of the variance in the whole residual stream, ``[layer, point]``.
        n_sequences: The number of sequences.
        token_offset: The token of the vectors, relative to the query's.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.averaging import bma_gap
        >>> found = bma_gap(lab.shipped_run(), n=20, n_queries=6)
        >>> found.barycentric.shape, bool((found.exact_regret <= found.bound + 1e-6).all())
        (torch.Size([5, 16]), True)
    """

    step: int
    divergence: Float[Tensor, " point"]
    regret: Float[Tensor, " point"]
    exact_regret: Float[Tensor, " point"]
    gaussian_regret: Float[Tensor, " point"] | None
    bound: Float[Tensor, " point"]
    posterior: Float[Tensor, " point"]
    implied: Float[Tensor, " point"]
    implied_distance: Float[Tensor, " point"]
    shuffled_distance: Float[Tensor, " point"]
    barycentric: Float[Tensor, "layer point"]
    barycentric_label: Float[Tensor, "layer point"]
    barycentric_shuffled: Float[Tensor, "layer point"]
    explained: Float[Tensor, "layer point"]
    n_sequences: int
    token_offset: int

    @property
    def best_layer(self) -> int:
        """The layer whose vectors lie closest to the averages, over all points."""
        return int(self.barycentric.nanmean(1).argmax())

    def to_frame(self) -> pd.DataFrame:
        """One row per point, counted from 1; the barycentric columns are of the best layer."""
        import pandas as pd

        curves = {name: getattr(self, name) for name in _BY_POINT}
        for name in _BY_LAYER:
            curves[name] = getattr(self, name)[self.best_layer]
        columns = {name: one.tolist() for name, one in curves.items() if one is not None}
        points = range(1, len(self.divergence) + 1)
        return pd.DataFrame({"step": self.step, "point": points, **columns})

    def __repr__(self) -> str:
        layer = self.best_layer
        return (
            f"BmaGap(step {self.step}: divergence {self.divergence.nanmean():.3f} nats, regret "
            f"{self.regret[-1]:.3f} (exact {self.exact_regret[-1]:.3f}, bound "
            f"{self.bound[-1]:.3f}), implied posterior off by {self.implied_distance.nanmean():.2f}"
            f" (shuffled {self.shuffled_distance.nanmean():.2f}), barycentric R^2 at layer {layer} "
            f"{self.barycentric[layer].nanmean():.2f} (true task "
            f"{self.barycentric_label[layer].nanmean():.2f}, shuffled "
            f"{self.barycentric_shuffled[layer].nanmean():.2f}); n = {self.n_sequences} sequences)"
        )


def bma_gap(
    run: Run,
    step: int | None = None,
    *,
    n: int = 250,
    n_implied: int = 20,
    n_queries: int = 16,
    token_offset: int = 0,
    seed: int = 0,
) -> BmaGap:
    """Compare a model with exact Bayesian averaging over the tasks (Zhang et al. 2023).

    The weights of the tasks that a model's outputs imply are those on the simplex with the least
    squared error. A number is one equation, so a regression model is asked several queries after
    the same demonstrations; of tokens, the probabilities are compared.

    Args:
        run: A run on a problem with an exact ``posterior`` and ``by_task``, such as a
            :class:`SparseLinearMixture`.
        step: The checkpoint; by default the last.
        n: Sequences per task. Half of them fit the tasks' vectors, the others test the fit.
        n_implied: Sequences per task for the implied weights.
        n_queries: Queries after the same demonstrations; not used for tokens.
        token_offset: The token whose vectors are compared, relative to the query's: 0 is the query,
            -1 the token before it, in ``x_1, y_1, x_2, ...`` the last output.
        seed: Seed of the sequences.

    Raises:
        ValueError: If the problem has no exact posterior or predictions by task, or its outputs are
            neither single numbers with a squared error nor tokens; if there is no such checkpoint;
            or a number is out of range.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.averaging import bma_gap
        >>> first, last = (bma_gap(lab.shipped_run(), s, n=20, n_queries=6) for s in (0, 26000))
        >>> bool(last.divergence.mean() < first.divergence.mean() / 10)
        True
    """
    problem, step = run.config.problem, run.checkpoint(step)
    n_tasks = len(problem.tasks)
    _check(problem, n, n_implied, n_queries, token_offset)
    labels = repeat(torch.arange(n_tasks), "task -> (each task)", each=n)
    batch = problem.sample(len(labels), _generator(seed, 0), labels=labels)
    exact = _exact(problem, batch)  # raises if it is not known
    model = run.model(step)
    residuals: list[Tensor] = []
    hooks = [
        (hook_name("resid_post", layer), lambda residual, hook: residuals.append(residual))
        for layer in range(model.cfg.n_layers)
    ]
    with torch.no_grad():
        predicted = problem.predict(partial(model.run_with_hooks, fwd_hooks=hooks), batch)
    weights = torch.ones(batch.ys.shape[:2]) if batch.weights is None else batch.weights
    counted = (weights > 0).double()
    apart, density = exact.compared(problem, predicted.double())
    best, prior = _best_fixed(exact, counted)

    def regret(of: Float[Tensor, "batch point"]) -> Float[Tensor, " point"]:
        return _per_point(best - (of * counted).cumsum(1), counted)

    own = torch.arange(len(labels)), slice(None), labels
    places = [problem.query_at(point) + token_offset for point in range(problem.n_points)]
    fits = [
        [
            barycentric_fit(residual, place, exact.posterior, labels, point)
            for point, place in enumerate(places)
        ]
        for residual in residuals
    ]
    averages, of_label, of_shuffled, explained = torch.tensor(fits).float().unbind(-1)
    few = problem.sample(
        n_implied * n_tasks, _generator(seed, 1), labels=balanced_labels(n_tasks, n_implied)
    )
    with torch.no_grad():
        implied = implied_weights(problem, model.run_with_hooks, few, n_queries)
    of_few = problem.posterior(few).double()
    moved = of_few.roll(n_implied, 0)
    gaussian = exact.gaussian_density
    return BmaGap(
        step,
        ((apart * counted).sum(0) / counted.sum(0)).float(),
        regret(density),
        regret(exact.density),
        None if gaussian is None else regret(gaussian),
        _per_point(-prior, counted),
        exact.posterior[own].mean(0).float(),
        implied[torch.arange(len(few.labels)), :, few.labels].nanmean(0).float(),
        (0.5 * (implied - of_few).abs().sum(-1)).nanmean(0).float(),
        (0.5 * (implied - moved).abs().sum(-1)).nanmean(0).float(),
        averages,
        of_label,
        of_shuffled,
        explained,
        len(labels),
        token_offset,
    )


@dataclass(frozen=True)
class _Exact:
    """The exact mixture on some sequences, in float64."""

    posterior: Float[Tensor, "batch point task"]
    by_task: TaskPredictions
    targets: Tensor
    task_density: Float[Tensor, "batch point task"]

    @property
    def density(self) -> Float[Tensor, "batch point"]:
        """The log density of the outputs."""
        return (self.posterior.log() + self.task_density).logsumexp(-1)

    @property
    def log_probabilities(self) -> Float[Tensor, "batch point token"]:
        """Of each token."""
        by_task = self.by_task.predictions.double().log_softmax(-1)
        return (self.posterior.log()[..., None] + by_task).logsumexp(-2)

    @property
    def mean(self) -> Float[Tensor, "batch point"]:
        """Of the output."""
        return (self.posterior * self.by_task.predictions).sum(-1)

    @property
    def variance(self) -> Float[Tensor, "batch point"]:
        """Of the output: within the tasks and between them."""
        assert self.by_task.variances is not None
        between = (self.by_task.predictions - self.mean[..., None]).square()
        return (self.posterior * (self.by_task.variances + between)).sum(-1)

    @property
    def gaussian_density(self) -> Float[Tensor, "batch point"] | None:
        """The log density of the outputs under a Gaussian of the mixture's mean and variance."""
        if self.by_task.variances is None:
            return None
        return _log_normal(self.targets, self.mean, self.variance)

    def compared(
        self, problem: Problem, predicted: Float[Tensor, "batch point *token"]
    ) -> tuple[Float[Tensor, "batch point"], Float[Tensor, "batch point"]]:
        """A model's divergence from the mixture, and its log density of the outputs."""
        if self.by_task.variances is None:
            chosen = predicted.log_softmax(-1).gather(-1, self.targets.long()[..., None])
            return problem.distance(predicted, self.log_probabilities), chosen[..., 0]
        apart = (predicted - self.mean).square() / (2 * self.variance)
        return apart, _log_normal(self.targets, predicted, self.variance)


def _exact(problem: Problem, batch: Batch) -> _Exact:
    posterior, found = problem.posterior(batch).double(), problem.by_task(batch)
    targets = batch.ys
    if problem.loss_kind == "cross_entropy":
        logp = found.predictions.double().log_softmax(-1)
        chosen = repeat(targets.long(), "batch point -> batch point task 1", task=logp.shape[2])
        return _Exact(posterior, found, targets, logp.gather(-1, chosen)[..., 0])
    if found.variances is None:
        raise ValueError(
            f"{type(problem).__name__}.by_task gives no variances; for outputs that are numbers, "
            "give them as TaskPredictions(predictions, variances)"
        )
    means, variances = found.predictions.double(), found.variances.double()
    density = _log_normal(targets.double()[..., None], means, variances)
    found = TaskPredictions(means, variances)
    return _Exact(posterior, found, targets.double(), density)


def _best_fixed(
    exact: _Exact, counted: Float[Tensor, "batch point"]
) -> tuple[Float[Tensor, "batch point"], Float[Tensor, "batch point"]]:
    """The log density up to each point of the best fixed task, and the log prior of that task."""
    total = (exact.task_density * counted[..., None]).cumsum(1)
    best = total.max(-1)
    prior = repeat(
        exact.posterior[:, 0].log(), "batch task -> batch point task", point=len(total[0])
    )
    return best.values, prior.gather(-1, best.indices[..., None])[..., 0]


def _per_point(
    totals: Float[Tensor, "batch point"], counted: Float[Tensor, "batch point"]
) -> Float[Tensor, " point"]:
    """The mean over sequences of totals divided by the points that have counted so far."""
    return (totals / counted.cumsum(1)).nan_to_num(posinf=np.nan, neginf=np.nan).nanmean(0).float()


def _log_normal(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -F.gaussian_nll_loss(mean, value.expand_as(mean), variance, full=True, reduction="none")


def _generator(seed: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000 * seed + _SEED + part)


def _check(problem: Problem, n: int, n_implied: int, n_queries: int, token_offset: int) -> None:
    kind, n_tasks = problem.loss_kind, len(problem.tasks)
    if kind not in _KINDS or (kind == "squared_error" and problem.n_outputs > 1):
        raise ValueError(
            f"{type(problem).__name__} has outputs of {problem.n_outputs} numbers with the loss "
            f"{kind!r}; bma_gap knows the distribution of single numbers with a squared error and "
            "of tokens with a cross-entropy"
        )
    if n < 2 * n_tasks:
        raise ValueError(f"n is {n}; ask for {2 * n_tasks} sequences per task or more")
    if not n_tasks <= n_queries <= n_implied * n_tasks:
        raise ValueError(
            f"n_queries is {n_queries}; choose {n_tasks} (tasks) to {n_implied * n_tasks} "
            "(n_implied sequences of each task)"
        )
    if token_offset > 0:
        raise ValueError(
            f"token_offset is {token_offset}; the query is the last token, so use 0 or less"
        )
