"""The figures of an experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformer_lens_taskvec.experiment import Experiment
from transformer_lens_taskvec.plots.decodability import plot_decodability
from transformer_lens_taskvec.plots.embedding import plot_embedding
from transformer_lens_taskvec.plots.interventions import plot_layer_sweep
from transformer_lens_taskvec.plots.style import figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    drawn = {
        "layer_sweep": plot_layer_sweep(experiment.sweep),
        "decodability": plot_decodability(experiment.decodability),
        "embedding": plot_embedding(experiment.activations, best),
    }
    return {name: figure_of(ax) for name, ax in drawn.items()}
