"""Figures of what interventions do: sweeps, perturbations, steering, heads, fits, studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from transformer_lens_taskvec.analysis.layer_sweep import LayerSweep
from transformer_lens_taskvec.analysis.perturbation import PerturbationMatrix
from transformer_lens_taskvec.analysis.steering import SteeringEffect
from transformer_lens_taskvec.analysis.td_accuracy import Fit
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    heat_map,
    legend_beside,
    new_axes,
    styled,
    task_style,
    two_axes,
    whole_numbers,
)
from transformer_lens_taskvec.vectors.heads import HeadEffects

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from transformer_lens_taskvec.paper.checkpoints import OverCheckpoints
    from transformer_lens_taskvec.paper.instructions import PromptingStudy


@styled
def plot_layer_sweep(sweep: LayerSweep, ax: Axes | None = None) -> Axes:
    """Accuracy by layer of injection, a line a task; dotted, the accuracy without injection.

    Where the sweep has controls, a grey band spans what they do for any of the tasks.

    Args:
        sweep: From :func:`layer_sweep`.
        ax: Where to draw; new axes by default.

    Returns:
        The axes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 4, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> ax = tv.plot_layer_sweep(tv.layer_sweep(model, tv.zero_shot(episodes), vectors))
        >>> ax.get_ylabel()
        'exact-match accuracy'
    """
    ax = new_axes(ax)
    if sweep.controls:
        beside = torch.cat([control.accuracy for control in sweep.controls.values()], dim=1)
        low, high = beside.min(dim=1).values.tolist(), beside.max(dim=1).values.tolist()
        name = "controls" if len(sweep.controls) > 1 else f"{next(iter(sweep.controls))} vectors"
        ax.fill_between(sweep.layers, low, high, color=GREY, alpha=0.3, linewidth=0, label=name)
    for index, task in enumerate(sweep.tasks):
        style = task_style(index, task)
        ax.plot(sweep.layers, sweep.accuracy[:, index].tolist(), label=task, **style)
        before = float(sweep.baseline_accuracy[index])
        ax.axhline(before, color=style["color"], linestyle=":", linewidth=0.8)
    ax.set(
        xlabel="layer of injection (from 0)",
        ylabel="exact-match accuracy",
        ylim=(-0.03, 1.03),
        title="Task vectors injected (dotted: nothing injected)",
    )
    whole_numbers(ax)
    return legend_beside(ax)


@styled
def plot_checkpoints(
    found: OverCheckpoints, axes: Sequence[Axes] | None = None, *, leave_out: str = "Null"
) -> tuple[Axes, Axes]:
    """TD and accuracy over training checkpoints, a line a task (the paper's Figure 5).

    Args:
        found: From :func:`over_checkpoints`.
        axes: Two axes to draw on; new ones by default.
        leave_out: A task whose accuracy means nothing.

    Returns:
        The axes of TD and of accuracy, at the most shots there are.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> toy = lab.shipped_toy_run()
        >>> def study(model):
        ...     tasks = tv.bitwise_tasks()
        ...     return tv.run_study(model, tasks, shots=(1, 2), n=12, steer_shots=(), n_vectors=12)
        >>> steps = [toy.steps[0], toy.steps[-1]]
        >>> found = tv.over_checkpoints("toy", steps, study, load=toy.model)
        >>> above, below = tv.plot_checkpoints(found)
        >>> above.get_ylabel(), below.get_xlabel()
        ('task decodability', 'checkpoint')
    """
    above, below = two_axes(axes)
    frame = found.results
    frame = frame[(frame.shots == frame.shots.max()) & (frame.task != leave_out)]
    places = range(len(found.checkpoints))
    for index, (task, own) in enumerate(frame.groupby("task", sort=False)):
        above.plot(places, own.td.tolist(), label=task, **task_style(index))
        below.plot(places, own.accuracy.tolist(), **task_style(index))
    above.set(ylabel="task decodability", ylim=(-0.03, 1.03), title=f"{found.name} over training")
    below.set(xlabel="checkpoint", ylabel="exact-match accuracy", ylim=(-0.03, 1.03))
    below.set_xticks(places, [str(c) for c in found.checkpoints], rotation=30, ha="right")
    return legend_beside(above), below


@styled
def plot_td_vs_accuracy(fit: Fit, ax: Axes | None = None) -> Axes:
    """Accuracy against TD: a colour a task, a marker a number of shots (the paper's Figure 4).

    Args:
        fit: From :func:`td_vs_accuracy`.
        ax: Where to draw; new axes by default.

    Returns:
        The axes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> study = tv.run_study(
        ...     model, tv.bitwise_tasks(), shots=(1, 2), n=12, steer_shots=(), n_vectors=12
        ... )
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
        title=f"R$^2$ = {fit.r2:.2f} [{low:.2f}, {high:.2f}], Spearman {fit.spearman:.2f}",
    )
    return legend_beside(ax)


@styled
def plot_steering(effect: SteeringEffect, ax: Axes | None = None) -> Axes:
    """Accuracy under the negative intervention, none, and the positive (the paper's Figure 20).

    Negative puts the Null task's mean in the place of the representation, positive the right
    task's. The bars' whiskers are 95 % intervals.

    Args:
        effect: From :func:`steering_effect`.
        ax: Where to draw; new axes by default.

    Returns:
        The axes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(), 4, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> one_shot = tv.sample_episodes(tv.bitwise_tasks(), 4, 1, seed=1)
        >>> ax = tv.plot_steering(tv.steering_effect(model, one_shot, vectors, layer=1))
        >>> ax.get_title()
        'Mean of Null or of the right task put in, layer 1'
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
        ylabel="exact-match accuracy",
        ylim=(0, 1.03),
        title=f"Mean of Null or of the right task put in, layer {effect.layer}",
    )
    return legend_beside(ax)


@styled
def plot_prompting(study: PromptingStudy, ax: Axes | None = None) -> Axes:
    """TD, TD of the words alone, and accuracy: without, with and with random instructions.

    Args:
        study: From :func:`prompting_study`.
        ax: Where to draw; new axes by default.

    Returns:
        The axes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> told = {task: f"This is {task}: " for task in tv.bitwise_tasks()}
        >>> study = tv.prompting_study(model, tv.bitwise_tasks(), told, n_shots=2, n=12)
        >>> [label.get_text().split()[0] for label in tv.plot_prompting(study).get_xticklabels()]
        ['no', 'own', 'random']
    """
    ax = new_axes(ax)
    frame = study.to_frame()
    kinds = {
        "td": "decodability",
        "td_at_input": "of the words",
        "td_of_instruction": "of the random\ninstruction",
        "accuracy": "accuracy",
    }
    for index, (kind, label) in enumerate(kinds.items()):
        places = [place + 0.2 * (index - 1.5) for place in range(len(frame))]
        ax.bar(places, frame[kind].astype(float), 0.19, color=COLOURS[index], label=label)
    chance = study.decodability["plain"].chance
    ax.axhline(chance, color=GREY, linestyle="--", linewidth=1, label="chance")
    ax.set_xticks(range(len(frame)), [f"{name}\ninstructions" for name in ("no", "own", "random")])
    ax.set(ylim=(0, 1.03), title="What naming the task in the prompt does")
    return legend_beside(ax)


@styled
def plot_perturbation(
    matrix: PerturbationMatrix, ax: Axes | None = None, *, reach: float | None = None
) -> Axes:
    """Heat map of the change in NLL: red where an injected vector does harm.

    Args:
        matrix: From :func:`perturbation_matrix`.
        ax: Where to draw; new axes by default.
        reach: Where the colours end; by default at the largest change.

    Returns:
        The axes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 4, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> ax = tv.plot_perturbation(tv.perturbation_matrix(model, episodes, vectors, layer=1))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('injected task vector', 'task of the prompt')
    """
    reach = reach or float(matrix.nll.abs().max()) or 1.0
    change = f"change in {matrix.baseline.loss}"
    ax = heat_map(
        matrix.nll,
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


@styled
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
        effects: From :func:`head_effects`.
        ax: Where to draw; new axes by default.
        task: One task; by default the mean over tasks.
        reach: Where the colours end; by default at the largest effect.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no such task.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 2, 4, seed=0)
        >>> effects = tv.head_effects(model, episodes, on=episodes, ablation="zero")
        >>> tv.plot_head_effects(effects, task="AND").get_title()
        'Head effects: zero ablation, AND'
    """
    if task is not None and task not in effects.tasks:
        raise ValueError(f"no effects on {task!r}; there are: {', '.join(effects.tasks)}")
    ax = new_axes(ax)
    values = effects.log_probability
    if task is not None:
        values = effects.log_probability_by_task[effects.tasks.index(task)]
    reach = reach or float(values.abs().max()) or 1.0
    image = ax.imshow(values.tolist(), cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    what = (
        "mean into shuffled prompts" if effects.ablation is None else f"{effects.ablation} ablation"
    )
    title = f"Head effects: {what}" + ("" if task is None else f", {task}")
    ax.set(xlabel="head", ylabel="layer (from 0)", title=title)
    ax.set_xticks(range(values.shape[1]))
    ax.set_yticks(range(values.shape[0]) if values.shape[0] <= 12 else ax.get_yticks())
    ax.set_ylim(values.shape[0] - 0.5, -0.5)
    of_text = effects.baseline.loss.startswith("NLL")
    if of_text:
        label = "change in log-probability (nats)"
    else:
        label = f"decrease in {effects.baseline.loss}"
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax
