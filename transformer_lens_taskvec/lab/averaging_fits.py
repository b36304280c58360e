"""Weights of the tasks: those that a model's predictions imply, and those that its vectors fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_taskvec.lab.problems.base import Batch, Problem


def barycentric_fit(
    residual: Float[Tensor, "batch token d_model"],
    place: int,
    posterior: Float[Tensor, "batch point task"],
    labels: Int[Tensor, " batch"],
    point: int,
) -> tuple[float, float, float, float]:
    """Return how much of a token's vectors the average of the tasks' vectors explains.

    The tasks' vectors are fitted by least squares on half of the sequences, and the rest test them.

    Args:
        residual: ``[batch, token, d_model]``.
        place: The token.
        posterior: ``[batch, point, task]``, in float64.
        labels: The true tasks, in turn: ``0, 1, ..., 0, 1, ...``.
        point: The point whose posterior weighs the tasks.

    Returns:
        The R^2 of averages by the posterior, by the true task and by shuffled posteriors in the
        space that the fitted vectors span, and that of the first in the whole residual stream; NaN
        where there is no such token, or the fitted vectors do not differ.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec.lab.averaging_fits import barycentric_fit
        >>> labels = torch.arange(2).repeat(20)
        >>> posterior = torch.rand(40, 1, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> posterior = torch.cat([posterior, 1 - posterior], dim=-1)
        >>> vectors = posterior @ torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 1.0]]).double()
        >>> round(barycentric_fit(vectors, 0, posterior, labels, 0)[0], 3)
        1.0
    """
    n_tasks, unknown = posterior.shape[-1], (np.nan, np.nan, np.nan, np.nan)
    if place < 0:
        return unknown
    vectors, shares = residual[:, place].double(), posterior[:, point]
    fitted = torch.arange(len(labels)) // n_tasks % 2 == 0  # labels are 0, 1, ..., 0, 1, ...
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(point))
    truth = F.one_hot(labels, n_tasks).double()
    errors = []
    for given in (shares, truth, shares[order]):
        # The driver for rank-deficient systems: before any demonstration all posteriors are equal.
        centres = torch.linalg.lstsq(given[fitted], vectors[fitted], driver="gelsd").solution
        errors.append(vectors[~fitted] - given[~fitted] @ centres)
        if given is shares:
            spread = centres - centres.mean(0)
    spanned = torch.linalg.svd(spread, full_matrices=False)
    directions = spanned.Vh[: n_tasks - 1]
    if spanned.S[0] < 1e-6 * vectors.norm(dim=-1).mean():
        return unknown
    around = vectors[~fitted] - vectors[fitted].mean(0)
    total = (around @ directions.T).square().sum()
    own = [float(1 - (error @ directions.T).square().sum() / total) for error in errors]
    everywhere = float(1 - errors[0].square().sum() / around.square().sum())
    return own[0], own[1], own[2], everywhere


def implied_weights(
    problem: Problem, forward: Callable[..., Any], batch: Batch, n_queries: int
) -> Float[Tensor, "batch point task"]:
    """Return the weights with which the tasks' predictions come closest to the model's.

    Args:
        problem: A problem with ``by_task``.
        forward: The model's forward pass.
        batch: The sequences.
        n_queries: Queries asked after the same demonstrations, those of other sequences; of
            tokens, the probabilities at the point are compared instead.

    Returns:
        Weights of sum one, ``[batch, point, task]``; NaN where they are not determined.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.averaging_fits import implied_weights
        >>> run = lab.shipped_run()
        >>> batch = run.config.problem.sample(8, torch.Generator().manual_seed(0))
        >>> with torch.no_grad():
        ...     implied_weights(run.config.problem, run.model(), batch, 8).shape
        torch.Size([8, 16, 4])
    """
    if problem.loss_kind == "cross_entropy":
        by_task = problem.by_task(batch).predictions.double().softmax(-1)
        rows = rearrange(by_task, "batch point task token -> batch point token task")
        return simplex_weights(rows, problem.predict(forward, batch).double().softmax(-1))
    found = []
    for point in range(problem.n_points):
        shifts = [batch.xs[:, point].roll(shift, 0) for shift in range(n_queries)]
        xs = repeat(
            batch.xs[:, : point + 1], "batch ... -> query batch ...", query=n_queries
        ).clone()
        xs[:, :, point] = torch.stack(shifts)
        ys = repeat(batch.ys[:, : point + 1], "batch point -> (query batch) point", query=n_queries)
        asked = Batch(xs.flatten(0, 1), ys, batch.labels.repeat(n_queries))
        by_task = problem.by_task(asked).predictions[:, -1].double()
        rows = rearrange(by_task, "(query batch) task -> batch 1 query task", query=n_queries)
        predicted = problem.predict(forward, asked)[:, -1].double()
        answers = rearrange(predicted, "(query batch) -> batch 1 query", query=n_queries)
        found.append(simplex_weights(rows, answers))
    return torch.cat(found, dim=1)


def simplex_weights(
    rows: Float[Tensor, "batch point row task"], wanted: Float[Tensor, "batch point row"]
) -> Float[Tensor, "batch point task"]:
    """Return the weights, not negative and of sum one, whose average comes closest.

    Args:
        rows: The tasks' predictions, ``[batch, point, row, task]``, in float64.
        wanted: What their average is to be, ``[batch, point, row]``.

    Returns:
        The least-squares weights; NaN where the predictions do not tell the tasks apart.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec.lab.averaging_fits import simplex_weights
        >>> rows = torch.eye(2).double()[None, None]
        >>> simplex_weights(rows, torch.tensor([[[0.25, 0.75]]]).double()).round(decimals=3)
        tensor([[[0.2500, 0.7500]]], dtype=torch.float64)
    """
    from scipy.optimize import nnls  # takes a while to import

    n_tasks = rows.shape[-1]
    spread = torch.linalg.svdvals(rows - rows.mean(-1, keepdim=True))
    scale = rows.abs().amax((-2, -1))
    known = (spread > 1e-6 * scale[..., None]).sum(-1) >= n_tasks - 1
    weights = torch.full((*rows.shape[:2], n_tasks), torch.nan, dtype=torch.double)
    for index in known.nonzero().tolist():
        at = tuple(index)
        heavy = 1e4 * float(scale[at])  # holds the sum at one
        system = np.vstack([rows[at].numpy(), np.full(n_tasks, heavy)])
        solution = torch.from_numpy(nnls(system, np.append(wanted[at].numpy(), heavy))[0])
        weights[at] = solution / solution.sum()
    return weights
