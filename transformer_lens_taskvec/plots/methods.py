"""Figures of methods of making task vectors, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens_taskvec.benchmark import MethodComparison
from transformer_lens_taskvec.plots.style import new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_methods(comparison: MethodComparison, ax: Axes | None = None) -> Axes:
    """Return axes with a matrix of methods and tasks, the gain over the method's own control.

    A cell's first number is the accuracy with the method's vector, the second that with its
    control. A dot marks a gain with p below 0.05 after Holm's correction over all cells. The rows
    below are accuracies without a vector.

    Args:
        comparison: From :func:`compare_methods`.
        ax: Where to draw; new axes by default.

    Raises:
        ValueError: If no method could be measured.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.find_tasks(["XOR", "OR"])
        >>> options = {"methods": ["mean"], "n_shots": 4, "n": 8, "n_dev": 8, "n_test": 8}
        >>> tv.plot_methods(tv.compare_methods(model, tasks, **options)).get_title()
        'Accuracy, and under it each control of shuffled labels'
    """
    frame, summary = comparison.to_frame(), comparison.summary()
    if not len(frame):
        raise ValueError("no method could be measured; see comparison.units for the errors")
    methods, tasks = list(summary.method), list(comparison.baselines)
    names = {"few_shot": f"{comparison.settings['n_shots']} shots", "zero_shot": "nothing injected"}
    n_rows = len(methods) + len(names)
    ax = new_axes(ax, (2.6 + 0.72 * len(tasks), 1.6 + 0.42 * n_rows))
    cells: dict[tuple[str, str], dict[Any, Any]] = {
        (row["method"], row["task"]): row for row in frame.to_dict("records")
    }
    unknown = {"gain": float("nan")}
    gains = [[cells.get((method, task), unknown)["gain"] for task in tasks] for method in methods]
    blank = [[float("nan")] * len(tasks)] * len(names)
    image = ax.imshow([*gains, *blank], cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for y, method in enumerate(methods):
        for x, task in enumerate(tasks):
            row = cells.get((method, task))
            if row is None:
                continue
            dark = abs(row["gain"]) > 0.6
            mark = " \u2022" if row["p_holm"] < 0.05 and row["gain"] > 0 else ""
            text = f"{row['accuracy']:.2f}{mark}\n{row[comparison.control]:.2f}"
            shade = "white" if dark else "black"
            ax.text(x, y, text, ha="center", va="center", color=shade, size=7, linespacing=0.95)
    for y, name in enumerate(names, start=len(methods)):
        for x, task in enumerate(tasks):
            accuracy = comparison.baselines[task][name]["accuracy"]
            ax.text(x, y, f"{accuracy:.2f}", ha="center", va="center", color="dimgrey", size=7)
    ax.axhline(len(methods) - 0.5, color="grey", linewidth=0.8)
    ax.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(n_rows), [*methods, *names.values()])
    ax.set_ylim(n_rows - 0.5, -0.5)
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="accuracy minus control", shrink=0.8)
    ax.set_title(f"Accuracy, and under it each control of {comparison.control}")
    return ax
