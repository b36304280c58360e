"""Methods of making task vectors, held side by side on the same episodes with the same controls."""

from transformer_lens_taskvec.benchmark.comparison import (
    CONTROLS,
    MethodComparison,
    compare_methods,
)
from transformer_lens_taskvec.benchmark.methods import EXTRACTED, METHODS, Method

__all__ = [
    "CONTROLS",
    "EXTRACTED",
    "METHODS",
    "Method",
    "MethodComparison",
    "compare_methods",
]
