"""Figures of how close the zero-shot model under variants is to the few-shot model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens_taskvec.analysis.fidelity import IclFidelity
from transformer_lens_taskvec.analysis.named import ZERO_SHOT
from transformer_lens_taskvec.analysis.progressive import ALL, KEPT, ProgressiveIcl
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    legend_beside,
    new_axes,
    styled,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {
    "kl": "KL(few-shot || variant), nats",
    "tv": "total variation from few-shot",
    "discrepancy": "discrepancy of the next token",
}
_FED = {
    "answer": "the right answer",
    "greedy": "the few-shot answer",
    "sampled": "a few-shot sample",
}


@styled
def plot_fidelity(
    fidelity: IclFidelity,
    ax: Axes | None = None,
    *,
    distance: str = "kl",
    layer: int | None = None,
    task: str = "",
) -> Axes:
    """Return axes with the distance from the few-shot model by position of the answer.

    Position 0 is the prompt's last token, which predicts the answer's first. Bands are 95 %
    intervals over queries. Longer answers alone count at later positions, and positions of fewer
    than two queries are left out.

    Args:
        fidelity: From :func:`icl_fidelity`.
        ax: Where to draw; new axes by default.
        distance: A name in ``fidelity.distances``.
        layer: The layer of vectors and controls; by default the one where the vectors are closest.
        task: The task; all by default.

    Raises:
        ValueError: If there is no such distance, layer or task.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.analysis.fidelity import icl_fidelity
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> ax = plot_fidelity(icl_fidelity(model, episodes, vectors=vectors))
        >>> [line.get_label() for line in ax.lines]
        ['zero-shot', 'task vector', 'random', 'other task', 'mean']
    """
    layers = [of for _, of in fidelity.variants if of is not None]
    if layer is None and layers:
        layer = fidelity.closest(distance)
    chosen = [(name, of) for name, of in fidelity.variants if of in (None, layer)]
    if layer is not None and layer not in layers:
        raise ValueError(f"layer is {layer}; there are: {sorted(set(layers))}")
    ax = new_axes(ax)
    for index, (name, of) in enumerate(chosen):
        curve = fidelity.curve(name, of, distance=distance, task=task)
        curve = curve[curve.n_distinct > 1]
        _band(ax, index, name, curve.position, curve["mean"], curve.low, curve.high)
    at = "" if layer is None else f", layer {layer}"
    ax.set(
        xlabel="position in the answer (0: the separator)",
        ylabel=_LABELS[distance],
        title=f"{task or 'All tasks'}{at}; {_FED[fidelity.forced]} is fed in\n"
        f"{fidelity.few_shot.of(task).size if task else fidelity.few_shot.size}",
    )
    ax.set_ylim(bottom=0)
    whole_numbers(ax)
    return legend_beside(ax)


@styled
def plot_progressive(
    progressive: ProgressiveIcl, ax: Axes | None = None, *, task: str = ""
) -> Axes:
    """Return axes with accuracy less few-shot accuracy, by the number of few-shot tokens.

    Bands are 95 % intervals for paired shares. Accuracy counts as kept where a band lies above the
    dashed line.

    Args:
        progressive: From :func:`progressive_icl`.
        ax: Where to draw; new axes by default.
        task: The task; all by default.

    Raises:
        ValueError: If there is no such task.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.analysis.progressive import progressive_icl
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> ax = plot_progressive(progressive_icl(model, episodes, ks=range(6)))
        >>> float(ax.lines[0].get_ydata()[-1])  # the whole answer is few-shot
        0.0
    """
    frame = progressive.to_frame()
    chosen = task or (ALL if ALL in set(frame.task) else progressive.tasks[0])
    if chosen not in set(frame.task):
        raise ValueError(f"no task {task!r}; there are: {', '.join(progressive.tasks)}")
    frame = frame[frame.task == chosen].sort_values("k")
    ax = new_axes(ax)
    for index, name in enumerate(progressive.scores):
        own = frame[frame.variant == name]
        ends = own.difference_low, own.difference_high
        _band(ax, index, name, own.k, own.difference, *ends)
    ax.axhline(0, color="black", linewidth=0.7)
    ax.axhline(KEPT, color="black", linewidth=0.7, linestyle="--")
    scores = progressive.few_shot
    of = scores if chosen == ALL else scores.of(chosen)
    mean = frame.few_shot.iloc[0]
    ax.set(
        xlabel="first tokens generated few-shot, k",
        ylabel="accuracy less few-shot",
        title=f"{chosen[0].upper() + chosen[1:] if chosen == ALL else chosen}: "
        f"few-shot {mean:.2f}, {frame.length.iloc[0]:.1f} tokens per answer\n{of.size}",
    )
    whole_numbers(ax)
    return legend_beside(ax)


def _band(ax: Axes, index: int, name: str, x: Any, mean: Any, low: Any, high: Any) -> None:
    """Draw one variant's means with their intervals."""
    colour = GREY if name == ZERO_SHOT else COLOURS[index - 1]
    ax.plot(x, mean, label=name, color=colour, marker=MARKERS[index % len(MARKERS)])
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
