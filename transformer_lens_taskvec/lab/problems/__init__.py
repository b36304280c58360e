"""Problems: mixtures of in-context tasks that the models of the lab learn.

A problem is one file, or a room if it brings models or measures of its own.
"""

from transformer_lens_taskvec.lab.problems.bigrams import (
    AssociativeMemory,
    Conflict,
    HijackCurve,
    LengthTest,
    Meaning,
    MemoryConfig,
    TriggeredBigrams,
    conflicting_contexts,
    hand_set,
    hijack_curve,
    length_test,
    meaning_of,
    plot_hijack,
    predicted_logits,
)
from transformer_lens_taskvec.lab.problems.concepts import (
    Concepts,
    SameSignAttention,
    same_sign_attention,
)
from transformer_lens_taskvec.lab.problems.lego import (
    Lego,
    ValueDecodability,
    chain_accuracy,
    plot_chain_accuracy,
    plot_values,
    value_decodability,
)
from transformer_lens_taskvec.lab.problems.linear_or_logistic import (
    LinearOrLogistic,
    logistic_regression,
)
from transformer_lens_taskvec.lab.problems.mimo import (
    MimoEqualisation,
    channel_posterior,
    finite_prior,
    known_channel,
    linear_mmse,
    true_prior,
)
from transformer_lens_taskvec.lab.problems.noise_levels import NoisyLinear, ridge_risk
from transformer_lens_taskvec.lab.problems.patterns import (
    PatternTasks,
    PruningCurve,
    neuron_norms,
    plot_pruning,
    prune_neurons,
    pruning_curve,
)
from transformer_lens_taskvec.lab.problems.readings import SwapDistances, swap_distances
from transformer_lens_taskvec.lab.problems.represented import (
    AffineEmbedding,
    LinearVectors,
    Pasted,
    ProbeErrors,
    Represented,
    paste_upper,
    plot_pasting,
    plot_probes,
    probe_targets,
)

__all__ = [
    "AffineEmbedding",
    "AssociativeMemory",
    "Concepts",
    "Conflict",
    "HijackCurve",
    "Lego",
    "LengthTest",
    "LinearOrLogistic",
    "LinearVectors",
    "Meaning",
    "MemoryConfig",
    "MimoEqualisation",
    "NoisyLinear",
    "Pasted",
    "PatternTasks",
    "ProbeErrors",
    "PruningCurve",
    "Represented",
    "SameSignAttention",
    "SwapDistances",
    "TriggeredBigrams",
    "ValueDecodability",
    "chain_accuracy",
    "channel_posterior",
    "conflicting_contexts",
    "finite_prior",
    "hand_set",
    "hijack_curve",
    "known_channel",
    "length_test",
    "linear_mmse",
    "logistic_regression",
    "meaning_of",
    "neuron_norms",
    "paste_upper",
    "plot_chain_accuracy",
    "plot_hijack",
    "plot_pasting",
    "plot_probes",
    "plot_pruning",
    "plot_values",
    "predicted_logits",
    "probe_targets",
    "prune_neurons",
    "pruning_curve",
    "ridge_risk",
    "same_sign_attention",
    "swap_distances",
    "true_prior",
    "value_decodability",
]
