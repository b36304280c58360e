"""How far along the chain a model of LEGO is right, and what its layers show of how."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from transformer_lens_taskvec.lab.problems.base import Batch, Finding
from transformer_lens_taskvec.lab.problems.lego.values import (
    SEED,
    plot_values,
    spelled_layer,
    uniform,
    value_decodability,
)
from transformer_lens_taskvec.plots import figure_of, styled
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    legend_beside,
    new_axes,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DIAGONAL = 0.5
"""Layers per position from which the map is called a diagonal."""


def chain_accuracy(
    model: Any, problem: Any, *, n: int = 2_000, seed: int = SEED
) -> Float[Tensor, " position"]:
    """Return a model's accuracy at every position in the chain, beyond the supervised ones too.

    The bits of the sequences are uniform, whatever the problem's ``negation``, so that chance is
    0.5 everywhere. ``Run.accuracy`` is of the problem as it is, and NaN at positions that no loss
    counts.

    Args:
        model: A model of the lab, or a :class:`Run`, whose last model is taken.
        problem: A :class:`Lego`.
        n: Sequences.
        seed: Their seed.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.lego import Lego
        >>> from transformer_lens_taskvec.lab.problems.lego.finding import chain_accuracy
        >>> problem = Lego(n_vars=3, n_supervised=2)
        >>> model = problem.make_model(lab.TrainConfig(n_layers=1), seed=0, device="cpu")
        >>> chain_accuracy(model, problem, n=20).shape
        torch.Size([3])
    """
    model = model if isinstance(model, nn.Module) else model.model()
    batch = uniform(problem).sample(n, torch.Generator().manual_seed(seed))
    return _right(model, problem, batch).float().mean(0)


def chain_finding(run: Any, *, n: int = 2_000, n_probe: int = 800, seed: int = SEED) -> Finding:
    """Return how far along the chain a run is right, and whether its values form a diagonal.

    Args:
        run: A :class:`Run` on a :class:`Lego`.
        n: Sequences for the accuracy.
        n_probe: Sequences for the decodability of values.
        seed: Seed of both.

    Returns:
        The accuracy by position with that of the oracles, beyond the supervised positions too, and
        on the sequences in which counting the negations is wrong; the layers at which values become
        readable; and the figures ``accuracy``, ``values`` and ``training``.
    """
    problem = run.config.problem
    batch = uniform(problem).sample(n, torch.Generator().manual_seed(seed))
    right = torch.stack([_right(run.model(step), problem, batch) for step in run.steps])
    accuracy = right.float().mean(1)
    chances = {
        name: _chance_of_right(logits, batch.ys) for name, logits in problem.oracles(batch).items()
    }
    oracles = {name: chance.mean(0) for name, chance in chances.items()}
    against = _shares(right[-1], chances["counts"] == 0)
    found = value_decodability(run, problem, n=n_probe, seed=seed)
    last, supervised = accuracy[-1], problem.n_supervised
    beyond = last[supervised:]
    slope, correlation = found.layers_per_position(), found.rank_correlation()
    kind = _kind(slope, correlation)
    layers = found.readable_from()
    extrapolated = (
        f"Beyond these positions it is {_spelled(beyond.tolist())}, where chance is 0.5. "
        if len(beyond)
        else ""
    )
    refuted = (
        f"Where counting the negations is wrong, it is {_spelled(against[:supervised])} from "
        "position 2. "
    )
    sentence = (
        f"At the supervised positions of the chain the model's accuracy is "
        f"{_spelled(last[:supervised].tolist())} (n = {n}). {refuted}{extrapolated}"
        f"At the query the values become readable at layers "
        f"{', '.join(spelled_layer(layer) for layer in layers.tolist())}: {slope:.2f} layers per "
        f"position, rank correlation {correlation:.2f}, {kind}. With shuffled values the probe "
        f"reaches at most {float(found.shuffled.max()):.2f}."
    )
    numbers = {
        "accuracy": last.tolist(),
        "accuracy_supervised": float(last[:supervised].mean()),
        "accuracy_beyond": float(beyond.mean()) if len(beyond) else None,
        "accuracy_where_counts_is_wrong": against,
        "n_supervised": supervised,
        "n": n,
        "readable_from_layer": [None if x != x else int(x) for x in layers.tolist()],
        "layers_per_position": None if slope != slope else slope,
        "rank_correlation": None if correlation != correlation else correlation,
        "kind": kind,
        "query_scores": found.scores[0].tolist(),
        "clause_scores": found.scores[1].tolist(),
        "clause_ceiling": found.ceiling[1].tolist(),
        "highest_shuffled": float(found.shuffled.max()),
        **{f"accuracy_of_{name}": values.tolist() for name, values in oracles.items()},
    }
    figures = {
        "accuracy": figure_of(plot_chain_accuracy(last, oracles, supervised)),
        "values": plot_values(found),
        "training": figure_of(_plot_over_training(run.steps, accuracy, supervised)),
    }
    return Finding(sentence, numbers, figures)


@styled
def plot_chain_accuracy(
    accuracy: Float[Tensor, " position"],
    oracles: dict[str, Float[Tensor, " position"]],
    n_supervised: int,
    ax: Axes | None = None,
) -> Axes:
    """Draw the accuracy by position in the chain, with the oracles'.

    Args:
        accuracy: The model's, from :func:`chain_accuracy`.
        oracles: The oracles' expected accuracy, by name.
        n_supervised: The positions that training counts; the rest is shaded.
        ax: Where to draw; by default on new axes.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.lego.finding import plot_chain_accuracy
        >>> plot_chain_accuracy(torch.ones(4), {"chance": torch.full((4,), 0.5)}, 3).get_xlabel()
        'position in the chain'
    """
    ax = new_axes(ax)
    positions = range(1, len(accuracy) + 1)
    lines = ("--", ":", "-.", (0, (1, 3)))
    for (name, values), line in zip(oracles.items(), lines, strict=False):
        ax.plot(positions, values.tolist(), color=GREY, linestyle=line, label=name)
    ax.plot(positions, accuracy.tolist(), "o-", color=COLOURS[0], label="model")
    ax.set(
        xlabel="position in the chain",
        ylabel="accuracy",
        ylim=(0.4, 1.03),
        title="Accuracy along the chain; shaded: not supervised",
    )
    if n_supervised < len(accuracy):
        ax.axvspan(n_supervised + 0.5, len(accuracy) + 0.5, color=GREY, alpha=0.15, linewidth=0)
    ax.set_xlim(0.5, len(accuracy) + 0.5)
    whole_numbers(ax)
    return legend_beside(ax)


@styled
def _plot_over_training(
    steps: tuple[int, ...], accuracy: Float[Tensor, "checkpoint position"], n_supervised: int
) -> Axes:
    """The accuracy at each position over training; dashed where it is not supervised."""
    ax = new_axes(None)
    for position, curve in enumerate(accuracy.T):
        ax.plot(
            steps,
            curve.tolist(),
            color=COLOURS[position % len(COLOURS)],
            linestyle="-" if position < n_supervised else "--",
            label=f"position {position + 1}",
        )
    ax.axhline(0.5, color=GREY, linestyle=":", linewidth=0.9, label="chance")
    ax.set(
        xlabel="training step",
        ylabel="accuracy",
        ylim=(0.4, 1.03),
        title="Accuracy over training; dashed: not supervised",
    )
    return legend_beside(ax)


def _kind(slope: float, correlation: float) -> str:
    """What the map of layers and positions looks like, in words."""
    if slope != slope:
        return "too few to tell a diagonal from a column"
    if slope >= _DIAGONAL and correlation > 0:
        return "a diagonal, so the model works its way along the chain"
    return "a column, so the model has a shortcut"


def _right(model: Any, problem: Any, batch: Batch) -> Bool[Tensor, "batch position"]:
    """Whether the model gives the value of each variable."""
    with torch.no_grad():
        logits = problem.predict(model.run_with_hooks, batch)
    right: Tensor = problem.right(logits, batch.ys, batch.labels[:, None])
    return right


def _chance_of_right(
    logits: Float[Tensor, "batch position token"], values: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch position"]:
    """How likely an oracle names the right value; a coin decides between equals."""
    own = logits.gather(2, values[..., None])[..., 0]
    other = logits.gather(2, 1 - values[..., None])[..., 0]
    return torch.where(own.isclose(other), 0.5, (own > other).float())


def _shares(
    right: Bool[Tensor, "batch position"], some: Bool[Tensor, "batch position"]
) -> list[float | None]:
    """The accuracy at each position over some of the sequences; None where there is none."""
    pairs = zip(right.T, some.T, strict=True)
    return [float(one[rows].float().mean()) if rows.any() else None for one, rows in pairs]


def _spelled(shares: Iterable[float | None]) -> str:
    return ", ".join(f"{share:.3f}" for share in shares if share is not None)
