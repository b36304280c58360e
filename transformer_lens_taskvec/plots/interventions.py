"""Figures of the effects of interventions: layer sweeps, perturbations, steering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import reduce

from transformer_lens_taskvec.analysis.perturbation import PerturbationMatrix
from transformer_lens_taskvec.analysis.steering import SteeringEffect
from transformer_lens_taskvec.analysis.sweep import LayerSweep
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    heat_map,
    legend_beside,
    new_axes,
    styled,
    task_style,
    whole_numbers,
)
from transformer_lens_taskvec.scoring import LOSS_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_layer_sweep(sweep: LayerSweep, ax: Axes | None = None) -> Axes:
    """Return axes with accuracy by layer of injection, a line per task.

    Dotted lines are accuracies without injection. If the sweep has controls, a grey band spans
    their accuracies over all tasks.

    Args:
        sweep: From :func:`layer_sweep`.
        ax: Where to draw; new axes by default.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.bitwise_tasks(null=False)
        >>> sweep = tv.run_experiment(model, tasks, n_shots=4, n=6).sweep
        >>> tv.plot_layer_sweep(sweep).get_ylabel()
        'exact-match accuracy'
    """
    ax = new_axes(ax)
    places = [0 if layer is None else layer for layer in sweep.layers]
    if sweep.controls:
        accuracy = torch.cat([control.accuracy for control in sweep.controls.values()], dim=1)
        low, high = (reduce(accuracy, "layer task -> layer", end) for end in ("min", "max"))
        name = "controls" if len(sweep.controls) > 1 else f"{next(iter(sweep.controls))} vectors"
        ax.fill_between(
            places, low.tolist(), high.tolist(), color=GREY, alpha=0.3, linewidth=0, label=name
        )
    for index, task in enumerate(sweep.tasks):
        style = task_style(index, task)
        ax.plot(places, sweep.accuracy[:, index].tolist(), label=task, **style)
        before = float(sweep.baseline_accuracy[index])
        ax.axhline(before, color=style["color"], linestyle=":", linewidth=0.8)
    ax.set(
        xlabel="layer of injection (from 0)",
        ylabel="exact-match accuracy",
        ylim=(-0.03, 1.03),
        title=f"Task vectors injected (dotted: nothing injected)\n{sweep.baseline.size}",
    )
    whole_numbers(ax)
    return legend_beside(ax)


@styled
def plot_steering(effect: SteeringEffect, ax: Axes | None = None) -> Axes:
    """Return axes with accuracy by intervention and task (the paper's Figure 20).

    Negative injects the Null task's vector, positive the right task's.

    Whiskers are 95 % intervals.

    Args:
        effect: From :func:`steering_effect`.
        ax: Where to draw; new axes by default.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> study = tv.paper.run_study(tv.load_model("toy"), tv.bitwise_tasks(), shots=(1, 2), n=12)
        >>> tv.plot_steering(study.steering[1]).get_title()
        "Null's or the right task's vector injected, layer 1"
    """
    ax = new_axes(ax)
    frame = effect.to_frame()
    kinds = {"negative": COLOURS[1], "unperturbed": GREY, "positive": COLOURS[2]}
    for index, (kind, colour) in enumerate(kinds.items()):
        places = [place + 0.27 * (index - 1) for place in range(len(frame))]
        values = frame[kind].tolist()
        below = [v - low for v, low in zip(values, frame[f"{kind}_low"], strict=True)]
        above = [high - v for v, high in zip(values, frame[f"{kind}_high"], strict=True)]
        style: dict[str, Any] = {"capsize": 1.5, "error_kw": {"linewidth": 0.7}}
        ax.bar(places, values, 0.25, yerr=[below, above], color=colour, label=kind, **style)
    names = frame.task.tolist()
    ax.set_xticks(range(len(frame)), names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set(
        xlabel=effect.unperturbed.size,
        ylabel="exact-match accuracy",
        ylim=(0, 1.03),
        title=f"Null's or the right task's vector injected, layer {effect.layer}",
    )
    return legend_beside(ax)


@styled
def plot_perturbation(
    matrix: PerturbationMatrix, ax: Axes | None = None, *, reach: float | None = None
) -> Axes:
    """Return axes with a heat map of the change in loss, red where an injected vector does harm.

    Args:
        matrix: From :func:`perturbation_matrix`.
        ax: Where to draw; new axes by default.
        reach: The change at which the colours end; the largest by default.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 4, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> ax = tv.plot_perturbation(tv.perturbation_matrix(model, episodes, vectors, layer=1))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('injected task vector', 'task of the prompt')
    """
    reach = reach or float(matrix.delta_loss.abs().max()) or 1.0
    change = f"change in {LOSS_LABELS[matrix.baseline.loss_kind]}"
    ax = heat_map(
        matrix.delta_loss,
        matrix.sources,
        matrix.targets,
        ax,
        label=change,
        colours="RdBu_r",
        ends=(-reach, reach),
        written="+.1f" if reach >= 2 else "+.2f",
    )
    ax.set(
        xlabel="injected task vector",
        ylabel="task of the prompt",
        title=f"{change[0].upper()}{change[1:]}, layer {matrix.layer}",
    )
    return ax
