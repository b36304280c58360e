"""The figures of a run: those the paper shows, drawn from ``measure_emergence``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.scores import LOSS_LABELS
from transformer_lens_taskvec.activations import collect
from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.lab.emergence import Emergence
from transformer_lens_taskvec.lab.episodes import problem_episodes
from transformer_lens_taskvec.lab.training.on_problem import Run
from transformer_lens_taskvec.plots import (
    figure_of,
    plot_decodability,
    plot_embedding,
    plot_head_effects,
    plot_perturbation,
    styled,
)
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    legend_beside,
    new_axes,
    task_style,
    two_axes,
    whole_numbers,
)
from transformer_lens_taskvec.vectors.heads import head_effects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SEED = 21
_LINES = ("--", "-.", ":", "-", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def emergence_figures(run: Run, emergence: Emergence, *, n: int = 100) -> dict[str, Figure]:
    """Draw a run (Han et al. 2025, Figures 2 to 7, 17 and 18).

    Figures of several checkpoints show the last before TD rises, the first after half of its rise,
    and the last of the run.

    Args:
        run: The run.
        emergence: Its measurements.
        n: Sequences per task for the embedding, TD by layer, and head pruning.

    Returns:
        Figures by name: ``training``, ``oracles``, ``embedding``, ``swaps``, ``td_by_layer``,
        ``head_pruning``.

    Example:
        >>> from matplotlib import pyplot as plt
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> found = lab.measure_emergence(run, steps=[0, 26000], n=11, n_oracle=20, progress=False)
        >>> sorted(lab.emergence_figures(run, found, n=11))
        ['embedding', 'head_pruning', 'oracles', 'swaps', 'td_by_layer', 'training']
        >>> plt.close("all")
    """
    episodes = problem_episodes(run.config.problem, n, emergence.n_shots, seed=_SEED)
    moments = _moments(emergence)
    at = dict(zip(emergence.steps, emergence.swaps, strict=True))
    last = run.model(moments[-1])
    pruned = head_effects(last, episodes, on=episodes, ablation="zero", position=None)
    harm = -pruned.gain
    reach = float(harm.flatten().kthvalue(max(1, int(0.9 * harm.numel()))).values.clamp(min=1e-3))

    def embedding(step: int, ax: Any) -> None:
        plot_embedding(collect(run.model(step), episodes), emergence.best_layer(), ax)

    def swap(step: int, ax: Any) -> None:
        plot_perturbation(at[step], ax, reach=float(at[moments[-1]].delta_loss.abs().max()))

    return {
        "training": figure_of(plot_training(emergence)[0]),
        "oracles": figure_of(plot_oracles(emergence, moments)),
        "embedding": _panels(moments, embedding, "step {}"),
        "swaps": _panels(moments, swap, "step {}", size=max(1.0, len(emergence.tasks) / 5)),
        "td_by_layer": figure_of(plot_decodability(task_decodability(collect(last, episodes)))),
        "head_pruning": _panels(
            pruned.tasks,
            lambda task, ax: plot_head_effects(pruned, ax, task=task, reach=reach),
            "without a head: {}",
        ),
    }


def _moments(emergence: Emergence) -> list[int]:
    """The last checkpoint before TD rises, the first after half of its rise, and the last."""
    td = emergence.td[:, emergence.best_layer()].mean(-1)
    risen = (td - td[0]) / (td.max() - td[0]).clamp(min=1e-6)
    half = int((risen > 0.5).int().argmax())
    before = [index for index in range(half + 1) if risen[index] < 0.2]
    chosen = {before[-1] if before else 0, half, len(td) - 1}
    return [emergence.steps[index] for index in sorted(chosen)]


@styled
def _panels(
    items: Sequence[Any], draw: Callable[[Any, Any], Any], title: str, *, size: float = 1.0
) -> Figure:
    import matplotlib.pyplot as plt

    columns = min(len(items), 4)
    rows = -(-len(items) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * size * columns, 2.9 * size * rows),
        layout="constrained",
        squeeze=False,
    )
    for ax, item in zip(grid.flat, items, strict=False):
        draw(item, ax)
        ax.set_title(title.format(item))
        legend = ax.get_legend()
        if legend is not None and item != items[-1]:
            legend.remove()
    for ax in grid.flat[len(items) :]:
        ax.set_axis_off()
    return figure


@styled
def plot_training(
    emergence: Emergence, axes: Sequence[Axes] | None = None, *, layer: int | None = None
) -> tuple[Axes, Axes]:
    """Draw each task's error over training and, below it, the task's TD (the paper's Figure 4).

    Args:
        emergence: From :func:`measure_emergence`.
        axes: Two axes to draw on, one above the other; by default new ones.
        layer: The layer of TD; by default the one with the highest TD at the last checkpoint.

    Returns:
        The axes of the error and of TD.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> found = lab.measure_emergence(run, steps=[0, 26000], n=11, n_oracle=20, progress=False)
        >>> above, below = lab.plot_training(found)
        >>> above.get_ylabel(), below.get_ylabel()
        ('squared error, late points', 'task decodability, layer 4')
    """
    above, below = two_axes(axes)
    layer = emergence.best_layer() if layer is None else layer
    for index, task in enumerate(emergence.tasks):
        style = task_style(index, task)
        above.plot(emergence.steps, emergence.late_loss[:, index].tolist(), label=task, **style)
        below.plot(emergence.steps, emergence.td[:, layer, index].tolist(), **style)
    bottom, top = _reach(emergence.late_loss, emergence)
    for name, style in _oracle_styles(emergence):
        level = emergence.oracles.late(name)
        if bottom <= level <= top:
            above.axhline(level, label=name, **style)
    chance = 1 / len(emergence.tasks)
    below.axhline(chance, color=GREY, linestyle="--", linewidth=0.9, label="chance")
    above.set(
        yscale="log",
        ylabel=f"{LOSS_LABELS[emergence.loss_kind]}, late points",
        ylim=(bottom, top),
        title=f"Over training (rank correlation {emergence.td_loss_correlation:.2f})",
    )
    first = next((step for step in emergence.steps if step > 0), 1)
    below.set_xscale("symlog", linthresh=first)
    below.set(
        xlabel="training step",
        ylabel=f"task decodability, layer {layer}",
        ylim=(-0.03, 1.03),
        xlim=(0, 1.1 * emergence.steps[-1]),
    )
    return legend_beside(above), legend_beside(below)


@styled
def plot_oracles(
    emergence: Emergence, steps: Sequence[int] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the model's error by position at some checkpoints, and the oracles' (Figure 3).

    Args:
        emergence: From :func:`measure_emergence`.
        steps: Checkpoints; by default about four, to the last.
        ax: Where to draw; by default on new axes.

    Raises:
        ValueError: If there is no checkpoint at one of the steps.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> found = lab.measure_emergence(run, steps=[26000], n=11, n_oracle=20, progress=False)
        >>> lab.plot_oracles(found, [26000]).get_xlabel()
        'position in the sequence'
    """
    if steps is None:
        last = len(emergence.steps) - 1
        steps = [emergence.steps[last * part // 8] for part in (4, 6, 7, 8)]
    missing = [step for step in steps if step not in emergence.steps]
    if missing:
        raise ValueError(f"no checkpoint at step {missing[0]}; there are {list(emergence.steps)}")
    ax = new_axes(ax)
    points = range(1, emergence.loss.shape[-1] + 1)
    for index, step in enumerate(steps):
        curve = emergence.loss[emergence.steps.index(step)].mean(0)
        shade = 0.25 + 0.75 * (index + 1) / len(steps)
        ax.plot(points, curve.tolist(), color=COLOURS[0], alpha=shade, label=f"step {step}")
    for name, style in _oracle_styles(emergence):
        ax.plot(points, emergence.oracles[name].tolist(), label=name, **style)
    ax.set(yscale="log", xlabel="position in the sequence", ylabel=LOSS_LABELS[emergence.loss_kind])
    ax.set(ylim=_reach(emergence.loss, emergence), title="Error by position, with the oracles'")
    whole_numbers(ax)
    return legend_beside(ax)


def _oracle_styles(emergence: Emergence) -> list[tuple[str, dict[str, Any]]]:
    """How to draw each oracle; those that are told the task are grey."""
    names, told = emergence.oracles.names, emergence.oracles.told
    return [
        (name, {"color": GREY if name in told else "black", "linestyle": line, "linewidth": 1})
        for name, line in zip(names, cycle(_LINES), strict=False)
    ]


def _reach(errors: Float[Tensor, "*cell"], emergence: Emergence) -> tuple[float, float]:
    """The lowest and highest error to show: the model's, down to the oracles' lowest.

    Points that no loss counts are NaN, and an oracle that is never wrong is below any figure.
    """
    oracles = emergence.oracles.loss[:, 1:]
    errors, oracles = errors[~errors.isnan()], oracles[oracles > 0]
    return max(0.7 * float(torch.cat([errors, oracles]).min()), 1e-6), 1.5 * float(errors.max())
