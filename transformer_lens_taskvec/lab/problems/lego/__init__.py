"""LEGO: chains of variables, followed step by step or not."""

from transformer_lens_taskvec.lab.problems.lego.finding import chain_accuracy, plot_chain_accuracy
from transformer_lens_taskvec.lab.problems.lego.problem import Lego
from transformer_lens_taskvec.lab.problems.lego.values import (
    ValueDecodability,
    plot_values,
    value_decodability,
)

__all__ = [
    "Lego",
    "ValueDecodability",
    "chain_accuracy",
    "plot_chain_accuracy",
    "plot_values",
    "value_decodability",
]
