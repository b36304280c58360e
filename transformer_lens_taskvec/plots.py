"""Figures of the library's results, by matplotlib.

Each function takes a result and returns the ``Axes`` it drew on, new ones unless ``ax`` is given.
Tasks keep one colour across figures as long as they are given in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.analyses import LayerSweep, PerturbationMatrix
from transformer_lens_taskvec.collect import Activations
from transformer_lens_taskvec.decodability import Decodability
from transformer_lens_taskvec.heads import HeadEffects

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Accuracy by layer of injection, a line a task; dotted, the accuracy without intervention."""
    ax = _axes(ax)
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
    return _finish(ax, len(sweep.tasks))


def plot_decodability(decodability: Decodability, ax: Axes | None = None) -> Axes:
    """Task decodability by layer, a line a task, their mean in black, chance dashed."""
    ax = _axes(ax)
    for index, task in enumerate(decodability.tasks):
        ax.plot(
            decodability.layers,
            decodability.scores[:, index].tolist(),
            label=task,
            markersize=3,
            linewidth=1.0,
            **task_style(index),
        )
    ax.plot(
        decodability.layers, decodability.mean.tolist(), color="black", linewidth=2, label="mean"
    )
    ax.axhline(decodability.chance, color="grey", linestyle="--", linewidth=1, label="chance")
    ax.set(
        xlabel="layer (counted from 0)",
        ylabel=f"task decodability (k = {decodability.k})",
        ylim=(-0.03, 1.03),
        title="Task decodability by layer",
    )
    return _finish(ax, len(decodability.tasks) + 2)


def plot_embedding(activations: Activations, layer: int, ax: Axes | None = None) -> Axes:
    """A two-dimensional map of one layer's activations by principal components."""
    ax = _axes(ax)
    points, shares = _principal_components(activations.at(layer).flatten(start_dim=1))
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
        xlabel=f"first principal component ({100 * shares[0]:.0f}% of variance)",
        ylabel=f"second ({100 * shares[1]:.0f}%)",
        title=f"Representations of the prompts, layer {layer}",
    )
    return _finish(ax, len(activations.tasks))


def plot_perturbation(matrix: PerturbationMatrix, ax: Axes | None = None) -> Axes:
    """Heat map of the change in NLL: red where an injected vector does harm."""
    ax = _axes(ax)
    values = matrix.nll
    reach = float(values.abs().max()) or 1.0
    image = ax.imshow(values.tolist(), cmap="RdBu_r", vmin=-reach, vmax=reach)
    ax.set_xticks(range(len(matrix.targets)), matrix.targets, rotation=45, ha="right")
    ax.set_yticks(range(len(matrix.sources)), matrix.sources)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            shade = "white" if abs(value) > 0.6 * reach else "black"
            ax.text(column, row, f"{value:+.1f}", ha="center", va="center", color=shade, size=7)
    ax.set(
        xlabel="injected task vector",
        ylabel="task of the prompt",
        title=f"Change in {matrix.baseline.loss}, layer {matrix.layer}",
    )
    ax.figure.colorbar(image, ax=ax, label=f"change in {matrix.baseline.loss}", shrink=0.8)
    return ax


def plot_head_effects(effects: HeadEffects, ax: Axes | None = None) -> Axes:
    """Heat map of every head's mean effect on the answer's log-probability."""
    ax = _axes(ax)
    values = effects.log_probability
    reach = float(values.abs().max()) or 1.0
    image = ax.imshow(values.tolist(), cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    what = (
        "mean into shuffled prompts" if effects.ablation is None else f"{effects.ablation} ablation"
    )
    ax.set(xlabel="head", ylabel="layer (counted from 0)", title=f"Head effects: {what}")
    ax.set_xticks(range(values.shape[1]))
    ax.figure.colorbar(image, ax=ax, label="change in log-probability (nats)")
    return ax


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


def _finish(ax: Axes, n_entries: int) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    columns = 1 if n_entries <= 12 else 2
    ax.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False, ncols=columns
    )
    return ax
