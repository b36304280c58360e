"""Figures of a run of the lab: its error and decodability over training, and the oracles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    legend_beside,
    new_axes,
    styled,
    task_style,
    two_axes,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from transformer_lens_taskvec.lab.emergence import Emergence


@styled
def plot_training(
    emergence: Emergence, axes: Sequence[Axes] | None = None, *, layer: int | None = None
) -> tuple[Axes, Axes]:
    """Each task's error over training, and under it its TD (the paper's Figure 4).

    Args:
        emergence: From :func:`~transformer_lens_taskvec.lab.emergence`.
        axes: Two axes to draw on, one above the other; new ones by default.
        layer: The layer of TD; by default the one with the highest at the last checkpoint.

    Returns:
        The axes of the error and of TD.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> last = [run.steps[0], run.steps[-1]]
        >>> found = lab.emergence(run, steps=last, n=11, n_oracle=20, progress=False)
        >>> above, below = tv.plot_training(found)
        >>> above.get_ylabel(), below.get_ylabel()
        ('squared error, second half', 'task decodability, layer 4')
    """
    above, below = two_axes(axes)
    layer = emergence.best_layer if layer is None else layer
    for index, task in enumerate(emergence.tasks):
        style = task_style(index, task)
        above.plot(emergence.steps, emergence.late_mse[:, index].tolist(), label=task, **style)
        below.plot(emergence.steps, emergence.td[:, layer, index].tolist(), **style)
    for line, name in zip(("--", "-.", ":"), ("ridge", "lasso", "Bayes mixture"), strict=True):
        if name in emergence.oracles.names:
            level = emergence.oracles.late(name)
            above.axhline(level, color="black", linestyle=line, linewidth=0.9, label=name)
    chance = 1 / len(emergence.tasks)
    below.axhline(chance, color=GREY, linestyle="--", linewidth=0.9, label="chance")
    above.set(
        yscale="log",
        ylabel="squared error, second half",
        title=f"Over training (rank correlation {emergence.td_mse_correlation:.2f})",
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
    """The model's error by position at some checkpoints, against the oracles' (Figure 3).

    Args:
        emergence: From :func:`~transformer_lens_taskvec.lab.emergence`.
        steps: Checkpoints; by default about four, to the last.
        ax: Where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no checkpoint at one of the steps.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> last = run.steps[-1:]
        >>> found = lab.emergence(run, steps=last, n=11, n_oracle=20, progress=False)
        >>> tv.plot_oracles(found, last).get_xlabel()
        'position in the sequence'
    """
    ax = new_axes(ax)
    if steps is None:
        last = len(emergence.steps) - 1
        steps = [emergence.steps[last * part // 8] for part in (4, 6, 7, 8)]
    points = range(1, emergence.mse.shape[-1] + 1)
    for index, step in enumerate(steps):
        if step not in emergence.steps:
            raise ValueError(f"no checkpoint at step {step}; there are {list(emergence.steps)}")
        curve = emergence.mse[emergence.steps.index(step)].mean(0)
        shade = 0.25 + 0.75 * (index + 1) / len(steps)
        ax.plot(points, curve.tolist(), color=COLOURS[0], alpha=shade, label=f"step {step}")
    lines = {"ridge": "--", "lasso": "-.", "true basis": ":", "Bayes mixture": "-"}
    for name, line in lines.items():
        if name in emergence.oracles.names:
            curve = emergence.oracles[name]
            ax.plot(points, curve.tolist(), color="black", linestyle=line, linewidth=1, label=name)
    ax.set(yscale="log", xlabel="position in the sequence", ylabel="squared error")
    ax.set(title="Error by position, against the oracles")
    whole_numbers(ax)
    return legend_beside(ax)
