"""What a run on a representation shows: probes by layer, error against oracles, and pasting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.analysis.classifiers import readout
from transformer_lens_taskvec.lab.problems.base import Batch, Finding, Problem, balanced_labels
from transformer_lens_taskvec.lab.problems.represented.pasting import (
    Pasted,
    paste_upper,
    plot_pasting,
)
from transformer_lens_taskvec.lab.problems.represented.probes import (
    Kind,
    ProbeErrors,
    name_stages,
    plot_probes,
    probe_targets,
    residuals,
)
from transformer_lens_taskvec.plots import figure_of, styled
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    legend_beside,
    new_axes,
    task_style,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SEED = 31
_N_EACH = 250
_N_TD = 100
_NEIGHBOURS = 10

EVERY = ("every map's Phi(x)", "every map's ridge")
"""The targets that only a problem of several maps has."""


def ordered_targets(n_maps: int) -> tuple[tuple[str, Kind], ...]:
    """Return targets and tokens in the order in which the paper finds them, from below.

    Args:
        n_maps: How many maps there are; of several, all are looked for.

    Example:
        >>> ordered_targets(1)
        (('x', 'y'), ('Phi(x)', 'x'), ('Phi(x)', 'y'), ('prediction', 'x'))
    """
    phi = "Phi(x)" if n_maps == 1 else EVERY[0]
    return ("x", "y"), (phi, "x"), (phi, "y"), ("prediction", "x")


def finding_of(run: Any, problem: Any) -> Finding:
    """Return the finding of a run on a :class:`Represented` problem; see its ``finding``.

    Args:
        run: The run.
        problem: Its problem.
    """
    model = run.model()
    errors = probe_targets(model, problem, seed=_SEED)
    order = ordered_targets(problem.n_maps)
    layers = [errors.best_layer(target, kind) for target, kind in order]
    pasted_above = min(max(0, layers[2]), model.cfg.n_layers - 2)
    pasted = paste_upper(model, pasted_above, problem.linear_vectors())
    curves = late_errors(model, problem)
    late = {name: float(curve[problem.late_from :].mean()) for name, curve in curves.items()}
    numbers: dict[str, Any] = {
        "step": run.steps[-1],
        **{f"late error: {name}": value for name, value in late.items()},
        **{
            name: value
            for (target, kind), layer in zip(order, layers, strict=True)
            for name, value in (
                (f"best layer: {target} at {kind}", layer),
                (f"probe error: {target} at {kind}", float(errors.of(target, kind).min())),
            )
        },
        "pasted above layer": pasted_above,
        **{f"pasting: {name}": pasted.late(name) for name in pasted.names},
        "probes": errors.to_frame().to_dict("records"),
    }
    sentences = [
        _error_sentence(late),
        _order_sentence(order, layers, errors),
        _paste_sentence(pasted),
    ]
    figures = {
        "probes": figure_of(plot_probes(errors)[0]),
        "errors": figure_of(plot_errors(curves)),
        "pasting": figure_of(plot_pasting(pasted)),
    }
    if len(problem.tasks) > 1:
        td = decodability(model, problem)
        by_kind = dict(zip(("x", "y"), td.tolist(), strict=True))
        numbers |= {f"TD at {kind}": scores for kind, scores in by_kind.items()}
        numbers |= {
            f"probe error: {name} at x": float(errors.of(name, "x").min()) for name in EVERY
        }
        sentences.append(_td_sentence(td, errors, len(problem.tasks)))
        figures["decodability"] = figure_of(plot_selection(td, errors, len(problem.tasks)))
    return Finding(" ".join(sentences), numbers, figures)


def late_errors(model: Any, problem: Problem) -> dict[str, Float[Tensor, " point"]]:
    """Return the mean loss of a model and of its problem's oracles on the same sequences, by point.

    Args:
        model: The model.
        problem: The problem.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> list(late_errors(run.model(), run.config.problem))[:2]
        ['model', 'least squares']
    """
    batch = _batch(problem, 1_000 // len(problem.tasks), _SEED + 1)
    with torch.no_grad():
        predictions = {"model": problem.predict(model, batch), **problem.oracles(batch)}
    labels = rearrange(batch.labels, "batch -> batch 1")
    losses = {name: problem.losses(of, batch.ys, labels) for name, of in predictions.items()}
    return {name: of.mean(0) for name, of in losses.items()}


def decodability(model: Any, problem: Problem) -> Float[Tensor, "kind stage"]:
    """Return TD at the last token ``x`` and the last ``y`` before it, by layer.

    It is the leave-one-out vote of 10 nearest neighbours among 100 sequences per task, before the
    first block and after each.

    Args:
        model: The model.
        problem: The problem, of two tasks or more.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> decodability(run.model(), run.config.problem).shape
        torch.Size([2, 6])
    """
    batch = _batch(problem, _N_TD, _SEED + 2)
    at_x = problem.query_at(problem.n_points - 1)
    at_y = problem.query_at(problem.n_points - 2) + 1
    hits = readout("knn", _NEIGHBOURS)
    stages = residuals(model, problem, batch)
    return torch.tensor(
        [
            [float(hits(stage[:, at], batch.labels).float().mean()) for stage in stages]
            for at in (at_x, at_y)
        ]
    )


@styled
def plot_errors(curves: Mapping[str, Float[Tensor, " point"]], ax: Axes | None = None) -> Axes:
    """Draw the error of a model and of the oracles by position.

    Args:
        curves: From :func:`late_errors`; the first is the model's.
        ax: Where to draw; by default on new axes.

    Example:
        >>> plot_errors({"model": torch.ones(3), "ridge": torch.ones(3)}).get_ylabel()
        'squared error'
    """
    ax = new_axes(ax)
    lines = cycle(("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))))
    for index, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": GREY if index == 1 else "black", "linewidth": 1}
        style = {**style, "linestyle": next(lines)} if index else task_style(0)
        ax.plot(range(1, len(curve) + 1), curve.tolist(), label=name, **style)
    ax.set(yscale="log", xlabel="position in the sequence", ylabel="squared error")
    ax.set_title("Error by position, with the oracles'")
    whole_numbers(ax)
    return legend_beside(ax)


@styled
def plot_selection(
    td: Float[Tensor, "kind stage"], errors: ProbeErrors, n_tasks: int, ax: Axes | None = None
) -> Axes:
    """Draw TD by layer, with probes for the sequence's own map and for every map.

    Args:
        td: From :func:`decodability`.
        errors: From :func:`probe_targets`, of a problem of several maps.
        n_tasks: How many tasks there are.
        ax: Where to draw; by default on new axes.

    Raises:
        ValueError: If every map was not probed for.

    Example:
        >>> zero = torch.zeros(2, 3, 3)
        >>> errors = ProbeErrors(("Phi(x)", *EVERY), zero, zero, zero, (8, 16), 10)
        >>> plot_selection(torch.ones(2, 3), errors, 3).get_xlabel()
        'after layer'
    """
    ax = new_axes(ax, (5.4, 2.9))
    stages = list(range(td.shape[1]))
    for kind, scores, line in zip(("x", "y"), td.tolist(), ("-", "--"), strict=True):
        ax.plot(stages, scores, line, color=COLOURS[0], marker="o", label=f"TD at {kind}")
    ax.axhline(1 / n_tasks, color=GREY, linestyle=":", linewidth=0.9, label="TD by chance")
    for index, target in enumerate(("Phi(x)", *EVERY)):
        curve = errors.of(target, "x").tolist()
        ax.plot(stages, curve, label=f"error at x: {target}", **task_style(index + 1))
    name_stages(ax, len(stages))
    ax.set(ylabel="TD, or relative error", ylim=(-0.03, 1.13))
    ax.set_title("Which map: told apart, and selected")
    return legend_beside(ax)


def _batch(problem: Problem, n_each: int, seed: int) -> Batch:
    labels = balanced_labels(len(problem.tasks), n_each)
    return problem.sample(len(labels), torch.Generator().manual_seed(seed), labels=labels)


def _error_sentence(late: Mapping[str, float]) -> str:
    best = "Bayes mixture" if "Bayes mixture" in late else "ridge on Phi(x)"
    return (
        f"The late error is {late['model']:.4f}: {late['model'] / late[best]:.2f} times that of "
        f"{best} ({late[best]:.4f}), and {late['model'] / late['ridge on x']:.3f} times that of "
        f"ridge on x ({late['ridge on x']:.3f})."
    )


def _order_sentence(
    order: Sequence[tuple[str, Kind]], layers: list[int], errors: ProbeErrors
) -> str:
    named = ", ".join(
        f"{target} at {kind} {'in the embedding' if layer < 0 else f'after layer {layer}'} "
        f"({float(errors.of(target, kind)[layer + 1]):.2f}, lower by "
        f"{float(errors.gain(target, kind)[layer + 1]):.2f} than before training)"
        for (target, kind), layer in zip(order, layers, strict=True)
    )
    holds = layers == sorted(layers)
    return (
        f"Probes have their least relative error for {named}: "
        f"{'' if holds else 'not '}the order of the paper."
    )


def _paste_sentence(pasted: Pasted) -> str:
    ridge, own, mixed, without, zero = (
        pasted.late(name)
        for name in ("ridge", "pasted", "shuffled weights", "no lower module", "zero")
    )
    return (
        f"On linear data the layers above {pasted.layer} with a trained embedding reach {own:.3f} "
        f"({own / ridge:.1f} times ridge, {ridge:.4f}); with shuffled weights {mixed:.3f}, without "
        f"a lower module {without:.3f}, zero {zero:.3f}."
    )


def _td_sentence(td: Float[Tensor, "kind stage"], errors: ProbeErrors, n_tasks: int) -> str:
    named = " and ".join(
        f"{float(scores.max()):.2f} at tokens {kind} (layer {int(scores.argmax()) - 1})"
        for kind, scores in zip(("x", "y"), td, strict=True)
    )
    own, phi, fits = (float(errors.of(name, "x").min()) for name in ("Phi(x)", *EVERY))
    return (
        f"The map can be decoded with TD {named}; chance is {1 / n_tasks:.2f}. At tokens x probes "
        f"read the own map's Phi(x) with an error of {own:.2f}, that of every map with {phi:.2f}, "
        f"and ridge on every map with {fits:.2f}."
    )
