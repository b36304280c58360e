"""The figures of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformer_lens_taskvec.experiment import Experiment
from transformer_lens_taskvec.plots.decodability import plot_decodability
from transformer_lens_taskvec.plots.embedding import plot_embedding
from transformer_lens_taskvec.plots.interventions import plot_layer_sweep
from transformer_lens_taskvec.plots.style import figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def part_figure(name: str, part: Any) -> Figure:
    """Return the figure of a part that :func:`run_experiment` reports.

    Args:
        name: ``"decodability"`` or ``"layer_sweep"``.
        part: What was measured.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> import transformer_lens_taskvec as tv
        >>> tasks, seen = tv.bitwise_tasks(null=False), {}
        >>> def draw(name, part):
        ...     seen[name] = tv.plots.part_figure(name, part)
        >>> found = tv.run_experiment(tv.load_model("toy"), tasks, n_shots=4, n=6, report=draw)
        >>> list(seen)
        ['decodability', 'layer_sweep']
        >>> plt.close("all")
    """
    return figure_of(_PARTS[name](part))


_PARTS: Mapping[str, Callable[[Any], Any]] = {
    "decodability": plot_decodability,
    "layer_sweep": plot_layer_sweep,
}


def experiment_figures(experiment: Experiment) -> dict[str, Figure]:
    """Return figures of an experiment's layer sweep, decodability by layer and embedding.

    Args:
        experiment: From :func:`run_experiment`.

    Returns:
        Figures by name, for :func:`~transformer_lens_taskvec.plots.save_figures`.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.bitwise_tasks(null=False)
        >>> found = tv.run_experiment(tv.load_model("toy"), tasks, n_shots=4, n=6)
        >>> list(tv.plots.experiment_figures(found))
        ['layer_sweep', 'decodability', 'embedding']
        >>> plt.close("all")
    """
    best = experiment.decodability.best_layer()
    return {
        "layer_sweep": part_figure("layer_sweep", experiment.sweep),
        "decodability": part_figure("decodability", experiment.decodability),
        "embedding": figure_of(plot_embedding(experiment.activations, best)),
    }
