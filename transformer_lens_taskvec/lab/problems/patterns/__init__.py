"""Patterns: binary classification by relevant patterns, and pruning of neurons."""

from transformer_lens_taskvec.lab.problems.patterns.problem import PatternTasks
from transformer_lens_taskvec.lab.problems.patterns.pruning import (
    PruningCurve,
    neuron_norms,
    plot_pruning,
    prune_neurons,
    pruning_curve,
)

__all__ = [
    "PatternTasks",
    "PruningCurve",
    "neuron_norms",
    "plot_pruning",
    "prune_neurons",
    "pruning_curve",
]
