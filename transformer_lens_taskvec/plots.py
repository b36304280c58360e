"""Figures of the library's results, by matplotlib.

Each function takes a result and returns the ``Axes`` it drew on, new ones unless ``ax`` is given.
Tasks keep one colour across figures as long as they are given in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.analyses import LayerSweep, PerturbationMatrix, SteeringEffect
from transformer_lens_taskvec.collect import Activations
from transformer_lens_taskvec.decodability import Decodability
from transformer_lens_taskvec.files import write_whole
from transformer_lens_taskvec.fits import Fit
from transformer_lens_taskvec.heads import HeadEffects
from transformer_lens_taskvec.vectors import TaskVectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from transformer_lens_taskvec.checkpoints import OverCheckpoints
    from transformer_lens_taskvec.lab.emergence import Emergence
    from transformer_lens_taskvec.prompting import PromptingStudy

FIGURE_SIZE = (6.4, 3.8)
"""Width and height of a figure in inches."""

# Paul Tol's "muted" and "bright" schemes, colour-blind safe; markers tell repeats apart.
_COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#DDCC77",
    "#88CCEE",
    "#AA4499",
    "#44AA99",
    "#882255",
    "#999933",
    "#4477AA",
    "#EE6677",
    "#228833",
)
_MARKERS = "osD^vP*X"


def task_style(index: int) -> dict[str, Any]:
    """The colour and marker of the task at ``index`` in a result's list of tasks."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)],
    }


def plot_layer_sweep(sweep: LayerSweep, ax: Axes | None = None) -> Axes:
    """Accuracy by layer of injection, a line a task; dotted, the accuracy without intervention.

    Where the sweep has controls, a grey band spans what they do for any of the tasks.
    """
    ax = _axes(ax)
    if sweep.controls:
        beside = torch.cat([control.accuracy for control in sweep.controls.values()], dim=1)
        low, high = beside.min(dim=1).values.tolist(), beside.max(dim=1).values.tolist()
        name = "controls" if len(sweep.controls) > 1 else f"{next(iter(sweep.controls))} vectors"
        ax.fill_between(sweep.layers, low, high, color="grey", alpha=0.3, linewidth=0, label=name)
    for index, task in enumerate(sweep.tasks):
        style = task_style(index)
        ax.plot(
            sweep.layers,
            sweep.accuracy[:, index].tolist(),
            label=task,
            markersize=3,
            linewidth=1.2,
            **style,
        )
        ax.axhline(
            float(sweep.baseline_accuracy[index]),
            color=style["color"],
            linestyle=":",
            linewidth=0.8,
        )
    ax.set(
        xlabel="layer of injection (counted from 0)",
        ylabel="exact-match accuracy",
        ylim=(-0.03, 1.03),
        title="Injected task vectors (dotted: no injection)",
    )
    _whole_numbers(ax)
    return _finish(ax, len(sweep.tasks))


def plot_decodability(
    decodability: Decodability | Mapping[Any, Decodability], ax: Axes | None = None
) -> Axes:
    """Task decodability by layer.

    Args:
        decodability: One: a line a task, their mean in black. Or several, by number of shots or by
            name: a line each, the mean over tasks (the paper's Figure 19).
        ax: Where to draw; new axes by default.
    """
    ax = _axes(ax)
    one = decodability if isinstance(decodability, Decodability) else None
    if one is not None:
        for index, task in enumerate(one.tasks):
            scores = one.scores[:, index].tolist()
            style = {**task_style(index), "markersize": 3, "linewidth": 1.0}
            ax.plot(one.layers, scores, label=task, **style)
        ax.plot(one.layers, one.mean.tolist(), color="black", linewidth=2, label="mean")
        shown = one
    else:
        several = dict(decodability)  # type: ignore[arg-type]
        for index, (shots, found) in enumerate(several.items()):
            style = {**task_style(index), "markersize": 3, "linewidth": 1.4}
            name = f"{shots}-shot" if isinstance(shots, int) else shots
            ax.plot(found.layers, found.mean.tolist(), label=name, **style)
        shown = next(iter(several.values()))
    ax.axhline(shown.chance, color="grey", linestyle="--", linewidth=1, label="chance")
    ax.set(
        xlabel="layer (counted from 0)",
        ylabel=f"task decodability (k = {shown.k})",
        ylim=(-0.03, 1.03),
        title="Task decodability by layer",
    )
    _whole_numbers(ax)
    return _finish(ax, len(shown.tasks) + 2)


def plot_checkpoints(
    found: OverCheckpoints, axes: Sequence[Axes] | None = None, *, leave_out: str = "Null"
) -> tuple[Axes, Axes]:
    """TD and accuracy over training checkpoints, a line a task (the paper's Figure 5).

    Args:
        found: From :func:`~transformer_lens_taskvec.checkpoints.over_checkpoints`.
        axes: Two axes to draw on; new ones by default.
        leave_out: A task whose accuracy means nothing.

    Returns:
        The axes of TD and of accuracy, at the most shots there are.
    """
    above, below = _two_axes(axes)
    frame = found.results
    frame = frame[(frame.shots == frame.shots.max()) & (frame.task != leave_out)]
    places = range(len(found.checkpoints))
    for index, (task, own) in enumerate(frame.groupby("task", sort=False)):
        style = {**task_style(index), "markersize": 3, "linewidth": 1.2, "label": task}
        above.plot(places, own.td.tolist(), **style)
        below.plot(places, own.accuracy.tolist(), **style)
    above.set(ylabel="task decodability", ylim=(-0.03, 1.03), title=f"{found.name} over training")
    below.set(xlabel="checkpoint", ylabel="exact-match accuracy", ylim=(-0.03, 1.03))
    below.set_xticks(places, [str(c) for c in found.checkpoints], rotation=30, ha="right")
    return _finish(above, 0), _finish(below, 0)


def plot_pairwise(
    decodability: Decodability, layer: int | None = None, ax: Axes | None = None
) -> Axes:
    """Heat map of the TD of each pair of tasks alone (the paper's Figure 23).

    Args:
        decodability: From :func:`~transformer_lens_taskvec.decodability.task_decodability`.
        layer: The layer; by default the best.
        ax: Where to draw; new axes by default.
    """
    ax = _axes(ax)
    layer = decodability.best_layer if layer is None else layer
    values = decodability.pairwise(layer)
    values = (values + values.T) / 2
    image = ax.imshow(values.tolist(), cmap="viridis", vmin=0.5, vmax=1.0)
    names = decodability.tasks
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            if row != column:
                shade = "black" if value > 0.8 else "white"
                text = f"{value:.2f}"
                ax.text(column, row, text, ha="center", va="center", color=shade, size=7)
    ax.set(title=f"Decodability of pairs, layer {layer}")
    ax.figure.colorbar(image, ax=ax, label="task decodability of the pair", shrink=0.8)
    return ax


def plot_td_vs_accuracy(fit: Fit, ax: Axes | None = None) -> Axes:
    """Accuracy against TD: a colour a task, a marker a number of shots (the paper's Figure 4)."""
    ax = _axes(ax)
    points = fit.points
    tasks, shots = list(dict.fromkeys(points.task)), sorted(set(points.shots))
    columns = (points[name].tolist() for name in ("task", "shots", "td", "accuracy"))
    for task, count, td, accuracy in zip(*columns, strict=True):
        colour = _COLOURS[tasks.index(task) % len(_COLOURS)]
        mark = _MARKERS[shots.index(count) % len(_MARKERS)]
        ax.scatter(td, accuracy, color=colour, marker=mark, s=28)
    ends = [float(points.td.min()), float(points.td.max())]
    ax.plot(ends, [fit.intercept + fit.slope * end for end in ends], color="grey", linewidth=1)
    for index, task in enumerate(tasks):
        ax.plot([], [], "o", color=_COLOURS[index % len(_COLOURS)], markersize=5, label=task)
    for index, count in enumerate(shots):
        mark = _MARKERS[index % len(_MARKERS)]
        ax.plot([], [], mark, color="grey", markersize=5, label=f"{count}-shot")
    low, high = fit.r2_interval
    ax.set(
        xlabel="task decodability",
        ylabel="exact-match accuracy",
        title=f"R$^2$ = {fit.r2:.2f} [{low:.2f}, {high:.2f}], Spearman {fit.spearman:.2f}",
    )
    return _finish(ax, len(tasks) + len(shots))


def plot_steering(effect: SteeringEffect, ax: Axes | None = None) -> Axes:
    """Accuracy under the negative intervention, none, and the positive (the paper's Figure 20)."""
    ax = _axes(ax)
    frame = effect.to_frame()
    kinds = {"negative": _COLOURS[1], "unperturbed": "grey", "positive": _COLOURS[2]}
    for index, (kind, colour) in enumerate(kinds.items()):
        places = [place + 0.27 * (index - 1) for place in range(len(frame))]
        values = frame[kind].tolist()
        below = [v - low for v, low in zip(values, frame[f"{kind}_low"], strict=True)]
        above = [high - v for v, high in zip(values, frame[f"{kind}_high"], strict=True)]
        style: dict[str, Any] = {"capsize": 2, "error_kw": {"linewidth": 0.8}}
        ax.bar(places, values, 0.25, yerr=[below, above], color=colour, label=kind, **style)
    ax.set_xticks(range(len(frame)), frame.task.tolist(), rotation=30, ha="right")
    ax.set(
        ylabel="exact-match accuracy",
        ylim=(0, 1.03),
        title=f"Right task's mean or Null's in place of the last token, layer {effect.layer}",
    )
    return _finish(ax, 3)


def plot_prompting(study: PromptingStudy, ax: Axes | None = None) -> Axes:
    """TD, TD of the words alone, and accuracy: without, with and with random instructions."""
    ax = _axes(ax)
    frame = study.to_frame()
    kinds = {
        "td": "task decodability, best layer",
        "td_at_input": "of the mean input embedding",
        "td_of_instruction": "of the random instruction",
        "accuracy": "accuracy",
    }
    for index, (kind, label) in enumerate(kinds.items()):
        places = [place + 0.2 * (index - 1.5) for place in range(len(frame))]
        ax.bar(places, frame[kind].astype(float), 0.19, color=_COLOURS[index], label=label)
    chance = study.decodability["plain"].chance
    ax.axhline(chance, color="grey", linestyle="--", linewidth=1, label="chance of TD")
    ax.set_xticks(range(len(frame)), [f"{name}\ninstructions" for name in ("no", "own", "random")])
    ax.set(ylim=(0, 1.03), title="What naming the task in the prompt does")
    return _finish(ax, len(kinds) + 1)


def plot_vectors(vectors: TaskVectors, layer: int | None = None, ax: Axes | None = None) -> Axes:
    """Heat map of the cosines between tasks' vectors, their mean over tasks taken off.

    Args:
        vectors: Of two tasks or more.
        layer: The layer; by default the middle one of those there are.
        ax: Where to draw; new axes by default.
    """
    ax = _axes(ax)
    layer = vectors.layers[len(vectors.layers) // 2] if layer is None else layer
    values = torch.stack([vectors.at(task, layer) for task in vectors.tasks])
    centred = torch.nn.functional.normalize(values - values.mean(dim=0), dim=-1)
    cosines = centred @ centred.T
    image = ax.imshow(cosines.tolist(), cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks(range(len(vectors.tasks)), vectors.tasks, rotation=45, ha="right")
    ax.set_yticks(range(len(vectors.tasks)), vectors.tasks)
    ax.set_title(f"Cosines between task vectors less their mean, layer {layer}")
    ax.figure.colorbar(image, ax=ax, label="cosine", shrink=0.8)
    return ax


def plot_embedding(
    activations: Activations,
    layer: int,
    ax: Axes | None = None,
    *,
    method: str | None = None,
    seed: int = 0,
) -> Axes:
    """A two-dimensional map of one layer's activations.

    Args:
        activations: The activations.
        layer: The layer, counted from 0.
        ax: Where to draw; new axes by default.
        method: ``"umap"`` with the paper's settings (15 neighbours, min_dist 0.1), or ``"pca"``; by
            default UMAP where umap-learn is installed.
        seed: Seed of UMAP.

    Raises:
        ValueError: If there is no such method or layer.
        ImportError: If UMAP is asked for and not installed.
    """
    if method not in (None, "umap", "pca"):
        raise ValueError(f"method is {method!r}; it must be 'umap', 'pca' or None")
    ax = _axes(ax)
    at = activations.at(layer).flatten(start_dim=1)
    if method == "umap" or (method is None and find_spec("umap") is not None):
        points, names = _umap(at, seed), ("first UMAP dimension", "second")
    else:
        points, shares = _principal_components(at)
        names = (
            f"first principal component ({100 * shares[0]:.0f}% of variance)",
            f"second ({100 * shares[1]:.0f}%)",
        )
    for index, task in enumerate(activations.tasks):
        own = points[activations.labels == index]
        ax.scatter(
            own[:, 0].tolist(),
            own[:, 1].tolist(),
            s=12,
            alpha=0.8,
            linewidths=0,
            label=task,
            **task_style(index),
        )
    ax.set(
        xlabel=names[0],
        ylabel=names[1],
        title=f"Representations of the prompts, layer {layer}",
    )
    return _finish(ax, len(activations.tasks))


def plot_perturbation(
    matrix: PerturbationMatrix, ax: Axes | None = None, *, reach: float | None = None
) -> Axes:
    """Heat map of the change in NLL: red where an injected vector does harm.

    Args:
        matrix: From :func:`~transformer_lens_taskvec.analyses.perturbation_matrix`.
        ax: Where to draw; new axes by default.
        reach: Where the colours end; by default at the largest change.
    """
    ax = _axes(ax)
    values = matrix.nll
    reach = reach or float(values.abs().max()) or 1.0
    digits = 1 if reach >= 2 else 2
    image = ax.imshow(values.tolist(), cmap="RdBu_r", vmin=-reach, vmax=reach)
    ax.set_xticks(range(len(matrix.targets)), matrix.targets, rotation=45, ha="right")
    ax.set_yticks(range(len(matrix.sources)), matrix.sources)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            shade = "white" if abs(value) > 0.6 * reach else "black"
            ax.text(
                column, row, f"{value:+.{digits}f}", ha="center", va="center", color=shade, size=7
            )
    ax.set(
        xlabel="injected task vector",
        ylabel="task of the prompt",
        title=f"Change in {matrix.baseline.loss}, layer {matrix.layer}",
    )
    ax.figure.colorbar(image, ax=ax, label=f"change in {matrix.baseline.loss}", shrink=0.8)
    return ax


def plot_head_effects(
    effects: HeadEffects,
    ax: Axes | None = None,
    *,
    task: str | None = None,
    reach: float | None = None,
) -> Axes:
    """Heat map of every head's effect on the answer's log-probability: of one task, or their mean.

    Where answers are numbers, the change in squared error takes its place, with its sign turned:
    red is harm.

    Args:
        effects: From :func:`~transformer_lens_taskvec.heads.head_effects`.
        ax: Where to draw; new axes by default.
        task: One task; by default the mean over tasks.
        reach: Where the colours end; by default at the largest effect.
    """
    ax = _axes(ax)
    values = effects.log_probability
    if task is not None:
        values = effects.log_probability_by_task[effects.tasks.index(task)]
    reach = reach or float(values.abs().max()) or 1.0
    image = ax.imshow(values.tolist(), cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    what = (
        "mean into shuffled prompts" if effects.ablation is None else f"{effects.ablation} ablation"
    )
    title = f"Head effects: {what}" + ("" if task is None else f", {task}")
    ax.set(xlabel="head", ylabel="layer (counted from 0)", title=title)
    ax.set_xticks(range(values.shape[1]))
    ax.set_yticks(range(values.shape[0]) if values.shape[0] <= 12 else ax.get_yticks())
    of_text = effects.baseline.loss.startswith("NLL")
    what = "log-probability (nats)" if of_text else f"-1 x {effects.baseline.loss}"
    ax.figure.colorbar(image, ax=ax, label=f"change in {what}")
    return ax


def plot_training(
    emergence: Emergence, axes: Sequence[Axes] | None = None, *, layer: int | None = None
) -> tuple[Axes, Axes]:
    """Each task's error over training, and under it its TD (the paper's Figure 4).

    Args:
        emergence: From :func:`~transformer_lens_taskvec.lab.emergence.emergence`.
        axes: Two axes to draw on, one above the other; new ones by default.
        layer: The layer of TD; by default the one with the highest at the last checkpoint.

    Returns:
        The axes of the error and of TD.
    """
    above, below = _two_axes(axes)
    layer = emergence.best_layer if layer is None else layer
    for index, task in enumerate(emergence.tasks):
        style = {**task_style(index), "markersize": 3, "linewidth": 1.2, "label": task}
        above.plot(emergence.steps, emergence.late_mse[:, index].tolist(), **style)
        below.plot(emergence.steps, emergence.td[:, layer, index].tolist(), **style)
    for line, name in zip(("--", "-.", ":"), ("ridge", "lasso", "Bayes mixture"), strict=True):
        if name in emergence.oracles.names:
            level = emergence.oracles.late(name)
            above.axhline(level, color="black", linestyle=line, linewidth=0.9, label=name)
    chance = 1 / len(emergence.tasks)
    below.axhline(chance, color="grey", linestyle="--", linewidth=0.9, label="chance")
    above.set(
        yscale="log",
        ylabel="squared error, second half",
        title=f"Error and decodability over training (rank correlation "
        f"{emergence.td_mse_correlation:.2f})",
    )
    first = next((step for step in emergence.steps if step > 0), 1)
    below.set_xscale("symlog", linthresh=first)
    below.set(
        xlabel="training step",
        ylabel=f"task decodability, layer {layer}",
        ylim=(-0.03, 1.03),
        xlim=(0, 1.1 * emergence.steps[-1]),
    )
    return _finish(above, 0), _finish(below, 0)


def plot_oracles(
    emergence: Emergence, steps: Sequence[int] | None = None, ax: Axes | None = None
) -> Axes:
    """The model's error by position at some checkpoints, against the oracles' (Figure 3).

    Args:
        emergence: From :func:`~transformer_lens_taskvec.lab.emergence.emergence`.
        steps: Checkpoints; by default about four, to the last.
        ax: Where to draw; new axes by default.

    Raises:
        ValueError: If there is no checkpoint at one of the steps.
    """
    ax = _axes(ax)
    if steps is None:
        last = len(emergence.steps) - 1
        steps = [emergence.steps[last * part // 8] for part in (4, 6, 7, 8)]
    points = range(1, emergence.mse.shape[-1] + 1)
    for index, step in enumerate(steps):
        if step not in emergence.steps:
            raise ValueError(f"no checkpoint at step {step}; there are {list(emergence.steps)}")
        curve = emergence.mse[emergence.steps.index(step)].mean(0)
        shade = 0.25 + 0.75 * (index + 1) / len(steps)
        ax.plot(points, curve.tolist(), color=_COLOURS[0], alpha=shade, label=f"step {step}")
    lines = {"ridge": "--", "lasso": "-.", "true basis": ":", "Bayes mixture": "-"}
    for name, line in lines.items():
        if name in emergence.oracles.names:
            curve = emergence.oracles[name]
            ax.plot(points, curve.tolist(), color="black", linestyle=line, linewidth=1, label=name)
    ax.set(yscale="log", xlabel="position in the sequence", ylabel="squared error")
    ax.set(title="Error by position, against the oracles")
    return _finish(ax, 0)


def figure_of(ax: Axes) -> Figure:
    """The figure that axes belong to."""
    figure: Any = ax.figure
    return cast("Figure", figure)


def save_figures(figures: dict[str, Figure], folder: str | Path) -> list[Path]:
    """Write figures as PNG and close them; returns the files' paths."""
    import matplotlib.pyplot as plt

    folder = Path(folder)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            write_whole(paths[-1], partial(figure.savefig, dpi=120, format="png"))
    finally:
        for figure in figures.values():
            plt.close(figure)
    return paths


def _umap(points: Float[Tensor, "point d"], seed: int) -> Float[Tensor, "point 2"]:
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError(
            "UMAP needs umap-learn: pip install 'transformer-lens-taskvec[umap]'"
        ) from error
    mapped = UMAP(n_neighbors=15, min_dist=0.1, random_state=seed, n_jobs=1).fit_transform(
        points.numpy()
    )
    return torch.from_numpy(mapped)


def _principal_components(
    points: Float[Tensor, "point d"],
) -> tuple[Float[Tensor, "point 2"], Sequence[float]]:
    centred = points.double() - points.double().mean(dim=0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    shares = singular.square() / singular.square().sum().clamp(min=1e-30)
    if len(singular) < 2:
        raise ValueError("a two-dimensional map needs at least two points and two dimensions")
    return (centred @ directions[:2].T).float(), shares[:2].tolist()


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=FIGURE_SIZE, layout="constrained")[1]


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _two_axes(axes: Sequence[Axes] | None) -> Sequence[Axes]:
    """The axes given, or two new ones, one above the other."""
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    width, height = FIGURE_SIZE
    size = (width, 1.5 * height)
    _, made = plt.subplots(2, 1, figsize=size, layout="constrained", sharex=True)
    return list(made)


def _finish(ax: Axes, n_entries: int) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    columns = 1 if n_entries <= 12 else 2
    ax.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False, ncols=columns
    )
    return ax
