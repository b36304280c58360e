"""Figures of what pooling the constituents of prompts does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformer_lens_taskvec._utils.statistics import share_interval
from transformer_lens_taskvec.analysis.robustness import PoolingRobustness
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    legend_beside,
    new_axes,
    styled,
    two_axes,
    whole_numbers,
)
from transformer_lens_taskvec.scoring import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_pooling_robustness(
    found: PoolingRobustness, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """Return axes with accuracy and, of several tasks, decodability by start layer.

    Bands are 95 % intervals over queries of all tasks; dotted is without pooling.

    Args:
        found: From :func:`pooling_robustness`.
        axes: Where to draw, accuracy first; new axes by default.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.analysis.robustness import pooling_robustness
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 6, 2, seed=0)
        >>> found = pooling_robustness(model, episodes, start_layers=[0, 3], k=5)
        >>> [ax.get_ylabel() for ax in plot_pooling_robustness(found)]
        ['exact-match accuracy', 'task decodability']
    """
    shown = {"correct": "exact-match accuracy", "decoded": "task decodability"}
    shown = {name: label for name, label in shown.items() if name in found.unpooled.metrics}
    if axes is None:
        axes = two_axes(None) if len(shown) == 2 else [new_axes(None)]
    styles = {"constituents": (COLOURS[0], "o"), "random spans": (GREY, "x")}
    for ax, (metric, label) in zip(axes, shown.items(), strict=True):
        for name, several in found.pooled.items():
            colour, mark = styles[name]
            means = [scores.mean(metric) for scores in several]
            ends = [_interval(scores, metric) for scores in several]
            low, high = zip(*ends, strict=True)
            ax.plot(found.start_layers, means, color=colour, marker=mark, label=name)
            ax.fill_between(found.start_layers, low, high, color=colour, alpha=0.2, linewidth=0)
        before = found.unpooled.mean(metric)
        ax.axhline(before, color="black", linestyle=":", linewidth=1, label="unpooled")
        if metric == "decoded":
            chance = 1 / len(found.tasks)
            ax.axhline(chance, color=GREY, linestyle="--", linewidth=1, label="chance")
        ax.set(ylabel=label, ylim=(-0.03, 1.03))
        whole_numbers(ax)
        legend_beside(ax)
    axes[-1].set_xlabel("pooled from layer (from 0) on")
    axes[0].set_title(
        f"Constituents pooled ({found.how}), {found.reduction:.0%} fewer states\n"
        f"{found.unpooled.size}"
    )
    if "decoded" in shown:
        axes[1].set_title(f"states of the last token after layer {found.layer}")
    return axes


def _interval(scores: Scores, metric: str) -> tuple[float, float]:
    low, high = share_interval(scores.metrics[metric], scores.queries, scores.demo_sets)
    return float(low), float(high)
