"""Task vectors, by every method; what can be injected is an :class:`Injectable`."""

from transformer_lens_taskvec.vectors.base import Injectable, LayerwiseVectors, TaskVectors
from transformer_lens_taskvec.vectors.head_weights import HeadWeights, learn_head_weights
from transformer_lens_taskvec.vectors.heads import HeadEffects, function_vectors, head_effects
from transformer_lens_taskvec.vectors.learned import learn_vectors
from transformer_lens_taskvec.vectors.means import task_vectors

__all__ = [
    "HeadEffects",
    "HeadWeights",
    "Injectable",
    "LayerwiseVectors",
    "TaskVectors",
    "function_vectors",
    "head_effects",
    "learn_head_weights",
    "learn_vectors",
    "task_vectors",
]
