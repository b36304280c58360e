"""The style of all figures (sizes, fonts, colours, axes, heat maps), and saving them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from cycler import cycler
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.atomic_io import write_whole
from transformer_lens_taskvec.tasks.base import NULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

FIGURE_SIZE = (4.6, 2.9)
"""Width and height of a figure in inches; in a column of 3.4 inches its text is 6 to 7 points."""

# Paul Tol's "muted" and "bright" schemes, colour-blind safe; markers distinguish repeats.
COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#DDCC77",
    "#88CCEE",
    "#AA4499",
    "#44AA99",
    "#882255",
    "#999933",
    "#4477AA",
    "#EE6677",
    "#228833",
)

STYLE: Mapping[str, Any] = {
    "figure.dpi": 140,
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "taskvec",  # the same figure gives the same file
    "pdf.fonttype": 42,
}
"""The figures' matplotlib settings; use ``matplotlib.rc_context(STYLE)`` for your own."""

MARKERS = "osD^vP*X"
GREY = "#808080"


def task_style(index: int, task: str = "") -> dict[str, Any]:
    """Return the colour and marker of the task at ``index`` in a result's list of tasks.

    A task looks the same in all figures of results that list the same tasks. The task called
    ``Null`` is always grey.

    Args:
        index: The task's place in the list.
        task: Its name.

    Returns:
        Keyword arguments for ``Axes.plot``.

    Example:
        >>> task_style(0)
        {'color': '#332288', 'marker': 'o'}
        >>> task_style(6, "Null")
        {'color': '#808080', 'marker': 'x'}
    """
    if task == NULL:
        return {"color": GREY, "marker": "x"}
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
    }


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Return the function, drawing in the package's style without changing matplotlib's settings.

    Args:
        draw: A function that draws.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> @styled
        ... def draw():
        ...     return plt.rcParams["axes.spines.top"]
        >>> draw(), plt.rcParams["axes.spines.top"]
        (False, True)
    """

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib as mpl

        # Not rc_context: it would also undo what a notebook's backend sets when it first draws.
        settings: Any = mpl.rcParams
        before = {name: settings[name] for name in STYLE}
        settings.update(STYLE)
        try:
            return draw(*args, **kwargs)
        finally:
            settings.update(before)

    return drawn


def new_axes(ax: Axes | None, size: tuple[float, float] = FIGURE_SIZE) -> Axes:
    """Return the axes given, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def two_axes(axes: Sequence[Axes] | None) -> Sequence[Axes]:
    """Return the axes given, or two new ones, one above the other."""
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    size = (FIGURE_SIZE[0], 1.5 * FIGURE_SIZE[1])
    return list(plt.subplots(2, 1, figsize=size, layout="constrained", sharex=True)[1])


def legend_beside(ax: Axes) -> Axes:
    """Return the axes with a legend to their right, in two columns if it is long."""
    columns = 1 if len(ax.get_legend_handles_labels()[1]) <= 14 else 2
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        ncols=columns,
        borderaxespad=0.2,
        handlelength=1.5,
    )
    return ax


def heat_map(
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    ax: Axes | None,
    *,
    label: str,
    colours: str,
    ends: tuple[float, float],
    written: str | None = None,
) -> Axes:
    """Return axes with a matrix whose rows and columns are named; NaN cells stay empty.

    Args:
        values: ``[row, column]``.
        rows: The rows' names.
        columns: The columns' names.
        ax: Where to draw; new axes by default, sized so that the names can be read.
        label: What the colours mean.
        colours: The name of a matplotlib colour map.
        ends: The values at which the colours end.
        written: The format of the number in each cell, such as ``".2f"``; no numbers if None.
    """
    side = 1.5 + 0.33 * max(len(rows), len(columns))
    ax = new_axes(ax, (side + 0.9, side))
    image = ax.imshow(values.tolist(), cmap=colours, vmin=ends[0], vmax=ends[1])
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    for y, line in enumerate(values.tolist()):
        for x, value in enumerate(line):
            if written is None or value != value:
                continue
            red, green, blue = image.cmap(image.norm(value))[:3]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            shade = "white" if dark else "black"
            shown = 0.0 if abs(value) < 0.5 * 10 ** -int(written[-2]) else value  # not "-0.00"
            ax.text(x, y, f"{shown:{written}}", ha="center", va="center", color=shade, size=7)
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)
    return ax


def whole_numbers(ax: Axes) -> None:
    """Put ticks on the horizontal axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def figure_of(ax: Axes) -> Figure:
    """Return the figure that axes belong to.

    Args:
        ax: The axes.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, ax = plt.subplots()
        >>> figure_of(ax) is figure
        True
        >>> plt.close(figure)
    """
    figure: Any = ax.figure
    return cast("Figure", figure)


@styled
def save_figures(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write figures as PNG and SVG and close them.

    Args:
        figures: Figures by name, which becomes the file name.
        folder: Created if it does not exist.

    Returns:
        The files written, ``name.png`` and ``name.svg`` for each.

    Raises:
        OSError: If a file cannot be written; it is then not left half-written.

    Example:
        >>> import tempfile
        >>> from matplotlib import pyplot as plt
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in save_figures({"empty": plt.figure()}, folder)]
        ['empty.png', 'empty.svg']
    """
    import matplotlib.pyplot as plt

    folder = Path(folder)
    paths = []
    try:
        for name, figure in figures.items():
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                paths.append(folder / f"{name}.{kind}")
                write_whole(paths[-1], partial(figure.savefig, format=kind, metadata=metadata))
    finally:
        for figure in figures.values():
            plt.close(figure)
    return paths
