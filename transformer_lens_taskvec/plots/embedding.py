"""Two-dimensional maps of representations, static and interactive."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import Activations, check_finite
from transformer_lens_taskvec.plots.style import legend_beside, new_axes, styled, task_style
from transformer_lens_taskvec.prompts import AnyEpisode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from plotly.graph_objects import Figure as InteractiveFigure


@styled
def plot_embedding(
    activations: Activations,
    layer: int,
    ax: Axes | None = None,
    *,
    method: str | None = None,
    seed: int = 0,
) -> Axes:
    """Return axes with a two-dimensional map of one layer's activations.

    Args:
        activations: The activations.
        layer: The layer, counted from 0.
        ax: Where to draw; new axes by default.
        method: ``"umap"`` with the paper's settings (15 neighbours, min_dist 0.1), or ``"pca"``; by
            default UMAP if umap-learn is installed.
        seed: Seed of UMAP.

    Raises:
        ValueError: If there is no such method or layer.
        ImportError: If UMAP is asked for and not installed.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> activations = tv.collect(model, tv.sample_episodes(tv.bitwise_tasks(), 4, 4, seed=0))
        >>> tv.plot_embedding(activations, layer=1, method="pca").get_title()
        'Representations of the prompts, layer 1'
    """
    points, names = _mapped(activations, layer, method, seed)
    ax = new_axes(ax)
    for index, task in enumerate(activations.tasks):
        own = rearrange(points[activations.labels == index], "point xy -> xy point").tolist()
        style = {**task_style(index, task), "s": 9, "alpha": 0.8, "linewidths": 0.5}
        ax.scatter(*own, label=task, **style)
    ax.set(xlabel=names[0], ylabel=names[1], title=f"Representations of the prompts, layer {layer}")
    return legend_beside(ax)


def explore_embedding(
    activations: Activations,
    episodes: Sequence[AnyEpisode] | None = None,
    *,
    method: str | None = None,
    seed: int = 0,
) -> InteractiveFigure:
    """Return an interactive map, with a slider over layers and the prompts as hover text.

    Args:
        activations: The activations, of one layer or more.
        episodes: The episodes they were collected from, in the same order, for the hover text.
        method: As for :func:`plot_embedding`.
        seed: Seed of UMAP.

    Returns:
        A plotly figure (extra ``interactive``), which notebooks display; ``.write_html(path)``
        saves it as a page.

    Raises:
        ValueError: If there is no such method, or not as many episodes as activations.
        ImportError: If plotly is not installed, or UMAP is asked for and not installed.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(), 4, 4, seed=0)
        >>> figure = tv.explore_embedding(tv.collect(model, episodes), episodes, method="pca")
        >>> len(figure.data), len(figure.frames)  # tasks, layers
        (7, 4)
    """
    try:
        from plotly import graph_objects as go
    except ImportError as error:
        raise ImportError(
            "this figure needs plotly: pip install 'transformer-lens-taskvec[interactive]'"
        ) from error
    if episodes is not None and len(episodes) != len(activations):
        raise ValueError(f"there are {len(activations)} activations and {len(episodes)} episodes")
    texts = _texts(activations, episodes)

    def traces(layer: int, *, whole: bool) -> list[Any]:
        points = _mapped(activations, layer, method, seed)[0]
        drawn = []
        for index, task in enumerate(activations.tasks):
            own = activations.labels == index
            places = {axis: points[own, at].tolist() for at, axis in enumerate("xy")}
            style = {
                "name": task,
                "mode": "markers",
                "marker": {"color": task_style(index, task)["color"], "size": 6},
                "text": [texts[row] for row in own.nonzero()[:, 0].tolist()],
                "hoverinfo": "text",
            }
            drawn.append(go.Scatter(**places, **(style if whole else {})))
        return drawn

    layers = activations.layers
    frames = [go.Frame(data=traces(layer, whole=False), name=str(layer)) for layer in layers]
    steps = [
        {
            "label": str(layer),
            "method": "animate",
            "args": [[str(layer)], {"mode": "immediate", "frame": {"duration": 0}}],
        }
        for layer in layers
    ]
    layout = {
        "template": "simple_white",
        "width": 640,
        "height": 480,
        "title": "Representations of the prompts",
        "sliders": [{"currentvalue": {"prefix": "layer "}, "steps": steps}],
    }
    return go.Figure(data=traces(layers[0], whole=True), frames=frames, layout=layout)


def _texts(activations: Activations, episodes: Sequence[AnyEpisode] | None) -> list[str]:
    """Return the hover text of each point: its task and, with episodes, its prompt and answer."""
    texts = []
    for row, label in enumerate(activations.labels.tolist()):
        lines = [f"<b>{escape(activations.tasks[label])}</b>"]
        if episodes is not None:
            episode = episodes[row]
            lines += [escape(line) for line in str(episode.prompt).split("\n")]
            lines[-1] += f" <i>{escape(str(episode.answer))}</i>"
        texts.append("<br>".join(lines))
    return texts


def _mapped(
    activations: Activations, layer: int, method: str | None, seed: int
) -> tuple[Float[Tensor, "point 2"], tuple[str, str]]:
    """Return the points of the map and the names of its axes."""
    if method not in (None, "umap", "pca"):
        raise ValueError(f"method is {method!r}; it must be 'umap', 'pca' or None")
    check_finite(activations)
    at = rearrange(activations.at(layer), "point ... -> point (...)")
    if method == "umap" or (method is None and find_spec("umap") is not None):
        return _umap(at, seed), ("first UMAP dimension", "second")
    points, shares = _principal_components(at)
    first, second = (f"{100 * share:.0f}%" for share in shares)
    return points, (f"first principal component ({first} of variance)", f"second ({second})")


def _umap(points: Float[Tensor, "point d"], seed: int) -> Float[Tensor, "point 2"]:
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError(
            "UMAP needs umap-learn: pip install 'transformer-lens-taskvec[umap]'"
        ) from error
    mapped = UMAP(n_neighbors=15, min_dist=0.1, random_state=seed, n_jobs=1).fit_transform(
        points.numpy()
    )
    return torch.from_numpy(mapped)


def _principal_components(
    points: Float[Tensor, "point d"],
) -> tuple[Float[Tensor, "point 2"], Sequence[float]]:
    centred = points.double() - reduce(points.double(), "point d -> d", "mean")
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    shares = singular.square() / singular.square().sum().clamp(min=1e-30)
    if len(singular) < 2:
        raise ValueError("a two-dimensional map needs at least two points and two dimensions")
    mapped = einsum(centred, directions[:2], "point d, xy d -> point xy")
    return mapped.float(), shares[:2].tolist()
