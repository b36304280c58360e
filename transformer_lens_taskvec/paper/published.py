"""The paper's published numbers (Han et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping

PUBLISHED_R2: Mapping[str, Mapping[str, float]] = {
    "pos": {
        "Llama-3.1-8B": 0.781,
        "Gemma-2-2B": 0.422,
        "Gemma-2-9B": 0.531,
        "Gemma-2-27B": 0.822,
        "Llama-3.1-70B": 0.844,
        "Mamba-2-8B": 0.596,
    },
    "bitwise": {
        "Llama-3.1-8B": 0.528,
        "Gemma-2-2B": 0.776,
        "Gemma-2-9B": 0.452,
        "Gemma-2-27B": 0.590,
        "Llama-3.1-70B": 0.324,
        "Mamba-2-8B": 0.468,
    },
}
"""The paper's R^2 of accuracy on TD over tasks and shots (Figures 4, 21, 22; App. G)."""

PUBLISHED_TABLE_1: Mapping[str, tuple[float, float]] = {
    "pretrained": (0.43, 0.262),
    "first 10": (0.85, 0.902),
    "last 10": (0.43, 0.663),
}
"""TD and accuracy on bitwise tasks of Llama-3.1-8B in the paper's Table 1."""
