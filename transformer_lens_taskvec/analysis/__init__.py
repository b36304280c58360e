"""Analyses, one per file: a function that measures, and the result it returns."""

from transformer_lens_taskvec.analysis.comparison import Comparison, compare
from transformer_lens_taskvec.analysis.decodability import Decodability, task_decodability
from transformer_lens_taskvec.analysis.permuted import DecodabilityNull
from transformer_lens_taskvec.analysis.perturbation import PerturbationMatrix, perturbation_matrix
from transformer_lens_taskvec.analysis.pooling import input_embeddings
from transformer_lens_taskvec.analysis.sensitivity import decodability_sensitivity
from transformer_lens_taskvec.analysis.steering import SteeringEffect, steering_effect
from transformer_lens_taskvec.analysis.sweep import LayerSweep, layer_sweep
from transformer_lens_taskvec.analysis.td_accuracy import AccuracyFit, td_vs_accuracy

__all__ = [
    "AccuracyFit",
    "Comparison",
    "Decodability",
    "DecodabilityNull",
    "LayerSweep",
    "PerturbationMatrix",
    "SteeringEffect",
    "compare",
    "decodability_sensitivity",
    "input_embeddings",
    "layer_sweep",
    "perturbation_matrix",
    "steering_effect",
    "task_decodability",
    "td_vs_accuracy",
]
