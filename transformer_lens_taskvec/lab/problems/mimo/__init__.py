"""MIMO equalisation: symbols from quantised signals, over a channel to be inferred."""

from transformer_lens_taskvec.lab.problems.mimo.estimators import (
    channel_posterior,
    finite_prior,
    known_channel,
    linear_mmse,
    true_prior,
)
from transformer_lens_taskvec.lab.problems.mimo.problem import MimoEqualisation

__all__ = [
    "MimoEqualisation",
    "channel_posterior",
    "finite_prior",
    "known_channel",
    "linear_mmse",
    "true_prior",
]
