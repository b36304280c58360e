"""Matplotlib figures of the library's results.

Each function takes a result and returns the ``Axes`` it drew on, new ones unless ``ax`` is given.
A task has the same colour and marker in all figures of results that list the same tasks.
"""

from transformer_lens_taskvec.plots.attribution import plot_attribution
from transformer_lens_taskvec.plots.decodability import (
    plot_decodability,
    plot_pairwise,
    plot_td_vs_accuracy,
)
from transformer_lens_taskvec.plots.embedding import explore_embedding, plot_embedding
from transformer_lens_taskvec.plots.experiment import experiment_figures, part_figure
from transformer_lens_taskvec.plots.fidelity import plot_fidelity, plot_progressive
from transformer_lens_taskvec.plots.heads import plot_head_effects
from transformer_lens_taskvec.plots.interventions import (
    plot_layer_sweep,
    plot_perturbation,
    plot_steering,
)
from transformer_lens_taskvec.plots.methods import plot_methods
from transformer_lens_taskvec.plots.robustness import plot_pooling_robustness
from transformer_lens_taskvec.plots.style import (
    FIGURE_SIZE,
    STYLE,
    figure_of,
    save_figures,
    styled,
    task_style,
)
from transformer_lens_taskvec.plots.vectors import plot_similarity, plot_vocabulary

__all__ = [
    "FIGURE_SIZE",
    "STYLE",
    "experiment_figures",
    "explore_embedding",
    "figure_of",
    "part_figure",
    "plot_attribution",
    "plot_decodability",
    "plot_embedding",
    "plot_fidelity",
    "plot_head_effects",
    "plot_layer_sweep",
    "plot_methods",
    "plot_pairwise",
    "plot_perturbation",
    "plot_pooling_robustness",
    "plot_progressive",
    "plot_similarity",
    "plot_steering",
    "plot_td_vs_accuracy",
    "plot_vocabulary",
    "save_figures",
    "styled",
    "task_style",
]
