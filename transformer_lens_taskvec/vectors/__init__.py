"""Task vectors: every method returns an object that can be injected."""

from transformer_lens_taskvec.vectors.base import Injectable, TaskVectors
from transformer_lens_taskvec.vectors.heads import HeadEffects, function_vectors, head_effects
from transformer_lens_taskvec.vectors.means import task_vectors

__all__ = [
    "HeadEffects",
    "Injectable",
    "TaskVectors",
    "function_vectors",
    "head_effects",
    "task_vectors",
]
