"""The figures of a run: what the paper shows of its own, drawn from ``emergence``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformer_lens_taskvec.activations import collect
from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.lab.emergence import Emergence
from transformer_lens_taskvec.lab.episodes import regression_episodes
from transformer_lens_taskvec.lab.training.runs import Run
from transformer_lens_taskvec.plots import (
    figure_of,
    plot_decodability,
    plot_embedding,
    plot_head_effects,
    plot_oracles,
    plot_perturbation,
    plot_training,
    styled,
)
from transformer_lens_taskvec.vectors.heads import head_effects

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEED = 21


def emergence_figures(run: Run, emergence: Emergence, *, n: int = 100) -> dict[str, Figure]:
    """Draw a run (Han et al. 2025, Figures 2 to 7, 17 and 18).

    Where checkpoints stand side by side they are the last before TD rises, the first past half of
    its rise, and the last.

    Args:
        run: The run.
        emergence: Its measurements.
        n: Sequences a task for the embedding, TD by layer, and head pruning.

    Returns:
        Figures by name: ``training``, ``oracles``, ``embedding``, ``swaps``, ``td_by_layer``,
        ``head_pruning``.

    Example:
        >>> from matplotlib import pyplot as plt
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> ends = (run.steps[0], run.steps[-1])
        >>> found = lab.emergence(run, steps=ends, n=11, n_oracle=20, progress=False)
        >>> figures = lab.emergence_figures(run, found, n=11)
        >>> sorted(figures)
        ['embedding', 'head_pruning', 'oracles', 'swaps', 'td_by_layer', 'training']
        >>> plt.close("all")
    """
    episodes = regression_episodes(run.config.mixture, n, emergence.n_shots, seed=_SEED)
    moments = _moments(emergence)
    at = dict(zip(emergence.steps, emergence.swaps, strict=True))
    last = run.model(moments[-1])
    pruned = head_effects(last, episodes, on=episodes, ablation="zero", position=None)
    harm = -pruned.log_probability_by_task
    reach = float(harm.flatten().kthvalue(max(1, int(0.9 * harm.numel()))).values.clamp(min=1e-3))

    def embedding(step: int, ax: Any) -> None:
        plot_embedding(collect(run.model(step), episodes), emergence.best_layer, ax)

    def swap(step: int, ax: Any) -> None:
        plot_perturbation(at[step], ax, reach=float(at[moments[-1]].nll.abs().max()))

    return {
        "training": figure_of(plot_training(emergence)[0]),
        "oracles": figure_of(plot_oracles(emergence, moments)),
        "embedding": _panels(moments, embedding, "step {}"),
        "swaps": _panels(moments, swap, "step {}"),
        "td_by_layer": figure_of(plot_decodability(task_decodability(collect(last, episodes)))),
        "head_pruning": _panels(
            pruned.tasks,
            lambda task, ax: plot_head_effects(pruned, ax, task=task, reach=reach),
            "without a head: {}",
        ),
    }


def _moments(emergence: Emergence) -> list[int]:
    """The last checkpoint before TD rises, the first past half of its rise, and the last."""
    td = emergence.td[:, emergence.best_layer].mean(-1)
    risen = (td - td[0]) / (td.max() - td[0]).clamp(min=1e-6)
    half = int((risen > 0.5).int().argmax())
    before = [index for index in range(half + 1) if risen[index] < 0.2]
    chosen = {before[-1] if before else 0, half, len(td) - 1}
    return [emergence.steps[index] for index in sorted(chosen)]


@styled
def _panels(items: Sequence[Any], draw: Callable[[Any, Any], Any], title: str) -> Figure:
    import matplotlib.pyplot as plt

    columns = min(len(items), 4)
    rows = -(-len(items) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )
    for ax, item in zip(grid.flat, items, strict=False):
        draw(item, ax)
        ax.set_title(title.format(item))
        legend = ax.get_legend()
        if legend is not None and item != items[-1]:
            legend.remove()
    for ax in grid.flat[len(items) :]:
        ax.set_axis_off()
    return figure
