"""Linear regression at several noise levels, of which each sequence has one (Bai et al. 2023).

Where the noise level is known, the best predictor is ridge regression, and each level has a penalty
of its own. The levels are the latent tasks: a model that is as good at all of them must infer the
level from the sequence ("Transformers as Statisticians", 2306.04637, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.lab.oracles import MixturePosterior, noise_mixture
from transformer_lens_taskvec.lab.problems.base import (
    QUICK,
    Batch,
    Finding,
    Problem,
    TaskPredictions,
    check_sizes,
    draw_labels,
    normal,
)
from transformer_lens_taskvec.lab.problems.readings import (
    drawn,
    plot_swap_distances,
    probe_r2,
    read_stream,
    spread,
    swap_distances,
)
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    figure_of,
    legend_beside,
    new_axes,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 1e-3
"""What a level of 0 counts as in oracles: the posterior of no noise at all has no density."""

_TRAIN, _CHOOSE, _TEST = 3_000_011, 3_000_012, 3_000_013
_CHECKPOINTS, _N, _N_TD = 12, 1_000, 250


@dataclass(frozen=True)
class NoisyLinear(Problem):
    """Linear regression, ``y = w.x + sigma e``, with one of several noise levels per sequence.

    ``w ~ N(0, I / dim)``, ``x ~ N(0, I)`` and ``e ~ N(0, 1)``, so that an output has a variance of
    ``1 + sigma^2``.

    >>> NoisyLinear((0.1, 0.25, 0.5, 1.0)).tasks
    ('sigma 0.1', 'sigma 0.25', 'sigma 0.5', 'sigma 1')

    Attributes:
        sigmas: The noise levels: standard deviations of the noise on ``y``.
        dim: The dimension of an input.
        n_points: Pairs in a sequence, the query included.
    """

    sigmas: tuple[float, ...] = (0.1, 1.0)
    dim: int = 3
    n_points: int = 8

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **QUICK,
            "n_layers": 4,
            "n_heads": 4,
            "d_model": 64,
            "targets": "expected",
            "steps": 5_000,
            "n_checkpoints": 30,
        }
    )

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, 0.0)
        if not self.sigmas or min(self.sigmas) < 0 or len(set(self.sigmas)) < len(self.sigmas):
            raise ValueError(
                f"sigmas is {self.sigmas}; give at least one noise level, each once, 0 or higher"
            )

    @classmethod
    def published(cls) -> NoisyLinear:
        """The paper's setting: five levels in 20 dimensions, with 20 demonstrations."""
        return cls((0.0, 0.1, 0.25, 0.5, 1.0), dim=20, n_points=21)

    @property
    def tasks(self) -> tuple[str, ...]:
        """``("sigma 0.1", "sigma 1")``."""
        return tuple(f"sigma {sigma:g}" for sigma in self.sigmas)

    @property
    def penalties(self) -> tuple[float, ...]:
        """The penalty of ridge regression that is best at each level, ``dim sigma^2``."""
        return tuple(self.dim * variance for variance in self._variances)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        labels = draw_labels(batch_size, len(self.sigmas), generator, labels)
        xs = normal(generator, batch_size, self.n_points, self.dim)
        weights = normal(generator, batch_size, self.dim) / self.dim**0.5
        clean = einsum(xs, weights, "batch point dim, batch dim -> batch point")
        levels = torch.tensor(self.sigmas, device=xs.device)[labels]
        noise = normal(generator, *clean.shape) * rearrange(levels, "batch -> batch 1")
        return Batch(xs, clean + noise, labels)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
        """Ridge with each level's penalty, the exact mixture, and ridge at the true level.

        The mixture weights the levels' ridges by their posterior probability; no predictor has a
        lower expected squared error.
        """
        found = self._mixture(batch)
        ridges = {
            f"ridge for {task}": found.by_basis[..., level] for level, task in enumerate(self.tasks)
        }
        rows = torch.arange(len(batch.labels), device=batch.labels.device)
        known = found.by_basis[rows, :, batch.labels]
        return {**ridges, "Bayes mixture": found.prediction, "true level": known}

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """As for :meth:`Problem.posterior`: exact, by the marginal likelihood of each level."""
        return self._mixture(batch).probabilities

    def by_task(self, batch: Batch) -> TaskPredictions:
        """As for :meth:`Problem.by_task`: ridge at each level."""
        found = self._mixture(batch)
        return TaskPredictions(found.by_basis, found.variances)

    def swapped_at(self, point: int) -> tuple[int, ...]:
        """The query's token: no single output shows the level, which takes all pairs to infer."""
        return (self.query_at(point),)

    def finding(self, run: Any) -> Finding:
        """Whether a model reaches the Bayes error of all levels at once, and how.

        Errors are those at the last point: the exact risk of the level's own ridge plus the mean
        squared distance of the predictions from it, which varies less than a mean of squared
        errors. If ``penalty_to_model`` is above 1, no single penalty is as good at all levels: the
        best one's error is so many times the model's at one of them.

        The figures are ``corner`` (the error at the lowest level above 0 and at the highest, with
        all ridge penalties), ``decoding`` (the level at the query's token) and ``swaps``.

        Args:
            run: A :class:`Run` on this problem.

        Raises:
            ValueError: If there are fewer than two levels above 0.
        """
        return _finding(self, run)

    def _mixture(self, batch: Batch) -> MixturePosterior:
        return noise_mixture(
            batch.xs, batch.ys, noise_variances=self._variances, weight_variance=1 / self.dim
        )

    @property
    def _variances(self) -> tuple[float, ...]:
        return tuple(max(sigma, _LEAST) ** 2 for sigma in self.sigmas)


def ridge_risk(
    penalties: Sequence[float],
    *,
    sigma: float,
    dim: int,
    n_shots: int,
    n_draws: int = 20_000,
    seed: int = 0,
) -> Float[Tensor, " penalty"]:
    """Return the expected squared error of ridge regression on a new pair, noise included.

    With ``w ~ N(0, I / dim)``, noise of standard deviation ``sigma``, ``A = X'X + penalty I`` and
    the expectation over ``X``, by Monte Carlo::

        sigma^2 + E[(penalty^2 / dim) tr A^-2 + sigma^2 tr(A^-1 X'X A^-1)]

    Args:
        penalties: Weights of ``|w|^2`` relative to the sum of squared errors; ``dim sigma^2`` is
            the best.
        sigma: The noise level.
        dim: The dimension of an input.
        n_shots: Demonstrations, the rows of ``X``.
        n_draws: Draws of ``X``, the same for all penalties and levels.
        seed: Their seed.

    Raises:
        ValueError: If a penalty is not positive, the level is negative, or a size is below 1.

    Example:
        >>> risk = ridge_risk([0.2, 5.0], sigma=0.5, dim=20, n_shots=20, n_draws=2000)
        >>> [round(one, 1) for one in risk.tolist()]  # the best penalty is the second
        [1.4, 0.6]
    """
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties is {list(penalties)}; give at least one, all positive")
    if sigma < 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    for name, size in (("dim", dim), ("n_shots", n_shots), ("n_draws", n_draws)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    xs = normal(torch.Generator().manual_seed(seed), n_draws, n_shots, dim).double()
    gram = einsum(xs, xs, "draw shot row, draw shot column -> draw row column")
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    rates = torch.tensor(penalties, dtype=torch.float64)
    shrunk = (values + rearrange(rates, "penalty -> penalty 1 1")) ** -2
    bias = rates.square() / dim * shrunk.sum(-1).mean(-1)
    variance = sigma**2 * (values * shrunk).sum(-1).mean(-1)
    risk: Tensor = sigma**2 + bias + variance
    return risk.float()


def _finding(problem: NoisyLinear, run: Any) -> Finding:
    levels = [level for level, sigma in enumerate(problem.sigmas) if sigma > 0]
    if len(levels) < 2:
        raise ValueError(f"sigmas is {problem.sigmas}; a finding needs two levels above 0")
    levels.sort(key=lambda level: problem.sigmas[level])
    low, high = levels[0], levels[-1]
    train, choose, test = (drawn(problem, _N, seed) for seed in (_TRAIN, _CHOOSE, _TEST))
    exact, own = problem._mixture(test), problem.oracles(test)["true level"][:, -1]
    ends = (math.log10(problem.penalties[low] / 4), math.log10(problem.penalties[high] * 4))
    penalties = torch.logspace(*ends, 60).tolist()
    curve = [_risks(problem, level, penalties) for level in range(len(problem.sigmas))]
    bayes = [_risks(problem, level, [best])[0] for level, best in enumerate(problem.penalties)]

    def errors(predictions: Float[Tensor, " example"]) -> list[float]:
        apart = (predictions - own).square()
        return [
            risk + float(apart[test.labels == level].mean()) for level, risk in enumerate(bayes)
        ]

    def worst(found: Sequence[float], others: Sequence[float]) -> float:
        return max(found[level] / others[level] for level in levels)

    steps, path = spread(run.steps, _CHECKPOINTS), []
    for step in steps:
        with torch.no_grad():
            predicted = problem.predict(run.model(step).run_with_hooks, test)[:, -1]
        path.append(errors(predicted))
    apart = rearrange((predicted - own).square(), "(level each) -> level each", each=_N)
    mixture, last = errors(exact.prediction[:, -1]), run.model(steps[-1])
    chosen, swapped = (
        swap_distances(last, problem, train, batch, problem._mixture(batch).by_basis[:, -1].T)
        for batch in (choose, test)
    )
    numbers: dict[str, Any] = {
        "sigmas": list(problem.sigmas),
        "steps": list(steps),
        "model_error": path,
        "model_error_deviation": (apart.std(1) / _N**0.5).tolist(),
        "bayes_error": bayes,
        "mixture_error": mixture,
        "penalties": penalties,
        "penalty_error_low": curve[low],
        "penalty_error_high": curve[high],
        "model_to_bayes": worst(path[-1], bayes),
        "mixture_to_bayes": worst(mixture, bayes),
        "penalty_to_model": min(worst(one, path[-1]) for one in zip(*curve, strict=True)),
        **_decoded(problem, run, steps, train, test),
        **swapped.numbers(chosen.best_layer()),
    }
    figures = {
        "corner": _corner(problem, numbers, low, high),
        "decoding": _decoding(numbers),
        "swaps": plot_swap_distances(swapped),
    }
    return Finding(_sentence(problem, numbers, low, high), numbers, figures)


def _risks(problem: NoisyLinear, level: int, penalties: Sequence[float]) -> list[float]:
    """The risk at a level of ridge with each penalty, at the last point."""
    sigma, n_shots = problem.sigmas[level], problem.n_points - 1
    risk: list[float] = ridge_risk(
        penalties, sigma=sigma, dim=problem.dim, n_shots=n_shots
    ).tolist()
    return risk


def _decoded(
    problem: NoisyLinear, run: Any, steps: Sequence[int], train: Batch, test: Batch
) -> dict[str, Any]:
    """How well the level is read at the query's token, and from the exact posterior."""
    logs = [math.log(variance) / 2 for variance in problem._variances]
    query = [problem.query_at(problem.n_points - 1)]
    some = torch.arange(len(test.labels)).view(len(logs), -1)[:, :_N_TD].flatten()
    td, r2 = [], []
    for step in steps:
        model = run.model(step)
        fitted, held = (read_stream(model, problem, one, places=query)[0] for one in (train, test))
        td.append(task_decodability(held.select(some)).mean.tolist())
        r2.append(probe_r2(fitted, held, logs))
    posterior = problem.posterior(test)[:, -1].double()
    numbers = torch.tensor(logs, dtype=torch.float64)
    truth = numbers[test.labels]
    left = (posterior @ numbers - truth).square().mean() / truth.var(correction=0)
    return {
        "td": td,
        "probe_r2": r2,
        "td_best": max(td[-1]),
        "probe_r2_best": max(r2[-1]),
        "bayes_accuracy": float((posterior.argmax(-1) == test.labels).double().mean()),
        "bayes_r2": float(1 - left),
    }


def _sentence(problem: NoisyLinear, numbers: Mapping[str, Any], low: int, high: int) -> str:
    by_level = ", and ".join(
        f"{numbers['model_error'][-1][level]:.4f} at {problem.tasks[level]} (standard error "
        f"{numbers['model_error_deviation'][level]:.4f}; Bayes {numbers['bayes_error'][level]:.4f},"
        f" exact mixture {numbers['mixture_error'][level]:.4f})"
        for level in (low, high)
    )
    times = numbers["penalty_to_model"]
    below = (
        f"No single ridge penalty is as good at all levels: the best one's error is {times:.2f} "
        "times the model's at one of them."
        if times > 1
        else "A single ridge penalty is as good at all levels."
    )
    moves = [
        f"{moved:.2f} of the way (own mean {own:.2f}) at {task}"
        for task, moved, own in zip(
            problem.tasks, numbers["swap_moved"], numbers["swap_moved_own_mean"], strict=True
        )
    ]
    reached = "reached" if numbers["model_to_bayes"] < 1.1 else "not reached"
    return (
        f"The error at the last point is {by_level}. {below} The Bayes lines are {reached} within "
        f"10 %: the error is up to {numbers['model_to_bayes']:.2f} times the Bayes error (exact "
        f"mixture {numbers['mixture_to_bayes']:.2f}). The level's decodability at the query is "
        f"{numbers['td_best']:.2f} (the exact posterior's is {numbers['bayes_accuracy']:.2f}), and "
        f"a linear probe reads log sigma with an R^2 of {numbers['probe_r2_best']:.2f} (posterior "
        f"mean {numbers['bayes_r2']:.2f}). With another level's mean at layer "
        f"{numbers['swap_layer']}, predictions move towards that level's ridge: "
        f"{', '.join(moves)}."
    )


@styled
def _corner(problem: NoisyLinear, numbers: Mapping[str, Any], low: int, high: int) -> Figure:
    """The error at two levels on two axes, over training."""
    ax = new_axes(None)
    path, bayes, mixture = (numbers[f"{of}_error"] for of in ("model", "bayes", "mixture"))
    ax.axvline(bayes[low], color=GREY, linestyle="--", linewidth=0.9)
    ax.axhline(bayes[high], color=GREY, linestyle="--", linewidth=0.9, label="Bayes lines")
    curve = numbers["penalty_error_low"], numbers["penalty_error_high"]
    ax.plot(*curve, color="black", label="ridge, all penalties")
    way = [error[low] for error in path], [error[high] for error in path]
    ax.plot(*way, color=COLOURS[0], marker="o", label="model over training")
    ax.plot(mixture[low], mixture[high], "*", color=COLOURS[2], ms=9, label="exact mixture")
    ax.plot(way[0][-1], way[1][-1], "D", color=COLOURS[1], ms=5, label="model, last step")
    ax.set(
        xscale="log",
        xlabel=f"squared error at {problem.tasks[low]}",
        ylabel=f"squared error at {problem.tasks[high]}",
        title=f"After {problem.n_points - 1} demonstrations in {problem.dim} dimensions",
    )
    return figure_of(legend_beside(ax))


@styled
def _decoding(numbers: Mapping[str, Any]) -> Figure:
    """How well the level can be read at the query's token, over training."""
    ax = new_axes(None)
    steps = numbers["steps"]
    for name, bound, label, colour in (
        ("td", "bayes_accuracy", "decodability", COLOURS[0]),
        ("probe_r2", "bayes_r2", "$R^2$ of log sigma", COLOURS[1]),
    ):
        best = [max(layers) for layers in numbers[name]]
        ax.plot(steps, best, color=colour, marker="o", label=f"{label}, best layer")
        ax.axhline(numbers[bound], color=colour, ls="--", label=f"{label}, exact posterior")
    chance = 1 / len(numbers["sigmas"])
    ax.axhline(chance, color=GREY, ls=":", label="decodability, chance")
    ax.set_xscale("symlog", linthresh=10)
    ax.set(xlabel="training step", ylabel="accuracy or $R^2$")
    ax.set(ylim=(-0.05, 1.05), xlim=(0, 1.2 * max(steps[-1], 1)))
    ax.set_title("The noise level at the query's token")
    return figure_of(legend_beside(ax))
