"""Concepts: sparse codes over pairs of features."""

from transformer_lens_taskvec.lab.problems.concepts.finding import (
    SameSignAttention,
    same_sign_attention,
)
from transformer_lens_taskvec.lab.problems.concepts.problem import Concepts

__all__ = ["Concepts", "SameSignAttention", "same_sign_attention"]
