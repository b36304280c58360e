"""Task vectors, by every method; what can be injected is an :class:`Injectable`."""

from transformer_lens_taskvec.vectors.all_tokens import Residuals, residuals
from transformer_lens_taskvec.vectors.base import Injectable, LayerwiseVectors, TaskVectors
from transformer_lens_taskvec.vectors.cleaning import SparseVectors, clean_vectors
from transformer_lens_taskvec.vectors.contrast import (
    contrast_vectors,
    in_context_vectors,
    instruction_vectors,
)
from transformer_lens_taskvec.vectors.dictionary import TopKDictionary, train_dictionary
from transformer_lens_taskvec.vectors.encoding import Dictionary
from transformer_lens_taskvec.vectors.feature_accuracy import FeatureAccuracy, accuracy_by_features
from transformer_lens_taskvec.vectors.head_weights import HeadWeights, learn_head_weights
from transformer_lens_taskvec.vectors.heads import HeadEffects, function_vectors, head_effects
from transformer_lens_taskvec.vectors.learned import learn_vectors
from transformer_lens_taskvec.vectors.linear import LinearMaps, linear_maps
from transformer_lens_taskvec.vectors.means import task_vectors
from transformer_lens_taskvec.vectors.separators import (
    SeparatorVectors,
    separator_means,
    separator_vectors,
)
from transformer_lens_taskvec.vectors.sparse import Decomposition, decompose
from transformer_lens_taskvec.vectors.states import state_vectors

__all__ = [
    "Decomposition",
    "Dictionary",
    "FeatureAccuracy",
    "HeadEffects",
    "HeadWeights",
    "Injectable",
    "LayerwiseVectors",
    "LinearMaps",
    "Residuals",
    "SeparatorVectors",
    "SparseVectors",
    "TaskVectors",
    "TopKDictionary",
    "accuracy_by_features",
    "clean_vectors",
    "contrast_vectors",
    "decompose",
    "function_vectors",
    "head_effects",
    "in_context_vectors",
    "instruction_vectors",
    "learn_head_weights",
    "learn_vectors",
    "linear_maps",
    "residuals",
    "separator_means",
    "separator_vectors",
    "state_vectors",
    "task_vectors",
    "train_dictionary",
]
