"""Figures of task decodability: by layer, by pair of tasks, against accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from einops import rearrange

from transformer_lens_taskvec._utils.text import spelled_size
from transformer_lens_taskvec.analysis.decodability import Decodability
from transformer_lens_taskvec.analysis.td_accuracy import AccuracyFit
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    heat_map,
    legend_beside,
    new_axes,
    styled,
    task_style,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_td_vs_accuracy(fit: AccuracyFit, ax: Axes | None = None) -> Axes:
    """Return axes with accuracy against TD (the paper's Figure 4).

    Each task has a colour, each number of shots a marker.

    Args:
        fit: From :func:`td_vs_accuracy`.
        ax: Where to draw; new axes by default.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> study = tv.paper.run_study(tv.load_model("toy"), tv.bitwise_tasks(), shots=(1, 2), n=12)
        >>> tv.plot_td_vs_accuracy(study.fit).get_xlabel()
        'task decodability'
    """
    ax = new_axes(ax)
    points = fit.points
    tasks, shots = list(dict.fromkeys(points.task)), sorted(set(points.shots))
    columns = (points[name].tolist() for name in ("task", "shots", "td", "accuracy"))
    for task, count, td, accuracy in zip(*columns, strict=True):
        colour = task_style(tasks.index(task), task)["color"]
        mark = MARKERS[shots.index(count) % len(MARKERS)]
        ax.scatter(td, accuracy, color=colour, marker=mark, s=18)
    ends = [float(points.td.min()), float(points.td.max())]
    ax.plot(ends, [fit.intercept + fit.slope * end for end in ends], color=GREY, linewidth=1)
    for index, task in enumerate(tasks):
        ax.plot([], [], "o", color=task_style(index, task)["color"], label=task)
    for index, count in enumerate(shots):
        ax.plot([], [], MARKERS[index % len(MARKERS)], color=GREY, label=f"{count}-shot")
    low, high = fit.r2_interval
    ax.set(
        xlabel="task decodability",
        ylabel="exact-match accuracy",
        title=(
            f"R$^2$ = {fit.r2:.2f} [{low:.2f}, {high:.2f}], Spearman {fit.spearman:.2f}\n"
            f"{spelled_size(points.n_distinct.tolist(), points.n.tolist())}"
        ),
    )
    return legend_beside(ax)


@styled
def plot_decodability(
    decodability: Decodability | Mapping[Any, Decodability], ax: Axes | None = None
) -> Axes:
    """Return axes with task decodability by layer.

    Args:
        decodability: One result is drawn as a line per task and their mean in black. Of a mapping
            from number of shots or name, each result's mean is a line (the paper's Figure 19).
        ax: Where to draw; new axes by default.

    Raises:
        ValueError: If the mapping is empty.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(), 10, 4, seed=0)
        >>> found = tv.task_decodability(tv.collect(model, episodes))
        >>> tv.plot_decodability(found).get_ylabel()
        'task decodability (k = 10)'
    """
    ax = new_axes(ax)
    if isinstance(decodability, Decodability):
        shown = decodability
        for index, task in enumerate(shown.tasks):
            scores = shown.scores[:, index].tolist()
            ax.plot(shown.layers, scores, label=task, **task_style(index, task))
        ax.plot(shown.layers, shown.mean.tolist(), color="black", linewidth=2, label="mean")
    else:
        if not decodability:
            raise ValueError("decodability is empty; give at least one")
        shown = next(iter(decodability.values()))
        for index, (name, found) in enumerate(decodability.items()):
            style, label = task_style(index), str(name)
            if isinstance(name, int):  # one colour, darker with more shots
                label = f"{name}-shot"
                style |= {"color": COLOURS[0], "alpha": (index + 1) / len(decodability)}
            ax.plot(found.layers, found.mean.tolist(), label=label, **style)
    ax.axhline(shown.chance, color=GREY, linestyle="--", linewidth=1, label="chance")
    ax.set(
        xlabel="layer (from 0)",
        ylabel=f"task decodability (k = {shown.k})",
        ylim=(-0.03, 1.03),
        title="Task decodability by layer",
    )
    whole_numbers(ax)
    return legend_beside(ax)


@styled
def plot_pairwise(
    decodability: Decodability, layer: int | None = None, ax: Axes | None = None
) -> Axes:
    """Return axes with a heat map of the TD of each pair of tasks alone (the paper's Figure 23).

    Args:
        decodability: From :func:`task_decodability`.
        layer: The layer; the best by default.
        ax: Where to draw; new axes by default.

    Raises:
        ValueError: If the layer was not collected, or a pair has k points or fewer.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(), 10, 4, seed=0)
        >>> found = tv.task_decodability(tv.collect(model, episodes))
        >>> tv.plot_pairwise(found, layer=1).get_title()
        'Decodability of pairs, layer 1'
    """
    layer = decodability.best_layer() if layer is None else layer
    values = decodability.pairwise(layer)
    names = decodability.tasks
    ax = heat_map(
        (values + rearrange(values, "first second -> second first")) / 2,
        names,
        names,
        ax,
        label="task decodability of the pair",
        colours="viridis",
        ends=(0.5, 1.0),
        written=".2f",
    )
    ax.set_title(f"Decodability of pairs, layer {layer}")
    return ax
