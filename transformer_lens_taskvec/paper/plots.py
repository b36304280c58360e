"""Figures of the paper's studies: checkpoints and instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformer_lens_taskvec._utils.text import spelled_size
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    legend_beside,
    new_axes,
    styled,
    task_style,
    two_axes,
)
from transformer_lens_taskvec.tasks.base import NULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from transformer_lens_taskvec.paper.checkpoints import CheckpointStudy
    from transformer_lens_taskvec.paper.instructions import InstructionStudy


@styled
def plot_checkpoints(
    found: CheckpointStudy, axes: Sequence[Axes] | None = None, *, leave_out: str = NULL
) -> tuple[Axes, Axes]:
    """Return axes with TD and accuracy over checkpoints, a line per task (the paper's Figure 5).

    Both are at the study's highest number of shots.

    Args:
        found: From :func:`over_checkpoints`.
        axes: Two axes to draw on; new axes by default.
        leave_out: A task whose accuracy is meaningless.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> toy = lab.shipped_toy_run()
        >>> def study(model):
        ...     tasks = tv.bitwise_tasks()
        ...     return tv.paper.run_study(model, tasks, shots=(1, 2), n=12, steer_shots=())
        >>> steps = [toy.steps[0], toy.steps[-1]]
        >>> found = tv.paper.over_checkpoints("toy", steps, study, load=toy.model)
        >>> above, below = tv.paper.plot_checkpoints(found)
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
    size = spelled_size(frame.n_distinct.tolist(), frame.n.tolist())
    title = f"{found.name} over training\n{size}"
    above.set(ylabel="task decodability", ylim=(-0.03, 1.03), title=title)
    below.set(xlabel="checkpoint", ylabel="exact-match accuracy", ylim=(-0.03, 1.03))
    below.set_xticks(places, [str(c) for c in found.checkpoints], rotation=30, ha="right")
    return legend_beside(above), below


@styled
def plot_prompting(study: InstructionStudy, ax: Axes | None = None) -> Axes:
    """Return axes with TD, TD of the words alone, and accuracy, for each kind of instruction.

    Args:
        study: From :func:`prompting_study`.
        ax: Where to draw; new axes by default.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> told = {task: f"This is {task}: " for task in tv.bitwise_tasks()}
        >>> study = tv.paper.prompting_study(model, tv.bitwise_tasks(), told, n_shots=2, n=12)
        >>> ax = tv.paper.plot_prompting(study)
        >>> [label.get_text().split()[0] for label in ax.get_xticklabels()]
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
    size = study.scores["plain"].size
    ax.set(ylim=(0, 1.03), xlabel=size, title="What naming the task in the prompt does")
    return legend_beside(ax)
