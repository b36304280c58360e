"""Figures of what task vectors say, and of how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.analysis.cosines import Similarity
from transformer_lens_taskvec.analysis.lenses import (
    JACOBIAN,
    LOGIT,
    PROMOTED,
    VECTORS,
    Vocabulary,
)
from transformer_lens_taskvec.plots.style import heat_map, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST = 14
"""Characters of a token that are shown."""

_MOST_LAYERS = 12
"""Layers that are shown by default."""


@styled
def plot_vocabulary(
    found: Vocabulary,
    ax: Axes | None = None,
    *,
    task: str | None = None,
    lens: str = LOGIT,
    sign: str = PROMOTED,
    layers: Sequence[int] | None = None,
    n: int = 3,
) -> Axes:
    """Return axes with the strongest tokens in cells, layers in rows.

    Colours say how far the strongest token stands out, in standard deviations from the vector's
    mean logit. Columns are the tasks, and colours are next to the first control's; or, for one
    task, columns are its vector and its controls. Spaces are shown as ``␣``, and characters that
    the font lacks by their codes.

    Args:
        found: From :func:`vocabulary`.
        ax: Where to draw; new axes by default.
        task: One task, next to its controls; all tasks by default.
        lens: ``"logit"`` or ``"jacobian"``.
        sign: ``"+"`` for what is promoted, ``"-"`` for what is demoted.
        layers: The layers; by default all, or a dozen of them at equal distances.
        n: Tokens per cell.

    Raises:
        ValueError: If there is no such task, lens, sign or layer.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.analysis.lenses import vocabulary
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 4, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> plot_vocabulary(vocabulary(vectors, model, k=2)).get_title()
        'Tokens promoted by task vectors, logit lens'
    """
    layers = _some(found.layers) if layers is None else tuple(layers)
    cells = [
        (task or name, name if task else VECTORS)
        for name in (found.vectors if task else found.tasks)
    ]
    where: dict[str, Any] = {"lens": lens, "sign": sign}
    texts = [
        [
            "  ".join(map(_shown, found.tokens(of, layer, vector=by, **where)[:n]))
            for of, by in cells
        ]
        for layer in layers
    ]
    values = _strongest(found, cells, layers, **where)
    minus = ""
    if task is None and len(found.vectors) > 1:
        control = found.vectors[1]
        values = values - _strongest(found, [(of, control) for of, _ in cells], layers, **where)
        minus = f"\nminus that of {control}"
    widest = max(len(text) for row in texts for text in row)
    wide = max(1.0, 0.15 + 0.056 * widest)
    ax = new_axes(ax, (1.6 + wide * len(cells), 1.2 + 0.22 * max(6, len(layers))))
    reach = float(values.abs().max()) or 1.0
    colours, low = ("RdBu_r", -reach) if minus else ("Blues", min(0.0, float(values.min())))
    image = ax.imshow(values.tolist(), cmap=colours, vmin=low, vmax=reach, aspect="auto", alpha=0.6)
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            ax.text(x, y, text, ha="center", va="center", size=7, parse_math=False)
    names = [name for _, name in cells] if task else [name for name, _ in cells]
    ax.set_xticks(range(len(cells)), names)
    ax.set_yticks(range(len(layers)), list(map(str, layers)))
    ax.set_ylabel("layer (from 0)")
    ax.figure.colorbar(image, ax=ax, label=f"z of the strongest token{minus}", shrink=0.8)
    what = "promoted" if sign == PROMOTED else "demoted"
    who = "task vectors" if task is None else f"the vector of {task}"
    centred = "minus the mean over tasks, " if found.centred else ""
    by = {JACOBIAN: "Jacobian"}.get(lens, lens)
    ax.set_title(f"Tokens {what} by {who}, {centred}{by} lens")
    return ax


@styled
def plot_similarity(
    found: Similarity,
    ax: Axes | None = None,
    *,
    layer: int | None = None,
    task: str | None = None,
) -> Axes:
    """Return axes with cosines as numbers: tasks with tasks at a layer, or layers with layers.

    Tasks are in hierarchical order, like ones next to each other.

    Args:
        found: From :func:`similarity`.
        ax: Where to draw; new axes by default.
        layer: The layer at which tasks are compared; the middle one by default.
        task: The task of which layers are compared, in place of tasks.

    Raises:
        ValueError: If there is no such layer or task, or both are given.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.analysis.cosines import similarity
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 4, 4, seed=0)
        >>> found = similarity(tv.task_vectors(tv.collect(model, episodes)))
        >>> plot_similarity(found, task="XOR").get_title()
        'Cosines of XOR by layer, minus the mean over tasks'
    """
    if task is not None and layer is not None:
        raise ValueError(
            f"layer is {layer} and task {task!r}; give a layer to compare tasks, or a task to "
            "compare its layers"
        )
    if task is None:
        layer = found.layers[len(found.layers) // 2] if layer is None else layer
        names: Sequence[str] = found.order(layer)
        places = [found.tasks.index(name) for name in names]
        cosines, title = found.at(layer)[places][:, places], f"Cosines of tasks at layer {layer}"
    else:
        names, cosines = list(map(str, found.layers)), found.of(task)
        title = f"Cosines of {task} by layer"
    ax = heat_map(
        cosines, names, names, ax, label="cosine", colours="RdBu_r", ends=(-1, 1), written=".2f"
    )
    ax.set_title(title + (", minus the mean over tasks" if found.centred else ""))
    if found.crossed:
        ax.set(xlabel="other vectors", ylabel="vectors")
    elif task is not None:
        ax.set(xlabel="layer (from 0)", ylabel="layer (from 0)")
    return ax


def _some(layers: Sequence[int]) -> tuple[int, ...]:
    """Return all layers, or a dozen at equal distances with the first and the last."""
    n = min(len(layers), _MOST_LAYERS)
    places = torch.linspace(0, len(layers) - 1, n).round().int().tolist()
    return tuple(layers[place] for place in places)


def _strongest(
    found: Vocabulary,
    cells: Sequence[tuple[str, str]],
    layers: Sequence[int],
    *,
    lens: str,
    sign: str,
) -> Float[Tensor, "layer cell"]:
    """Return how far the first token of each cell stands out, in standard deviations."""
    table = found.table
    rows = table[(table["rank"] == 1) & (table.lens == lens) & (table.sign == sign)]
    z = rows.set_index(["layer", "task", "vector"]).z
    values = [[z[layer, task, by] for task, by in cells] for layer in layers]
    return torch.tensor(values) * (1 if sign == PROMOTED else -1)


def _shown(token: str) -> str:
    """Return a token with spaces that can be seen, and codes for what the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    shown = "".join(
        "␣" if one == " " else one if one.isprintable() and ord(one) in known else ascii(one)[1:-1]
        for one in token
    )
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
