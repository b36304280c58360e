"""Figures of how close the zero-shot model under variants is to the few-shot model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens_taskvec.analysis.fidelity import IclFidelity
from transformer_lens_taskvec.analysis.named import ZERO_SHOT
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
        style: dict[str, Any] = {
            "color": GREY if name == ZERO_SHOT else COLOURS[index - 1],
            "marker": MARKERS[index % len(MARKERS)],
        }
        ax.plot(curve.position, curve["mean"], label=name, **style)
        ax.fill_between(
            curve.position, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0
        )
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
