"""Vectors: every way to make a task vector; each returns something that can be injected."""

from transformer_lens_taskvec.vectors.base import TaskVectors
from transformer_lens_taskvec.vectors.heads import (
    FunctionVector,
    HeadEffects,
    function_vector,
    head_effects,
)
from transformer_lens_taskvec.vectors.means import task_vectors

__all__ = [
    "FunctionVector",
    "HeadEffects",
    "TaskVectors",
    "function_vector",
    "head_effects",
    "task_vectors",
]
