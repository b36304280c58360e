"""Figures of the library's results, by matplotlib.

Each function takes a result and returns the ``Axes`` it drew on, new ones unless ``ax`` is given.
Tasks keep one colour and marker across figures of results that list the same tasks.
"""

from transformer_lens_taskvec.plots.scores import (
    plot_checkpoints,
    plot_head_effects,
    plot_layer_sweep,
    plot_perturbation,
    plot_prompting,
    plot_steering,
    plot_td_vs_accuracy,
)
from transformer_lens_taskvec.plots.spaces import (
    explore_embedding,
    plot_decodability,
    plot_embedding,
    plot_pairwise,
    plot_vectors,
)
from transformer_lens_taskvec.plots.style import (
    FIGURE_SIZE,
    STYLE,
    figure_of,
    save_figures,
    styled,
    task_style,
)
from transformer_lens_taskvec.plots.training import plot_oracles, plot_training

__all__ = [
    "FIGURE_SIZE",
    "STYLE",
    "explore_embedding",
    "figure_of",
    "plot_checkpoints",
    "plot_decodability",
    "plot_embedding",
    "plot_head_effects",
    "plot_layer_sweep",
    "plot_oracles",
    "plot_pairwise",
    "plot_perturbation",
    "plot_prompting",
    "plot_steering",
    "plot_td_vs_accuracy",
    "plot_training",
    "plot_vectors",
    "save_figures",
    "styled",
    "task_style",
]
