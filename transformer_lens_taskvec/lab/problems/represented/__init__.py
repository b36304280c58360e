"""Regression on a representation: probes of what is computed where, and pasted upper layers."""

from transformer_lens_taskvec.lab.problems.represented.pasting import (
    AffineEmbedding,
    LinearVectors,
    Pasted,
    paste_upper,
    plot_pasting,
)
from transformer_lens_taskvec.lab.problems.represented.probes import (
    ProbeErrors,
    plot_probes,
    probe_targets,
)
from transformer_lens_taskvec.lab.problems.represented.problem import Represented

__all__ = [
    "AffineEmbedding",
    "LinearVectors",
    "Pasted",
    "ProbeErrors",
    "Represented",
    "paste_upper",
    "plot_pasting",
    "plot_probes",
    "probe_targets",
]
