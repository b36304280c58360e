"""Figures of attention heads' effects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from einops import reduce

from transformer_lens_taskvec.plots.style import new_axes, styled
from transformer_lens_taskvec.scoring import LOSS_LABELS
from transformer_lens_taskvec.vectors.heads import HeadEffects

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_head_effects(
    effects: HeadEffects,
    ax: Axes | None = None,
    *,
    task: str | None = None,
    reach: float | None = None,
) -> Axes:
    """Return axes with a heat map of every head's effect on the answer's log-probability.

    Where answers are numbers it is the decrease in squared error. Red is harm, and grey was not
    measured.

    Args:
        effects: From :func:`head_effects`.
        ax: Where to draw; new axes by default.
        task: One task; the mean over tasks by default.
        reach: The effect at which the colours end; the largest by default.

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
    gain = effects.gain
    mean = reduce(gain, "task layer head -> layer head", "mean")
    values = mean if task is None else gain[effects.tasks.index(task)]
    reach = reach or float(values.nan_to_num(0).abs().max()) or 1.0
    ax.set_facecolor("lightgrey")
    image = ax.imshow(values.tolist(), cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    what = (
        "mean in shuffled prompts" if effects.ablation is None else f"{effects.ablation} ablation"
    )
    title = f"Head effects: {what}" + ("" if task is None else f", {task}")
    ax.set(xlabel="head", ylabel="layer (from 0)", title=title)
    ax.set_xticks(range(values.shape[1]))
    ax.set_yticks(range(values.shape[0]) if values.shape[0] <= 12 else ax.get_yticks())
    ax.set_ylim(values.shape[0] - 0.5, -0.5)
    label = "change in log-probability (nats)"
    if effects.baseline.loss_kind != "nll":
        label = f"decrease in {LOSS_LABELS[effects.baseline.loss_kind]}"
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax
