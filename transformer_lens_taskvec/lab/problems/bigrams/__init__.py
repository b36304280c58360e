"""Bigrams against context: triggered bigrams, and an associative memory set by hand."""

from transformer_lens_taskvec.lab.problems.bigrams.finding import Meaning, meaning_of
from transformer_lens_taskvec.lab.problems.bigrams.formula import hand_set, predicted_logits
from transformer_lens_taskvec.lab.problems.bigrams.hijack import (
    Conflict,
    HijackCurve,
    conflicting_contexts,
    hijack_curve,
    plot_hijack,
)
from transformer_lens_taskvec.lab.problems.bigrams.lengths import LengthTest, length_test
from transformer_lens_taskvec.lab.problems.bigrams.memory import AssociativeMemory, MemoryConfig
from transformer_lens_taskvec.lab.problems.bigrams.problem import TriggeredBigrams

__all__ = [
    "AssociativeMemory",
    "Conflict",
    "HijackCurve",
    "LengthTest",
    "Meaning",
    "MemoryConfig",
    "TriggeredBigrams",
    "conflicting_contexts",
    "hand_set",
    "hijack_curve",
    "length_test",
    "meaning_of",
    "plot_hijack",
    "predicted_logits",
]
