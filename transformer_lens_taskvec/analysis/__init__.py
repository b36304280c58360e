"""Analyses, one per file: a function that measures, and the result it returns."""

from transformer_lens_taskvec.analysis.attribution import Attribution, attribute_demonstrations
from transformer_lens_taskvec.analysis.comparison import Comparison, compare
from transformer_lens_taskvec.analysis.cosines import Similarity, similarity
from transformer_lens_taskvec.analysis.decodability import Decodability, task_decodability
from transformer_lens_taskvec.analysis.decoding import DecodingSensitivity, decoding_sensitivity
from transformer_lens_taskvec.analysis.fidelity import IclFidelity, icl_fidelity
from transformer_lens_taskvec.analysis.lenses import Vocabulary, vocabulary
from transformer_lens_taskvec.analysis.permuted import DecodabilityNull
from transformer_lens_taskvec.analysis.perturbation import PerturbationMatrix, perturbation_matrix
from transformer_lens_taskvec.analysis.pooling import input_embeddings
from transformer_lens_taskvec.analysis.progressive import (
    ProgressiveIcl,
    progressive_generate,
    progressive_icl,
)
from transformer_lens_taskvec.analysis.robustness import PoolingRobustness, pooling_robustness
from transformer_lens_taskvec.analysis.sensitivity import decodability_sensitivity
from transformer_lens_taskvec.analysis.steered import Steering, steer
from transformer_lens_taskvec.analysis.steering import SteeringEffect, steering_effect
from transformer_lens_taskvec.analysis.sweep import LayerSweep, layer_sweep
from transformer_lens_taskvec.analysis.td_accuracy import AccuracyFit, td_vs_accuracy

__all__ = [
    "AccuracyFit",
    "Attribution",
    "Comparison",
    "Decodability",
    "DecodabilityNull",
    "DecodingSensitivity",
    "IclFidelity",
    "LayerSweep",
    "PerturbationMatrix",
    "PoolingRobustness",
    "ProgressiveIcl",
    "Similarity",
    "Steering",
    "SteeringEffect",
    "Vocabulary",
    "attribute_demonstrations",
    "compare",
    "decodability_sensitivity",
    "decoding_sensitivity",
    "icl_fidelity",
    "input_embeddings",
    "layer_sweep",
    "perturbation_matrix",
    "pooling_robustness",
    "progressive_generate",
    "progressive_icl",
    "similarity",
    "steer",
    "steering_effect",
    "task_decodability",
    "td_vs_accuracy",
    "vocabulary",
]
