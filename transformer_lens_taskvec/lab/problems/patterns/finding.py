"""What a run on patterns shows: new tasks, new patterns, and pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.lab.problems.base import Batch, Finding
from transformer_lens_taskvec.lab.problems.patterns.pruning import plot_pruning, pruning_curve
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    legend_beside,
    two_axes,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEED = 41


def patterns_finding(run: Any, *, n: int = 500, n_pruning: int = 40) -> Finding:
    """Return the accuracy on training tasks, new tasks and new patterns, and under pruning.

    The numbers are of the query, and at the last checkpoint.

    Args:
        run: A run on a :class:`PatternTasks`.
        n: Sequences of each kind.
        n_pruning: Sequences per task for the pruning.

    Returns:
        The finding, with the figures ``accuracy`` (over training, and by position with the
        oracles') and ``pruning``.

    Example:
        >>> import dataclasses, tempfile
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.patterns import PatternTasks
        >>> from transformer_lens_taskvec.lab.problems.patterns.finding import patterns_finding
        >>> config = lab.TrainConfig(
        ...     problem=PatternTasks(n_points=5), n_layers=1, n_heads=1, d_model=8, n_checkpoints=1
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = lab.train(config, folder, steps=2, progress=False)
        ...     found = patterns_finding(run, n=20, n_pruning=2)
        >>> sorted(found.figures)
        ['accuracy', 'pruning']
    """
    problem = run.config.problem
    kinds = {
        "training tasks": problem,
        "new tasks": problem.new_tasks(),
        "new patterns": problem.shifted(),
    }
    batches = {name: _all_points(kind, n) for name, kind in kinds.items()}
    curves: dict[str, list[Float[Tensor, " point"]]] = {name: [] for name in kinds}
    for step in run.steps:
        model = run.model(step)
        for name, batch in batches.items():
            with torch.no_grad():
                curves[name].append(_accuracy(problem.predict(model, batch), batch))
    oracles = _oracle_curves(problem, batches)
    accuracy = {name: float(found[-1][-1]) for name, found in curves.items()}
    early = min(2, problem.n_points - 1)
    pruning = pruning_curve(run, n=n_pruning)
    half = min(range(len(pruning.fractions)), key=lambda at: abs(pruning.fractions[at] - 0.5))
    numbers: dict[str, Any] = {
        **{f"accuracy, {name}": value for name, value in accuracy.items()},
        **{f"accuracy, {name}": float(curve[-1]) for name, curve in oracles.items()},
        **{
            f"accuracy at point {early + 1}, {name}": float(found[early])
            for name, found in {
                **{name: found[-1] for name, found in curves.items()},
                **oracles,
            }.items()
        },
        "layer of the vectors": pruning.layer,
        "place of the vectors": pruning.place,
        "accuracy, shuffled outputs": float(pruning.no_vector[0, 0]),
        "accuracy, shuffled outputs, own vector": float(pruning.own_vector[0, 0]),
        "accuracy, shuffled outputs, another's vector": float(pruning.other_vector[0, 0]),
    }
    for index, order in enumerate(pruning.orders):
        numbers |= {
            f"free to prune, {order} first": pruning.free_fraction(order),
            f"accuracy at half, {order} first": float(pruning.accuracy[index, half]),
            f"vector accuracy at half, {order} first": float(pruning.own_vector[index, half]),
        }
    sentence = (
        f"The query is answered right in {accuracy['training tasks']:.1%} of sequences of training "
        f"tasks, {accuracy['new tasks']:.1%} of new tasks and {accuracy['new patterns']:.1%} of "
        f"new patterns (nearest demonstration "
        f"{numbers['accuracy, nearest demonstration']:.1%}; Bayes over the training tasks, on new "
        f"tasks, {numbers['accuracy, Bayes over training tasks, on new tasks']:.1%}). "
        f"With half of the MLP neurons pruned, accuracy is "
        + ", ".join(
            f"{numbers[f'accuracy at half, {order} first']:.1%} ({order} first)"
            for order in pruning.orders
        )
        + f". The task's vector at layer {pruning.layer} ({pruning.place}) takes the accuracy with "
        f"shuffled outputs from {pruning.no_vector[0, 0]:.1%} to {pruning.own_vector[0, 0]:.1%} "
        f"(another task's: {pruning.other_vector[0, 0]:.1%}), and with half of the neurons pruned "
        "to "
        + ", ".join(
            f"{numbers[f'vector accuracy at half, {order} first']:.1%} ({order} first)"
            for order in pruning.orders
        )
        + "."
    )
    figures = {
        "accuracy": _accuracy_figure(run.steps, curves, oracles),
        "pruning": plot_pruning(pruning, chance=0.5),
    }
    return Finding(sentence, numbers, figures)


def _all_points(problem: Any, n: int) -> Batch:
    """Sequences in which all points count whose input carries one of the task's two patterns."""
    batch: Batch = replace(problem, counted_from=0).sample(n, torch.Generator().manual_seed(_SEED))
    return batch


def _accuracy(predictions: Float[Tensor, "batch point"], batch: Batch) -> Float[Tensor, " point"]:
    """The share of right signs among the points that count; a sign of 0 is half right."""
    assert batch.weights is not None
    right = (1 + (predictions * batch.ys).sign()) / 2
    return (right * batch.weights).sum(0) / batch.weights.sum(0)


def _oracle_curves(
    problem: Any, batches: Mapping[str, Batch]
) -> dict[str, Float[Tensor, " point"]]:
    """The accuracy of predictors that know the training tasks, or no task, by position."""
    new = batches["new tasks"]
    unlabelled = replace(new, labels=torch.zeros_like(new.labels))
    found = problem.oracles(unlabelled)
    trained = problem.oracles(batches["training tasks"])["Bayes, these tasks"]
    return {
        "nearest demonstration": _accuracy(found["nearest demonstration"], new),
        "Bayes over training tasks": _accuracy(trained, batches["training tasks"]),
        "Bayes over training tasks, on new tasks": _accuracy(found["Bayes, these tasks"], new),
    }


@styled
def _accuracy_figure(
    steps: Sequence[int],
    curves: Mapping[str, Sequence[Float[Tensor, " point"]]],
    oracles: Mapping[str, Float[Tensor, " point"]],
) -> Figure:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(6.4, 5.0), layout="constrained")
    above, below = two_axes(figure.subplots(2, 1))
    for index, (name, found) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index]}
        above.plot(steps, [float(curve[-1]) for curve in found], label=name, **style)
        below.plot(range(1, len(found[-1]) + 1), found[-1].tolist(), label=name, **style)
    looks = ((GREY, "--"), (COLOURS[0], "-."), (COLOURS[1], "-."))
    for (name, curve), (colour, line) in zip(oracles.items(), looks, strict=True):
        style = {"color": colour, "linestyle": line, "label": name}
        above.axhline(float(curve[-1]), **style)
        below.plot(range(1, len(curve) + 1), curve.tolist(), **style)
    above.axhline(0.5, color="black", linestyle=":", linewidth=0.8, label="chance")
    first = next((step for step in steps if step > 0), 1)
    above.set_xscale("symlog", linthresh=first)
    above.set(
        xlabel="training step", ylabel="accuracy at the query", ylim=(0.4, 1.03), xlim=(0, None)
    )
    below.set(
        xlabel="position in the sequence", ylabel="accuracy, last checkpoint", ylim=(0.4, 1.03)
    )
    whole_numbers(below)
    legend_beside(above)
    legend_beside(below)
    return figure
