"""One model for linear regression and linear classification (Bai et al. 2023).

A sequence is of one of two kinds, which its outputs give away: ``y = w.x``, scored by the squared
error, or ``y = sign(w.x)``, scored by the logistic loss of the prediction as a logit. The best
published predictors are least squares for the one and logistic regression for the other
("Transformers as Statisticians", 2306.04637, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.lab.oracles import least_squares
from transformer_lens_taskvec.lab.problems.base import (
    QUICK,
    Batch,
    Finding,
    Problem,
    check_sizes,
    draw_labels,
    normal,
    with_noise,
)
from transformer_lens_taskvec.lab.problems.readings import (
    drawn,
    plot_swap_distances,
    read_stream,
    spread,
    swap_distances,
)
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    figure_of,
    legend_beside,
    new_axes,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REGRESSION, CLASSIFICATION = 0, 1
"""The labels of the two kinds."""

_NEWTON_STEPS, _HALVINGS = 100, 30
_TRAIN, _CHOOSE, _TEST = 3_000_021, 3_000_022, 3_000_023
_CHECKPOINTS, _N = 12, 1_000


@dataclass(frozen=True)
class LinearOrLogistic(Problem):
    """Linear regression or classification, by one model.

    ``w ~ N(0, I / dim)`` and ``x ~ N(0, I)``. Regression has ``y = w.x + e`` and the squared error;
    classification ``y = sign(w.x)``, 1 or -1, and the logistic loss ``log(1 + exp(-y z))`` in nats
    of the prediction ``z``. The direction of ``w`` alone determines a class, so its scale matters
    for regression only.

    >>> LinearOrLogistic().tasks
    ('regression', 'classification')

    Attributes:
        dim: The dimension of an input.
        n_points: Pairs in a sequence, the query included.
        noise_variance: The variance of ``e``; the paper's is 0, where least squares makes no error
            once there are ``dim`` demonstrations.
        logistic_penalty: The weight of ``|w|^2 / 2`` in the oracle's logistic regression; see
            :func:`logistic_regression`.
    """

    dim: int = 3
    n_points: int = 11
    noise_variance: float = 0.01
    logistic_penalty: float = 0.1
    tasks: ClassVar[tuple[str, ...]] = ("regression", "classification")

    loss_kind: ClassVar[str] = "loss"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **QUICK,
            "n_layers": 3,
            "n_heads": 4,
            "d_model": 64,
            "steps": 3_000,
            "n_checkpoints": 30,
        }
    )

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, self.noise_variance)
        _check_penalty("logistic_penalty", self.logistic_penalty)

    @classmethod
    def published(cls) -> LinearOrLogistic:
        """The paper's setting: 20 dimensions, 40 demonstrations, no noise."""
        return cls(dim=20, n_points=41, noise_variance=0.0, logistic_penalty=1.0)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        labels = draw_labels(batch_size, len(self.tasks), generator, labels)
        xs = normal(generator, batch_size, self.n_points, self.dim)
        weights = normal(generator, batch_size, self.dim) / self.dim**0.5
        clean = einsum(xs, weights, "batch point dim, batch dim -> batch point")
        noisy = with_noise(clean, self.noise_variance, generator)
        rows = rearrange(labels, "batch -> batch 1")
        return Batch(xs, torch.where(rows == CLASSIFICATION, _signs(clean), noisy), labels)

    def losses(
        self,
        predictions: Float[Tensor, "*rows"],
        targets: Float[Tensor, "*rows"],
        labels: Int[Tensor, "*#rows"],
    ) -> Float[Tensor, "*rows"]:
        """The squared error in regression, the logistic loss in nats in classification."""
        squares = (predictions - targets).square()
        return torch.where(labels == CLASSIFICATION, F.softplus(-targets * predictions), squares)

    def right(
        self,
        predictions: Float[Tensor, "*rows"],
        targets: Float[Tensor, "*rows"],
        labels: Int[Tensor, "*#rows"],
    ) -> Bool[Tensor, "*rows"]:
        """Whether a regression is within 0.3, or a class's sign is right."""
        near = super().right(predictions, targets, labels)
        return torch.where(labels == CLASSIFICATION, predictions * targets > 0, near)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
        """Least squares, logistic regression, and the two of them by kind.

        ``"inferred kind"`` sees the kind from the outputs before a point, as a model can: it is
        logistic regression where all of them are 1 or -1. ``"told the kind"`` reads the label.
        Logistic regression of a regression is that of the outputs' signs.
        """
        squares = least_squares(batch.xs, batch.ys)
        logistic = logistic_regression(batch.xs, batch.ys, penalty=self.logistic_penalty)
        classes = rearrange(batch.labels == CLASSIFICATION, "batch -> batch 1")
        inferred = self.posterior(batch)[..., CLASSIFICATION] > 0.5
        return {
            "least squares": squares,
            "logistic regression": logistic,
            "inferred kind": torch.where(inferred, logistic, squares),
            "told the kind": torch.where(classes, logistic, squares),
        }

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """As for :meth:`Problem.posterior`: even at the first point, then certain."""
        unlike = (batch.ys.abs() != 1).cumsum(1).roll(1, dims=1)
        classes = (unlike == 0).to(batch.xs.dtype)
        classes[:, 0] = 0.5
        return torch.stack([1 - classes, classes], dim=-1)

    def swapped_at(self, point: int) -> tuple[int, ...]:
        """All outputs before the query: each of them gives the kind away."""
        return tuple(self.query_at(demo) + 1 for demo in range(point))

    def finding(self, run: Any) -> Finding:
        """Whether one model is as good as least squares and as logistic regression.

        The error and the accuracy are those at the last point, on the same sequences for the model
        and the oracles. The figures are ``corner`` (error of regression and accuracy of
        classification over training, next to the oracles) and ``swaps`` (where predictions go when
        the kind's representation is swapped; the oracle of a regression as a classification is
        logistic regression on the outputs' signs, that of a classification as a regression least
        squares on the classes).

        Args:
            run: A :class:`Run` on this problem.
        """
        return _finding(self, run)


def logistic_regression(
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    *,
    penalty: float = 0.1,
) -> Float[Tensor, "batch point"]:
    """Logistic regression in all dimensions, without an intercept, for all prefixes at once.

    Minimises ``sum_i log(1 + exp(-y_i w.x_i)) + penalty |w|^2 / 2`` over the pairs before each
    point, by Newton's method with step halving, in float64. Classes without noise can be separated,
    so that there would be no minimum without the penalty: the weights would grow for ever.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``, of which the signs are the classes.
        penalty: The weight of ``|w|^2 / 2``; scikit-learn's ``1 / C``.

    Returns:
        Logits of the class 1, ``[batch, point]``; zero at the first point.

    Raises:
        ValueError: If the shapes do not match or the penalty is not positive.
        RuntimeError: If the search does not converge, as with inputs that are not finite.

    Example:
        >>> xs = torch.tensor([[[1.0], [-2.0], [3.0]]])
        >>> logits = logistic_regression(xs, torch.tensor([[1.0, -1.0, 1.0]]))
        >>> logits.sign().tolist()
        [[0.0, -1.0, 1.0]]
    """
    _check_penalty("penalty", penalty)
    if xs.ndim != 3 or ys.shape != xs.shape[:2]:
        raise ValueError(
            f"xs must be [batch, point, dim] and ys [batch, point]; got {list(xs.shape)} and "
            f"{list(ys.shape)}"
        )
    x = xs.double()
    signed = x * _signs(ys.double())[..., None]
    n_points = xs.shape[1]
    before = torch.ones(n_points, n_points, dtype=x.dtype, device=x.device).tril(-1)
    squares = einsum(x, x, "batch demo row, batch demo column -> batch demo row column")
    identity = torch.eye(xs.shape[2], dtype=x.dtype, device=x.device)

    def margins(weights: Tensor) -> Tensor:
        return einsum(signed, weights, "batch demo dim, batch point dim -> batch point demo")

    def objective(weights: Tensor) -> Tensor:
        losses = reduce(
            F.softplus(-margins(weights)) * before, "batch point demo -> batch point", "sum"
        )
        return losses + 0.5 * penalty * weights.square().sum(-1)

    weights = torch.zeros_like(x)
    value = objective(weights)
    for _ in range(_NEWTON_STEPS):
        wrong = torch.sigmoid(-margins(weights))
        pull = einsum(wrong * before, signed, "batch point demo, batch demo dim -> batch point dim")
        slope = penalty * weights - pull
        if bool((slope.abs() <= 1e-9 * (1 + pull.abs().amax(-1, keepdim=True))).all()):
            return einsum(x, weights, "batch point dim, batch point dim -> batch point").to(
                xs.dtype
            )
        curvature = einsum(
            wrong * (1 - wrong) * before,
            squares,
            "batch point demo, batch demo row column -> batch point row column",
        )
        step = torch.linalg.solve(curvature + penalty * identity, slope)
        share = torch.ones_like(value)[..., None]
        for _ in range(_HALVINGS):
            worse = objective(weights - share * step) > value + 1e-12 * (1 + value)
            if not bool(worse.any()):
                break
            share = torch.where(worse[..., None], 0.5 * share, share)
        weights = weights - share * step
        value = objective(weights)
    raise RuntimeError(f"logistic regression did not converge in {_NEWTON_STEPS} Newton steps")


def _signs(values: Float[Tensor, "*value"]) -> Float[Tensor, "*value"]:
    """1 or -1; zero counts as positive."""
    return torch.where(values < 0, -1.0, 1.0).to(values)


def _check_penalty(name: str, penalty: float) -> None:
    if penalty <= 0:
        raise ValueError(
            f"{name} must be positive, got {penalty}; separable classes have no logistic "
            "regression without a penalty"
        )


def _finding(problem: LinearOrLogistic, run: Any) -> Finding:
    test, choose, train = (drawn(problem, _N, seed) for seed in (_TEST, _CHOOSE, _TRAIN))
    targets, classes = test.ys[:, -1], test.labels == CLASSIFICATION

    def measured(predictions: Float[Tensor, " example"]) -> dict[str, float]:
        losses = problem.losses(predictions, targets, test.labels)
        right = problem.right(predictions, targets, test.labels)[classes]
        return {
            "error": float(losses[~classes].mean()),
            "accuracy": float(right.float().mean()),
            "logistic_loss": float(losses[classes].mean()),
        }

    oracles = {name: one[:, -1] for name, one in problem.oracles(test).items()}
    steps, path, td = spread(run.steps, _CHECKPOINTS), [], []
    query = [problem.query_at(problem.n_points - 1)]
    some = torch.arange(len(choose.labels)).view(len(problem.tasks), -1)[:, :250].flatten()
    for step in steps:
        model = run.model(step)
        with torch.no_grad():
            path.append(measured(problem.predict(model.run_with_hooks, test)[:, -1]))
        [held] = read_stream(model, problem, choose, places=query)
        td.append(task_decodability(held.select(some)).mean.tolist())
    chosen, swapped = (
        swap_distances(run.model(steps[-1]), problem, train, batch, _by_kind(problem, batch))
        for batch in (choose, test)
    )
    layer = chosen.best_layer()
    numbers: dict[str, Any] = {
        "steps": list(steps),
        **{f"model_{name}": [one[name] for one in path] for name in path[0]},
        **{
            f"{oracle} {name}": value
            for oracle in ("least squares", "logistic regression")
            for name, value in measured(oracles[oracle]).items()
        },
        "td": td,
        "td_best": max(td[-1]),
        **swapped.numbers(layer),
    }
    figures = {"corner": _corner(problem, numbers), "swaps": plot_swap_distances(swapped)}
    return Finding(_sentence(numbers), numbers, figures)


def _by_kind(problem: LinearOrLogistic, batch: Batch) -> Float[Tensor, "task example"]:
    """What least squares and logistic regression predict at the last point."""
    found = problem.oracles(batch)
    return torch.stack([found["least squares"][:, -1], found["logistic regression"][:, -1]])


def _sentence(numbers: Mapping[str, Any]) -> str:
    moved, own = numbers["swap_moved"], numbers["swap_moved_own_mean"]
    return (
        f"At the last point the model's squared error in regression is "
        f"{numbers['model_error'][-1]:.4f} (least squares {numbers['least squares error']:.4f}), "
        f"and its accuracy in classification {numbers['model_accuracy'][-1]:.3f} (logistic "
        f"regression {numbers['logistic regression accuracy']:.3f}) with a logistic loss of "
        f"{numbers['model_logistic_loss'][-1]:.3f} nats (logistic regression "
        f"{numbers['logistic regression logistic_loss']:.3f}). The kind's decodability is "
        f"{numbers['td_best']:.2f}. Swapping the kind's representation at layer "
        f"{numbers['swap_layer']} moves predictions of regressions {moved[0]:.2f} of the way to "
        f"logistic regression (own mean {own[0]:.2f}), and of classifications {moved[1]:.2f} of "
        f"the way to least squares (own mean {own[1]:.2f})."
    )


@styled
def _corner(problem: LinearOrLogistic, numbers: Mapping[str, Any]) -> Figure:
    """Error of regression and accuracy of classification, over training."""
    ax = new_axes(None)
    errors, accuracies = numbers["model_error"], numbers["model_accuracy"]
    for name, line, colour in (
        ("least squares", "--", COLOURS[2]),
        ("logistic regression", "-.", COLOURS[3]),
    ):
        point = numbers[f"{name} error"], numbers[f"{name} accuracy"]
        ax.plot(*point, "*", color=colour, ms=9, label=name)
        if name == "least squares":
            ax.axvline(point[0], color=colour, ls=line, lw=0.9)
        else:
            ax.axhline(point[1], color=colour, ls=line, lw=0.9)
    ax.plot(errors, accuracies, color=COLOURS[0], marker="o", label="model over training")
    ax.plot(errors[-1], accuracies[-1], "D", color=COLOURS[1], ms=5, label="model, last step")
    ax.set(
        xscale="log",
        xlabel="squared error of regression",
        ylabel="accuracy of classification",
        title=f"After {problem.n_points - 1} demonstrations in {problem.dim} dimensions",
    )
    return figure_of(legend_beside(ax))
