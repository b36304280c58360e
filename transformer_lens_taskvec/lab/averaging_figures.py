"""The figure of a model's gap to exact Bayesian averaging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformer_lens_taskvec.lab.averaging import BmaGap
from transformer_lens_taskvec.plots import figure_of, styled
from transformer_lens_taskvec.plots.style import COLOURS, GREY, legend_beside, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def plot_bma_gap(gaps: BmaGap | Sequence[BmaGap]) -> Figure:
    """Draw the gap by position, at one checkpoint or several, in four panels.

    They are the divergence from the exact mixture; the regret at the last checkpoint given, with
    the exact mixture's and the bound; the weight of the true task that the predictions imply, with
    the exact posterior; and the barycentric R^2 of each layer at the last checkpoint, with the fit
    to the true task and to shuffled posteriors at the best layer.

    Args:
        gaps: From :func:`bma_gap`, in the order of the checkpoints.

    Raises:
        ValueError: If there are none.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.averaging import bma_gap
        >>> from transformer_lens_taskvec.lab.averaging_figures import plot_bma_gap
        >>> figure = plot_bma_gap(bma_gap(lab.shipped_run(), n=20, n_queries=6))
        >>> [ax.get_ylabel() for ax in figure.axes][:2]
        ['divergence (nats)', 'regret (nats per point)']
    """
    import matplotlib.pyplot as plt

    several = [gaps] if isinstance(gaps, BmaGap) else list(gaps)
    if not several:
        raise ValueError("gaps is empty; give one result of bma_gap or more")
    grid = plt.subplots(2, 2, figsize=(10.5, 6.2), layout="constrained", sharex=True)[1]
    for ax, draw in zip(grid.flat, (_divergence, _regret, _implied, _barycentric), strict=True):
        draw(several, ax)
        whole_numbers(ax)
        legend_beside(ax)
    for ax in grid[1]:
        ax.set_xlabel("position in the sequence")
    return figure_of(grid[0, 0])


def _divergence(gaps: Sequence[BmaGap], ax: Axes) -> None:
    for gap, shade in zip(gaps, _shades(gaps), strict=True):
        points, label = range(1, len(gap.divergence) + 1), f"step {gap.step}"
        ax.plot(points, gap.divergence.tolist(), color=COLOURS[0], alpha=shade, label=label)
    # Before any demonstration a model may be right to the last bit.
    shown = [float(gap.divergence[1:].min()) for gap in gaps if len(gap.divergence) > 1]
    ax.set(yscale="log", ylabel="divergence (nats)", title="From the exact mixture")
    ax.set_ylim(bottom=max(0.5 * min(shown, default=1e-6), 1e-6))


def _regret(gaps: Sequence[BmaGap], ax: Axes) -> None:
    last = gaps[-1]
    points = range(1, len(last.regret) + 1)
    ax.plot(points, last.regret.tolist(), color=COLOURS[0], label="model")
    if last.gaussian_regret is not None:
        gaussian = last.gaussian_regret.tolist()
        ax.plot(points, gaussian, color=COLOURS[1], linestyle="-.", label="mixture, as a Gaussian")
    exact, bound = last.exact_regret.tolist(), last.bound.tolist()
    ax.plot(points, exact, color="black", label="exact mixture")
    ax.plot(points, bound, color="black", linestyle=":", label="$-\\log P(z^*) / T$")
    ax.set(ylabel="regret (nats per point)", title=f"Against the best task, step {last.step}")


def _implied(gaps: Sequence[BmaGap], ax: Axes) -> None:
    points = range(1, len(gaps[-1].posterior) + 1)
    for gap, shade in zip(gaps, _shades(gaps), strict=True):
        label = f"step {gap.step}"
        ax.plot(points, gap.implied.tolist(), color=COLOURS[0], alpha=shade, label=label)
    ax.plot(points, gaps[-1].posterior.tolist(), color="black", linestyle="--", label="posterior")
    ax.set(ylabel="weight of the true task", title="Implied by the predictions", ylim=(-0.03, 1.03))


def _barycentric(gaps: Sequence[BmaGap], ax: Axes) -> None:
    last = gaps[-1]
    points, best = range(1, len(last.posterior) + 1), last.best_layer
    for layer, (curve, colour) in enumerate(zip(last.barycentric, COLOURS, strict=False)):
        ax.plot(points, curve.tolist(), color=colour, label=f"layer {layer}")
    label, shuffled = last.barycentric_label[best], last.barycentric_shuffled[best]
    ax.plot(points, label.tolist(), color="black", linestyle=":", label=f"true task, layer {best}")
    ax.plot(points, shuffled.tolist(), color=GREY, linestyle="--", label=f"shuffled, layer {best}")
    ax.set(ylabel="barycentric $R^2$", title=f"Vectors, step {last.step}", ylim=(-0.15, 1.03))


def _shades(gaps: Sequence[BmaGap]) -> list[float]:
    return [0.25 + 0.75 * (index + 1) / len(gaps) for index in range(len(gaps))]
