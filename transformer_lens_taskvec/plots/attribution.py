"""Figures of where task vectors come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from transformer_lens_taskvec.analysis.attribution import Attribution
from transformer_lens_taskvec.plots.style import new_axes, styled, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_attribution(
    found: Attribution, ax: Axes | None = None, *, task: str | None = None
) -> Axes:
    """Return axes with a heat map of the share of the vector by part of the prompt and layer.

    The sum over all cells is 1; red cells write against the vector. The numbers at the right are
    the sums of the rows.

    Args:
        found: From :func:`attribute_demonstrations`.
        ax: Where to draw; new axes by default.
        task: One task; the mean over tasks by default.

    Raises:
        ValueError: If there is no such task.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.analysis.attribution import attribute_demonstrations
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 4, 4, seed=0)
        >>> plot_attribution(attribute_demonstrations(model, episodes, 1)).get_xlabel()
        'layer (from 0)'
    """
    if task is not None and task not in found.tasks:
        raise ValueError(f"no attribution of {task!r}; there are: {', '.join(found.tasks)}")
    ax = new_axes(ax, (4.6, 1.4 + 0.2 * len(found.parts)))
    by_layer = found.by_layer
    cells = by_layer.mean(dim=0) if task is None else by_layer[found.tasks.index(task)]
    first, last = found.layers[0], found.layers[-1]
    values = torch.full((len(found.parts), last - first + 1), torch.nan)
    values[:, [layer - first for layer in found.layers]] = cells.T.float()
    reach = float(cells.abs().max()) or 1.0
    extent = (first - 0.5, last + 0.5, len(found.parts) - 0.5, -0.5)
    ax.set_facecolor("lightgrey")
    image = ax.imshow(
        values.tolist(), cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", extent=extent
    )
    ax.set_yticks(range(len(found.parts)), found.parts)
    totals = ax.secondary_yaxis("right")
    totals.set_yticks(range(len(found.parts)), [f"{row:.2f}" for row in cells.sum(dim=0).tolist()])
    totals.tick_params(length=0)
    what = "what tells the task apart" if found.centred else "the task vector"
    heads = f"{len(found.heads)} head" + ("s" if len(found.heads) > 1 else "")
    ax.set(
        xlabel="layer (from 0)",
        title=f"Who wrote {what}\n{task or 'mean over tasks'}, {heads}",
    )
    whole_numbers(ax)
    ax.figure.colorbar(image, ax=ax, label="share, by layer", pad=0.12)
    return ax
